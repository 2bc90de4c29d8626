"""Our own compiled kernels, where the package's build found a compiler.

The library has a plain C interface without torch: it gets addresses and sizes. Without it everything
runs on torch's operators; `why_not` says what that costs and what to do. It contains its kernels once
for each instruction set; `native` returns the best set that this processor has, or the best below a cap:
HANOK_ISA=avx2 computes like a processor without AVX-512.
"""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from ctypes import c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hanok.kernels.processor import INSTRUCTION_SETS, instruction_set_cap

LIBRARY = Path(__file__).parent / "libhanok_kernels.so"
FLOAT_TOKENS = 8  # rows of x that `product` takes as they are, not rounded

# The library's numbers for types, kinds of panels, activations and operations (cpp/kernels.h).
ITEM_TYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.int8: 2,
    torch.float16: 3,
    torch.uint8: 4,
}
FLOATS = (torch.float32, torch.bfloat16)  # what x may be
PanelKind = Literal["bytes", "nibbles", "zero nibbles", "table", "zero bytes", "float8"]
PANEL_KINDS: dict[PanelKind, int] = {
    "bytes": 0,
    "nibbles": 1,
    "zero nibbles": 2,
    "table": 3,
    "zero bytes": 4,
    "float8": 5,
}
Quantizer = Literal["int8", "int4", "table", "float8"]
QUANTIZERS: dict[Quantizer, int] = {"int8": 0, "int4": 1, "table": 2, "float8": 3}
GATE_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
DENSE, PRODUCT, ATTEND, RMS_NORM, ROTATE, GATE, ADD, COPY, WIDEN, ADD_LORA = range(10)


class Panels(ctypes.Structure):
    """A quantized weight's addresses and sizes, as the library takes them (cpp/kernels.h)."""

    _fields_ = (
        ("codes", c_void_p),
        ("scale", c_void_p),
        ("zero", c_void_p),
        ("table", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("group_columns", c_int64),
        ("kind", c_int32),
        ("scale_type", c_int32),
        ("zero_type", c_int32),
        ("rounds_x", c_int32),
    )


class AttentionCall(ctypes.Structure):
    """One call of attention, as the library takes it (cpp/kernels.h)."""

    _fields_ = (
        *((name, c_void_p) for name in ("q", "new_keys", "new_values", "keys", "values")),
        *((name, c_void_p) for name in ("key_scale", "value_scale", "output")),
        *((name, c_void_p) for name in ("query_counts", "key_counts", "blocks", "block_starts")),
        *((name, c_int64) for name in ("num_sequences", "num_heads", "num_kv_heads", "head_dim")),
        *((name, c_int64) for name in ("q_token_stride", "new_key_stride")),
        ("new_value_stride", c_int64),
        *((name, c_int64) for name in ("key_token_stride", "key_head_stride")),
        *((name, c_int64) for name in ("block_stride", "block_keys", "window")),
        ("scale", c_float),
        ("softcap", c_float),
        ("type", c_int32),
        ("cache_type", c_int32),
    )


class LoraPart(ctypes.Structure):
    """A part of an adapter, as the library takes it (cpp/kernels.h)."""

    _fields_ = (
        *((name, c_void_p) for name in ("a", "b")),
        *((name, c_int64) for name in ("number", "first_row", "rows", "rank")),
        ("scale", c_float),
    )


class LoraCall(ctypes.Structure):
    """The adapters of one product, as the library takes them (cpp/kernels.h)."""

    _fields_ = (
        ("parts", c_void_p),
        *((name, c_int64) for name in ("num_parts", "rows", "columns")),
    )


class Step(ctypes.Structure):
    """One call of a kernel, as the library takes it (cpp/kernels.h)."""

    _fields_ = (
        ("inputs", c_void_p * 3),
        ("output", c_void_p),
        ("sizes", c_int64 * 5),
        ("number", c_float),
        ("operation", c_int32),
        ("choice", c_int32),
        ("type", c_int32),
    )


class Recording:
    """The kernel calls made within `recording`, in order, and the tensors they point to."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.kept: list[object] = []


_recording: ContextVar[Recording | None] = ContextVar("recording", default=None)


@contextmanager
def recording() -> Iterator[Recording]:
    """Record every kernel call that this thread makes in the block, besides making it."""
    found = Recording()
    token = _recording.set(found)
    try:
        yield found
    finally:
        _recording.reset(token)


class Native:
    """The kernels of one instruction set. Results never depend on the number of threads.

    The library only sees addresses, and wrong shapes would be read out of bounds: each method checks its
    arguments and raises ValueError.
    """

    def __init__(self, library: ctypes.CDLL, table: int) -> None:
        self._table = c_void_p(table)
        library.hanok_name.restype = ctypes.c_char_p
        library.hanok_name.argtypes = [c_void_p]
        self.instruction_set: str = library.hanok_name(self._table).decode()
        """The instructions that the kernels use, as they are usually written."""
        library.hanok_key.restype = ctypes.c_char_p
        library.hanok_key.argtypes = [c_void_p]
        self.key: str = library.hanok_key(self._table).decode()
        """The same as one of INSTRUCTION_SETS."""
        library.hanok_dense_tokens.restype = c_int64
        library.hanok_dense_tokens.argtypes = [c_void_p]
        self.dense_tokens: int = library.hanok_dense_tokens(self._table)
        """Rows of x that `dense` takes at most; without a limit, each is computed as if alone."""
        pointer, size, count = c_void_p, c_int64, c_int
        self._run = _function(library.hanok_run, [pointer, size, count])
        numbers = [count, pointer, size]
        self._pack = _function(library.hanok_pack, [pointer, size, size, pointer, count, *numbers])
        self._pack_codes = _function(library.hanok_pack_codes, [pointer, size, size, pointer])
        self._unpack = _function(library.hanok_unpack, [pointer, size, size, pointer, count])
        self._look_up = _function(library.hanok_look_up, [pointer, pointer, size, pointer, count])
        self._log_sum_exp = _function(
            library.hanok_log_sum_exp, [pointer, size, size, pointer, pointer, count]
        )

    def run(self, steps: "ctypes.Array[Step]") -> None:
        """Replay recorded calls."""
        _done(self._run(self._table, steps, len(steps), torch.get_num_threads()))

    def _call(self, step: Step, *kept: object) -> None:
        """Make one call; `kept` is what its addresses point to."""
        _done(self._run(self._table, ctypes.byref(step), 1, torch.get_num_threads()))
        found = _recording.get()
        if found is not None:
            found.steps.append(step)
            found.kept += kept

    def dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return x @ weight.T + bias, sums in float32.

        x: (tokens, in), at most dense_tokens   weight: (out, in)   bias: (out,)   x and weight both
        bfloat16 or both float32, on the CPU. returns: (tokens, out) in their dtype.
        """
        x = x.contiguous()
        (tokens, columns), rows = x.shape, weight.shape[0]
        if not 0 < tokens <= self.dense_tokens or columns != weight.shape[1]:
            raise ValueError(f"x is {tokens} x {columns}, the weight {rows} x {weight.shape[1]}")
        if x.dtype != weight.dtype or not weight.is_contiguous():
            raise ValueError(
                f"x is {x.dtype}, the weight {weight.dtype}, strides {weight.stride()}"
            )
        item_type, bias_at, kept = _type(x), *_bias(bias, rows, x.dtype)
        y = x.new_empty(tokens, rows)
        inputs = (x.data_ptr(), weight.data_ptr(), bias_at)
        sizes = (tokens, rows, columns)
        self._call(Step(inputs, y.data_ptr(), sizes, 0.0, DENSE, 0, item_type), x, weight, kept, y)
        return y

    def product(self, x: Tensor, weight: Panels, bias: Tensor | None) -> Tensor:
        """Return x @ weight.T + bias in x's dtype; at most FLOAT_TOKENS where x is not rounded.

        x: (tokens, in) bfloat16 or float32 on the CPU   bias: (out,)   returns: (tokens, out)
        """
        x = x.contiguous()
        (tokens, columns), rows = x.shape, weight.rows
        if columns != weight.columns:
            raise ValueError(f"x is {tokens} x {columns}, the weight {rows} x {weight.columns}")
        if not weight.rounds_x and tokens > FLOAT_TOKENS:
            raise ValueError(f"x has {tokens} rows, at most {FLOAT_TOKENS} are taken")
        item_type, bias_at, kept = _type(x), *_bias(bias, rows, x.dtype)
        y = x.new_empty(tokens, rows)
        if tokens and rows:
            inputs = (x.data_ptr(), ctypes.addressof(weight), bias_at)
            step = Step(inputs, y.data_ptr(), (tokens,), 0.0, PRODUCT, 0, item_type)
            self._call(step, x, weight, kept, y)
        return y

    def pack(
        self,
        weight: Panels,
        start: int,
        rows: Tensor,
        quantizer: Quantizer,
        numbers: Sequence[float],
    ) -> None:
        """Quantize rows (count, in) into the panels that begin at row `start`, a multiple of 16.

        `numbers` are those that a method states for its quantizer.
        """
        rows = _rows_of(weight, start, rows)
        given = (c_float * len(numbers))(*numbers)
        _done(
            self._pack(
                self._table,
                ctypes.byref(weight),
                start,
                rows.shape[0],
                rows.data_ptr(),
                _type(rows),
                QUANTIZERS[quantizer],
                ctypes.addressof(given),
                len(numbers),
            )
        )

    def pack_codes(self, weight: Panels, start: int, codes: Tensor) -> None:
        """Put codes (count, in), a byte each, into the same panels; scales and zeros are not theirs."""
        codes = _rows_of(weight, start, codes.view(torch.uint8))
        where = ctypes.byref(weight)
        _done(self._pack_codes(self._table, where, start, codes.shape[0], codes.data_ptr()))

    def unpack(self, weight: Panels, start: int, count: int, into: Tensor | None = None) -> Tensor:
        """Return rows [start, start + count), `start` a multiple of 16: (count, in) float32.

        `into`: (count or more, in) float32, overwritten; None: memory of its own
        """
        if start % 16 or not 0 <= start <= start + count <= weight.rows:
            raise ValueError(f"rows {start} to {start + count} are not those of {weight.rows}")
        is_room = into is not None and into.shape[0] >= count
        rows = into[:count] if into is not None and is_room else torch.empty(count, weight.columns)
        _done(
            self._unpack(
                self._table,
                ctypes.byref(weight),
                start,
                count,
                rows.data_ptr(),
                torch.get_num_threads(),
            )
        )
        return rows

    def look_up(self, weight: Panels, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return some rows, (ids, in) in `dtype`. ids: (count,) int64."""
        if ids.dtype is not torch.int64 or not ids.is_cpu or ids.dim() != 1:
            raise ValueError(f"ids are {ids.dtype} {tuple(ids.shape)} on {ids.device}, not int64")
        ids = ids.contiguous()
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < weight.rows:
            raise IndexError(f"ids {int(ids.min())} to {int(ids.max())}, rows {weight.rows}")
        rows = torch.empty(len(ids), weight.columns, dtype=dtype)
        item_type = _type(rows)
        _done(
            self._look_up(
                self._table,
                ctypes.byref(weight),
                ids.data_ptr(),
                len(ids),
                rows.data_ptr(),
                item_type,
            )
        )
        return rows

    def attend(self, call: AttentionCall, *kept: object) -> None:
        """Make one call of attention; the caller has checked its addresses, which point into `kept`."""
        self._call(Step((ctypes.addressof(call),), None, (), 0.0, ATTEND, 0, 0), call, *kept)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool) -> Tensor:
        """Return x / rms(x) * weight over the last axis, in x's dtype, computed in float32.

        x: (…, size)   weight: (size,), in x's dtype; 1 is added to it with `unit_offset`.
        """
        size = x.shape[-1]
        if weight.shape != (size,) or weight.dtype != x.dtype or not weight.is_contiguous():
            raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, the weight {weight.dtype}")
        x = x.contiguous()
        y = torch.empty_like(x)
        inputs, sizes = (x.data_ptr(), weight.data_ptr()), (x.numel() // max(1, size), size)
        step = Step(inputs, y.data_ptr(), sizes, eps, RMS_NORM, unit_offset, _type(x))
        self._call(step, x, weight, y)
        return y

    def rotate(self, heads: Tensor, cos_sin: Tensor, *, is_interleaved: bool) -> Tensor:
        """Return heads rotated by their angles, (tokens, heads, head_dim) in their dtype.

        cos_sin: (2, tokens, 1, rotary_dim) in the heads' dtype; components past rotary_dim are kept.
        """
        tokens, num_heads, head_dim = heads.shape
        rotary_dim = cos_sin.shape[-1]
        if heads.stride()[1:] != (head_dim, 1):
            heads = heads.contiguous()
        cos_sin = cos_sin.contiguous()
        fits = cos_sin.shape == (2, tokens, 1, rotary_dim) and rotary_dim <= head_dim
        if not fits or rotary_dim % 2 or cos_sin.dtype != heads.dtype:
            raise ValueError(
                f"heads are {tuple(heads.shape)}, cosines and sines {tuple(cos_sin.shape)}"
            )
        y = heads.new_empty(tokens, num_heads, head_dim)
        cos = cos_sin.data_ptr()
        inputs = (heads.data_ptr(), cos, cos + tokens * rotary_dim * cos_sin.itemsize)
        sizes = (tokens, num_heads, head_dim, rotary_dim, heads.stride(0))
        step = Step(inputs, y.data_ptr(), sizes, 0.0, ROTATE, is_interleaved, _type(heads))
        self._call(step, heads, cos_sin, y)
        return y

    def gate(self, gate_up: Tensor, activation: str) -> Tensor:
        """Return activation(gate) * up, (tokens, size), of both side by side, (tokens, 2 x size).

        `activation` is one of GATE_ACTIVATIONS.
        """
        if gate_up.dim() != 2 or gate_up.shape[1] % 2:
            raise ValueError(
                f"gate and up are {' x '.join(map(str, gate_up.shape))}: no two halves"
            )
        gate_up = gate_up.contiguous()
        tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
        y = gate_up.new_empty(tokens, size)
        choice, item_type = GATE_ACTIVATIONS[activation], _type(gate_up)
        inputs, sizes = (gate_up.data_ptr(),), (tokens, size)
        self._call(Step(inputs, y.data_ptr(), sizes, 0.0, GATE, choice, item_type), gate_up, y)
        return y

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """Return a + b of the same shape and dtype, added in float32."""
        if a.shape != b.shape or a.dtype != b.dtype:
            raise ValueError(f"{a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)} differ")
        a, b = a.contiguous(), b.contiguous()
        y, inputs = torch.empty_like(a), (a.data_ptr(), b.data_ptr())
        self._call(Step(inputs, y.data_ptr(), (a.numel(),), 0.0, ADD, 0, _type(a)), a, b, y)
        return y

    def widen(self, x: Tensor) -> Tensor:
        """Return x, of any shape, in float32; x itself if it is float32."""
        if x.dtype is torch.float32:
            return x
        x, item_type = x.contiguous(), _type(x)
        y = torch.empty(x.shape)
        self._call(
            Step((x.data_ptr(),), y.data_ptr(), (x.numel(),), 0.0, WIDEN, 0, item_type), x, y
        )
        return y

    def add_lora(
        self, call: LoraCall, x: Tensor, chosen: Tensor, product: Tensor, *kept: object
    ) -> None:
        """Add what the tokens' adapters add, in place; each token's result is that of the token alone.

        x: (tokens, in)   product: (tokens, out)   both bfloat16 or both float32, on the CPU, as is what
        `call`, whose addresses point into `kept`, says.   chosen: (tokens,) int64, numbers of adapters;
        a number that `call` does not have is none.
        """
        x = x.contiguous()
        tokens = x.shape[0]
        shapes = (x.shape, product.shape, chosen.shape)
        if shapes != ((tokens, call.columns), (tokens, call.rows), (tokens,)):
            raise ValueError(
                f"x is {tuple(x.shape)}, the product {tuple(product.shape)}, chosen "
                f"{tuple(chosen.shape)} and the adapters are of a weight {call.rows} x {call.columns}"
            )
        if x.dtype != product.dtype or not product.is_contiguous() or not product.is_cpu:
            raise ValueError(
                f"x is {x.dtype}, the product {product.dtype}, strides {product.stride()}"
            )
        if chosen.dtype is not torch.int64 or not chosen.is_cpu or not chosen.is_contiguous():
            raise ValueError(f"chosen is {chosen.dtype} on {chosen.device}, not int64 in a row")
        inputs = (x.data_ptr(), ctypes.addressof(call), chosen.data_ptr())
        step = Step(inputs, product.data_ptr(), (tokens,), 0.0, ADD_LORA, 0, _type(x))
        self._call(step, x, call, chosen, product, kept)

    def log_sum_exp(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logarithm of each row's sum of exponentials, and its first largest entry.

        rows: (rows, columns) float32   returns: (rows,) float32, NaN for a row with a NaN; (rows,) int64
        """
        if (
            rows.dtype is not torch.float32
            or not rows.is_cpu
            or rows.dim() != 2
            or not rows.numel()
        ):
            raise ValueError(f"rows are {rows.dtype} {tuple(rows.shape)} on {rows.device}")
        rows = rows.contiguous()
        totals = torch.empty(len(rows))
        likeliest = torch.empty(len(rows), dtype=torch.int64)
        addresses = (rows.data_ptr(), *rows.shape, totals.data_ptr(), likeliest.data_ptr())
        _done(self._log_sum_exp(self._table, *addresses, torch.get_num_threads()))
        return totals, likeliest

    def copy(self, rows: Tensor) -> Tensor:
        """Return rows (rows, …), each contiguous but possibly apart, copied side by side."""
        if rows.dim() == 0 or not rows.is_cpu or (len(rows) and not rows[0].is_contiguous()):
            raise ValueError(f"rows {tuple(rows.shape)} with strides {rows.stride()} are in pieces")
        y = torch.empty(rows.shape, dtype=rows.dtype)
        stride = rows.stride(0) * rows.itemsize
        sizes = (len(rows), y.nbytes // max(1, len(rows)), stride)
        self._call(Step((rows.data_ptr(),), y.data_ptr(), sizes, 0.0, COPY, 0, 0), rows, y)
        return y


def _function(found: Any, argument_types: list[Any]) -> Any:
    """Declare a function of the library; the table of kernels comes first everywhere."""
    found.restype = c_int
    found.argtypes = [c_void_p, *argument_types]
    return found


def _done(status: int) -> None:
    if status:
        raise MemoryError("a kernel could not get the memory for its intermediate results")


def _rows_of(weight: Panels, start: int, rows: Tensor) -> Tensor:
    """Return rows to be written, dense; ValueError where they do not fit."""
    count, columns = rows.shape
    if start % 16 or not 0 <= start <= weight.rows - count or columns != weight.columns:
        raise ValueError(
            f"rows {start} to {start + count} of {columns} do not fit into "
            f"{weight.rows} x {weight.columns}"
        )
    return rows.contiguous()


def _type(tensor: Tensor) -> int:
    if tensor.dtype not in FLOATS or not tensor.is_cpu:
        raise ValueError(f"kernels take float32 and bfloat16 on the CPU, not {tensor.dtype}")
    return ITEM_TYPES[tensor.dtype]


def _bias(bias: Tensor | None, rows: int, dtype: torch.dtype) -> tuple[int | None, Tensor | None]:
    """Return the bias's address in `dtype`, and what keeps it alive."""
    if bias is None:
        return None, None
    bias = bias.to(dtype).contiguous()
    if bias.shape != (rows,):
        raise ValueError(f"the bias has shape {tuple(bias.shape)}, the weight {rows} rows")
    return bias.data_ptr(), bias


@cache
def _library() -> ctypes.CDLL | None:
    if not LIBRARY.is_file():
        return None
    try:
        return ctypes.CDLL(str(LIBRARY))
    except OSError:
        return None


@cache
def built_instruction_sets() -> Sequence[Native]:
    """Return the kernels of each instruction set that this processor has, the best first."""
    library = _library()
    if library is None:
        return ()
    library.hanok_kernels.restype = c_void_p
    library.hanok_kernels.argtypes = [c_int]
    found: list[Native] = []
    while table := library.hanok_kernels(len(found)):
        found.append(Native(library, table))
    return tuple(found)


def emulated_amx() -> Native | None:
    """Return AMX's kernels with loops instead of tiles, for tests; None where they cannot run."""
    library = _library()
    if library is None:
        return None
    library.hanok_emulated_amx.restype = c_void_p
    table = library.hanok_emulated_amx()
    return None if table is None else Native(library, table)


def has_wrong_tiles() -> bool:
    """Return whether this processor's AMX gives other results than its AVX-512, and is not used."""
    library = _library()
    return library is not None and bool(library.hanok_has_wrong_tiles())


@cache
def instruction_sets() -> Sequence[Native]:
    """Return the kernels that the user allows, the best first."""
    allowed: Sequence[str] = INSTRUCTION_SETS
    cap = instruction_set_cap()
    if cap is not None:
        allowed = allowed[: allowed.index(cap) + 1]
    return tuple(item for item in built_instruction_sets() if item.key in allowed)


def native() -> Native | None:
    """Return the best kernels, or None if the library was not built or does not load.

    None also while torch compiles, since dynamo cannot trace them: torch's operators are used then.
    """
    if torch.compiler.is_compiling():
        return None
    found = instruction_sets()
    return found[0] if found else None


def native_for(*tensors: Tensor) -> Native | None:
    """Return the kernels if they support these tensors and none of them needs a gradient."""
    kernels = native()
    if kernels is None:
        return None
    records = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor.dtype not in FLOATS or not tensor.is_cpu or (records and tensor.requires_grad):
            return None
    return kernels


def why_not() -> str | None:
    """Return why there is no library, or None if there is one."""
    if native() is not None:
        return None
    cost = (
        "torch's operators do their work: bfloat16 decodes up to 1.3 times slower, "
        "quantized weights far slower than bfloat16"
    )
    if not LIBRARY.is_file():
        return f"not built: hanok was installed where no C++ compiler could compile them; {cost}"
    return f"{LIBRARY.name} does not load, it was built for another system; {cost}"
