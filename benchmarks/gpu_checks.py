"""Every Triton kernel of hanok against its reference: the first part of benchmarks/gpu.py.

A row of the table is one kernel with one kind of weights or heads. Its cases are shapes and dtypes, each
with the largest error that rounding explains. A row is computed by a process of its own (`send_row`),
where new memory is filled with NaN, so that what a kernel leaves out shows.

Tolerances are shares of what `largest_error` divides by. Weights, of products or of attention, are
rounded to x's dtype, and the result is: by up to 2^-8 of a number in bfloat16, 2^-11 in float16. The
weights' errors add up at random; the largest of a million sums is about five times the usual one, as
large as the result's own. In float32 sums of up to 14,336 products are in another order, and products
of one token carry a 1 that is taken off again.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from gpu_contestants import GPU_SHAPES, largest_error, make_decoder
from gpu_workers import Failure
from torch import Tensor

import hanok
from hanok.attention.base import AttentionSpec, ForwardBatch
from hanok.attention.base import reference as attention_reference
from hanok.attention.cache import LayerState
from hanok.attention.triton import TritonAttention
from hanok.engine.cuda_graph import DecodeGraphs
from hanok.kernels.fused import Fused
from hanok.models.config import Rope
from hanok.models.rotary import Rotary
from hanok.quant.base import QuantMethod, reference
from hanok.quant.fp8 import Fp8
from hanok.quant.int4 import Int4
from hanok.quant.int8 import Int8
from hanok.quant.kernels.triton import TritonWeight
from hanok.quant.nf4 import Nf4
from hanok.quant.recipe import read_recipe

METHODS: Mapping[str, QuantMethod] = {
    "int4": Int4(),
    "int8": Int8(),
    "int4 with zeros": Int4(group_size=128, symmetric=False),
    "int8 by rows": Int8(group_size=0),
    "nf4": Nf4(),
    "nf4, nested scales": Nf4(double_quant=True),
    "fp8": Fp8(),
}
TOLERANCES = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9, torch.float32: 2.0**-14}
STEP_TOLERANCE = 2.0**-10  # of logits, computed in float32
ROWS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """What one call of the attention kernels serves."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    lengths: tuple[int, ...]
    """Keys of each sequence, the new one included."""
    block_size: int | None = None
    """None: one block that is as long as the longest sequence."""
    window: int | None = None
    softcap: float | None = None

    @property
    def spec(self) -> AttentionSpec:
        """What a layer asks of attention."""
        return AttentionSpec(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            scale=self.head_dim**-0.5,
            window=self.window,
            softcap=self.softcap,
        )

    @property
    def name(self) -> str:
        """Heads and what is special about them."""
        parts = [f"{self.num_heads}/{self.num_kv_heads} heads × {self.head_dim}"]
        parts += [f"blocks of {self.block_size}"] if self.block_size else []
        parts += [f"window {self.window}"] if self.window else []
        parts += [f"softcap {self.softcap:g}"] if self.softcap else []
        return ", ".join(parts)

    @property
    def shape(self) -> str:
        """The sequences."""
        count = len(self.lengths)
        if count == 1:
            return f"{self.lengths[0]} keys"
        return f"{count} × {min(self.lengths)} to {max(self.lengths)} keys"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The shapes that are tried: all of them in bfloat16, fewer in the other dtypes."""

    weights: tuple[tuple[int, int], ...]
    """(out, in); the first one is multiplied with a bias."""
    few_weights: tuple[tuple[int, int], ...]
    head: tuple[int, int] | None
    """The largest weight, in int8 and with few tokens."""
    tokens: tuple[int, ...]
    few_tokens: tuple[int, ...]
    heads: tuple[Heads, ...]
    norms: tuple[tuple[int, int], ...]
    """(rows, size)."""
    decoder: str
    step_quants: tuple[str | None, ...]
    load_quants: tuple[str | None, ...]
    steps: int
    """Tokens that decoders generate."""

    @property
    def text(self) -> str:
        """What is tried, in a few sentences."""
        tokens, few_tokens = (", ".join(map(str, item)) for item in (self.tokens, self.few_tokens))
        weights, few_weights = (
            ", ".join(map(str, item)) for item in (self.weights, self.few_weights)
        )
        largest = f"; {self.head} in int8" if self.head else ""
        lengths = "; ".join(f"{item.name}: {item.shape}" for item in self.heads)
        return (
            f"Products of {tokens} tokens with weights (out, in) {weights}{largest}, the first with "
            f"a bias; in float16 and float32 {few_tokens} tokens and {few_weights}. Attention, one "
            f"new token of each sequence: {lengths}. Norms, rotations and gates (rows, size): "
            f"{', '.join(map(str, self.norms))}. Decoders: {self.decoder} and the bundled model, "
            f"{self.steps} tokens."
        )


# The first weight has tails both ways, and its products of one token are split over columns. The others
# are those of Llama 3.1 8B: qkv, output, gate and up, down.
REAL = Grid(
    weights=((1000, 4200), (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    few_weights=((1000, 4200), (4096, 4096)),
    head=(128256, 4096),
    tokens=(1, 2, 16, 17, 64, 128, 256, 300),
    few_tokens=(1, 16, 64, 256, 300),
    heads=(
        Heads(num_heads=32, num_kv_heads=8, head_dim=128, lengths=(1,)),
        Heads(num_heads=32, num_kv_heads=8, head_dim=128, lengths=(8192,)),
        Heads(
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            lengths=(1, 2, 63, 64, 65, 128, 255, 256, 257, 300, 511, 512, 513, 1000, 2048, 4096),
        ),
        Heads(
            num_heads=32, num_kv_heads=8, head_dim=128, lengths=(5, 330, 16, 2000), block_size=16
        ),
        Heads(num_heads=32, num_kv_heads=8, head_dim=128, lengths=(1, 700, 4000), window=3000),
        Heads(num_heads=14, num_kv_heads=2, head_dim=64, lengths=(257, 1, 900)),
        Heads(num_heads=32, num_kv_heads=32, head_dim=96, lengths=(100, 520)),
        Heads(num_heads=16, num_kv_heads=8, head_dim=256, lengths=(513, 40), softcap=50.0),
    ),
    norms=((1, 4096), (16, 4096), (300, 4096), (7, 3000), (2, 14336)),
    decoder="qwen-0.5b",
    step_quants=(None, "int8", "int4"),
    load_quants=(None, "int8", "int4"),
    steps=24,
)
DRY = Grid(
    weights=((40, 200),),
    few_weights=((40, 200),),
    head=None,
    tokens=(1, 3, 19, 257),
    few_tokens=(1, 3, 19, 257),
    heads=(
        Heads(num_heads=4, num_kv_heads=2, head_dim=16, lengths=(1, 65, 257)),
        Heads(num_heads=4, num_kv_heads=2, head_dim=16, lengths=(5, 40), block_size=16),
        Heads(num_heads=7, num_kv_heads=1, head_dim=24, lengths=(30,), window=5, softcap=1.5),
    ),
    norms=((5, 96),),
    decoder="smallest",
    step_quants=(None, "int8", "int4"),
    load_quants=(None,),
    steps=3,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One comparison."""

    row: str
    shape: str
    dtype: torch.dtype
    tolerance: float
    error: Callable[[torch.device], float]

    @property
    def name(self) -> str:
        """Shape and dtype."""
        return f"{self.shape}, {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What came of the cases of a row."""

    row: str
    cases: tuple[Case, ...]
    answers: tuple[float | Failure, ...]
    """The errors of the first cases; of all of them unless something ended the row."""
    end: str = ""
    """Why there are fewer answers than cases; empty where there are not."""
    is_out_of_time: bool = False
    """Whether that is because the part's time was over."""

    @property
    def wrong(self) -> list[tuple[Case, float | Failure]]:
        """The cases that failed, and how."""
        pairs = zip(self.cases, self.answers, strict=False)
        return [
            (case, answer)
            for case, answer in pairs
            if isinstance(answer, Failure) or not answer <= case.tolerance
        ]

    @property
    def closest(self) -> tuple[Case, float] | None:
        """The case whose error is the largest share of what is allowed, and the error."""
        pairs = zip(self.cases, self.answers, strict=False)
        found = [(case, answer) for case, answer in pairs if not isinstance(answer, Failure)]
        return max(found, key=lambda pair: _share(*pair), default=None)

    @property
    def verdict(self) -> str:
        """ok, FAILED, or that there was no time."""
        if self.wrong or (self.end and not self.is_out_of_time):
            return "FAILED"
        if not self.end:
            return "ok"
        return "ok as far as tried" if self.answers else "not tried"


def _share(case: Case, error: float) -> float:
    """Return an error as a share of its tolerance, which may be zero."""
    return error / case.tolerance if case.tolerance else float("inf") if error else 0.0


# Rows


def rows(grid: Grid) -> dict[str, tuple[Case, ...]]:
    """Return the cases of every row, what others rest on first."""
    found: dict[str, list[Case]] = {}
    for make in (decoder_cases, attention_cases, elementwise_cases, product_cases):
        for case in make(grid):
            found.setdefault(case.row, []).append(case)
    return {row: tuple(cases) for row, cases in found.items()}


def send_row(connection: Connection, row: str, device_type: str, is_dry: bool) -> None:
    """Send the error of each case of a row in turn, or a `Failure`."""
    # Torch then fills new memory; that some of its own operators are not deterministic is no matter.
    torch.set_deterministic_debug_mode("warn")
    warnings.filterwarnings("ignore", ".*deterministic")
    device = torch.device(device_type)
    for case in rows(DRY if is_dry else REAL)[row]:
        connection.send(answer_of(case, device))


def answer_of(case: Case, device: torch.device) -> float | Failure:
    """Return the error of a case, or what happened instead."""
    try:
        return case.error(device)
    except Exception as error:  # of any kind: it is this case's, and goes into the table
        return Failure.of(error)


def product_cases(grid: Grid) -> Iterator[Case]:
    """Yield products by quantization and kernel, and rows that are looked up."""
    for label, method in METHODS.items():
        names = TritonWeight(method.format, (16, 64), torch.device("cpu"), method)
        for dtype, tolerance in TOLERANCES.items():
            is_main = dtype is torch.bfloat16
            shapes = grid.weights if is_main else grid.few_weights
            for tokens in grid.tokens if is_main else grid.few_tokens:
                largest = grid.head if is_main and label == "int8" and tokens <= 2 else None
                for shape in (*shapes, *([largest] if largest else [])):
                    how: dict[str, Any] = {"method": method, "shape": shape, "dtype": dtype}
                    how |= {"tokens": tokens, "has_bias": shape == grid.weights[0]}
                    yield Case(
                        row=f"{label}: {names.kernel(tokens, dtype).removeprefix('triton, ')}",
                        shape=f"{tokens} × ({shape[0]}, {shape[1]})",
                        dtype=dtype,
                        tolerance=tolerance,
                        error=partial(product_error, **how),
                    )
            for shape in shapes[:2]:
                yield Case(
                    row=f"{label}: rows looked up",
                    shape=f"of ({shape[0]}, {shape[1]})",
                    dtype=dtype,
                    tolerance=tolerance,
                    error=partial(rows_error, method=method, shape=shape, dtype=dtype),
                )


def attention_cases(grid: Grid) -> Iterator[Case]:
    """Yield attention by heads, and what it appends to the cache."""
    for heads in grid.heads:
        for dtype, tolerance in TOLERANCES.items():
            how = {"heads": heads, "dtype": dtype}
            yield Case(
                row=f"attention, {heads.name}",
                shape=heads.shape,
                dtype=dtype,
                tolerance=tolerance,
                error=partial(attention_error, **how),
            )
            yield Case(
                row="attention, keys and values appended, numbers that differ",
                shape=f"{heads.name}: {heads.shape}",
                dtype=dtype,
                tolerance=0.0,
                error=partial(append_error, **how),
            )


def elementwise_cases(grid: Grid) -> Iterator[Case]:
    """Yield norms, rotations and gates."""
    for name, check in (
        ("RMSNorm", norm_error),
        ("rotation", rotation_error),
        ("gate", gate_error),
    ):
        for dtype, tolerance in TOLERANCES.items():
            for count, size in grid.norms:
                yield Case(
                    row=name,
                    shape=f"{count} × {size}",
                    dtype=dtype,
                    tolerance=tolerance,
                    error=partial(check, shape=(count, size), dtype=dtype),
                )


def decoder_cases(grid: Grid) -> Iterator[Case]:
    """Yield whole decoders, whose steps are recorded as CUDA graphs on a GPU."""
    for quant in grid.step_quants:
        yield Case(
            row="logits of recorded steps",
            shape=f"{grid.decoder}, {quant or 'unquantized'}",
            dtype=torch.float32,
            tolerance=STEP_TOLERANCE,
            error=partial(steps_error, shape=grid.decoder, quant=quant, steps=grid.steps),
        )
    for quant in grid.load_quants:
        yield Case(
            row="hanok.load and generate, tokens that differ",
            shape=f"bundled model, {quant or 'unquantized'}",
            dtype=torch.float32,
            tolerance=0.0,
            error=partial(generated_error, quant=quant, steps=grid.steps),
        )


# Comparisons


def product_error(
    device: torch.device,
    *,
    method: QuantMethod,
    shape: tuple[int, int],
    tokens: int,
    dtype: torch.dtype,
    has_bias: bool,
    oracle: Callable[..., Tensor] = reference,
) -> float:
    """Return the largest error of a product with a quantized weight."""
    generator = torch.Generator(device).manual_seed(tokens)
    stored = quantized(method, shape, generator)
    x = normal((tokens, shape[1]), dtype, generator)
    bias = normal((shape[0],), dtype, generator) if has_bias else None
    return largest_error(stored.matmul(x, bias), oracle(x, stored.record(), bias))


def rows_error(
    device: torch.device, *, method: QuantMethod, shape: tuple[int, int], dtype: torch.dtype
) -> float:
    """Return the largest error of rows that are looked up."""
    stored = quantized(method, shape, torch.Generator(device).manual_seed(0))
    ids = torch.tensor([shape[0] - 1, 0, 3, 3], device=device)
    return largest_error(stored.rows(ids, dtype), stored.record().dequantize()[ids])


def attention_error(
    device: torch.device,
    *,
    heads: Heads,
    dtype: torch.dtype,
    oracle: Callable[..., Tensor] = attention_reference,
) -> float:
    """Return the largest error of the attention of one new token of each sequence."""
    call = AttentionCall(heads, dtype, device)
    answer = call.attend(call.new_state())
    expected = [
        oracle(q[-1:], k.transpose(0, 1), v.transpose(0, 1), heads.spec) for q, k, v in call.parts
    ]
    return largest_error(answer, torch.cat(expected))


def append_error(device: torch.device, *, heads: Heads, dtype: torch.dtype) -> float:
    """Return how many numbers of the cache are not what they should be after a call."""
    call = AttentionCall(heads, dtype, device)
    state, expected = call.new_state(), call.new_state()
    call.attend(state)
    for blocks, (_, k, v) in zip(call.blocks, call.parts, strict=True):
        expected.extend(blocks, 0, k.transpose(0, 1), v.transpose(0, 1))
    return float(
        sum(
            int(((found != right) & ~(found.isnan() & right.isnan())).sum())
            for found, right in ((state.keys, expected.keys), (state.values, expected.values))
        )
    )


class AttentionCall:
    """Queries, keys and values of some sequences, drawn from N(0, 1), and their places in a cache."""

    def __init__(self, heads: Heads, dtype: torch.dtype, device: torch.device) -> None:
        self._heads = heads
        generator = torch.Generator(device).manual_seed(len(heads.lengths))
        counts = (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads)
        self.parts = [
            [normal((length, count, heads.head_dim), dtype, generator) for count in counts]
            for length in heads.lengths
        ]
        self._block_size = heads.block_size or max(heads.lengths)
        needed = [-(-length // self._block_size) for length in heads.lengths]
        # Blocks in no order, and one more that nobody may write to.
        self._num_blocks = sum(needed) + 1
        order = torch.randperm(
            self._num_blocks, generator=torch.Generator().manual_seed(0)
        ).tolist()
        self.blocks = [tuple(order.pop() for _ in range(count)) for count in needed]

    def new_state(self) -> LayerState:
        """Return a cache of all but the last keys and values, NaN where there is nothing."""
        heads, (q, _, _) = self._heads, self.parts[0]
        shape = (self._num_blocks, heads.num_kv_heads, self._block_size, heads.head_dim)
        nothing = float("nan")
        state = LayerState(q.new_full(shape, nothing), q.new_full(shape, nothing))
        for blocks, (_, k, v) in zip(self.blocks, self.parts, strict=True):
            state.extend(blocks, 0, k[:-1].transpose(0, 1), v[:-1].transpose(0, 1))
        return state

    def attend(self, state: LayerState) -> Tensor:
        """Let the kernels append the last keys and values and attend."""
        q, k, v = (torch.cat([part[index][-1:] for part in self.parts]) for index in range(3))
        lengths = self._heads.lengths
        batch = ForwardBatch.of(
            [[0]] * len(lengths),
            past=[length - 1 for length in lengths],
            blocks=self.blocks,
            device=q.device,
        )
        return TritonAttention().attend(q, k, v, self._heads.spec, batch, state)


def norm_error(device: torch.device, *, shape: tuple[int, int], dtype: torch.dtype) -> float:
    """Return the largest error of a norm."""
    generator = torch.Generator(device).manual_seed(0)
    x, weight = normal(shape, dtype, generator), normal((shape[1],), dtype, generator)
    answer = fused().rms_norm(x, weight, 1e-5, unit_offset=False)
    return largest_error(answer, norm_formula(x, weight, 1e-5))


def rotation_error(device: torch.device, *, shape: tuple[int, int], dtype: torch.dtype) -> float:
    """Return the largest error of rotated heads, of which three quarters of the components are."""
    generator = torch.Generator(device).manual_seed(0)
    head_dim = 8
    heads = normal((shape[0], shape[1] // head_dim + 1, head_dim), dtype, generator)[:, :-1]
    angles = normal((shape[0], 3), torch.float32, generator).repeat(1, 2)
    cos_sin = torch.stack([angles.cos(), angles.sin()])[:, :, None].to(dtype)
    answer = fused().rotate(heads, cos_sin, is_interleaved=False)
    expected = Rotary(Rope(theta=1.0, rotary_dim=6)).rotate(heads.double(), cos_sin.double())
    return largest_error(answer.flatten(1), expected.flatten(1))


def gate_error(device: torch.device, *, shape: tuple[int, int], dtype: torch.dtype) -> float:
    """Return the largest error of a gate."""
    generator = torch.Generator(device).manual_seed(0)
    gate_up = normal((shape[0], 2 * shape[1]), dtype, generator)
    gate, up = gate_up.double().chunk(2, dim=-1)
    return largest_error(fused().gate(gate_up, "silu"), torch.nn.functional.silu(gate) * up)


def fused() -> Fused:
    """Return our GPU kernels, in the interpreter too."""
    from hanok.kernels.triton_elementwise import FUSED

    return FUSED


def norm_formula(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return RMSNorm in float64."""
    wide = x.double()
    return wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()


@torch.inference_mode()
def steps_error(device: torch.device, *, shape: str, quant: str | None, steps: int) -> float:
    """Return the largest error of the logits of steps, against whole passes with plain attention.

    Three sequences of different lengths in a step of four.
    """
    recipe = None if quant is None else read_recipe(quant)
    decoder = make_decoder(GPU_SHAPES[shape], recipe, device, dtype=torch.float32)
    sequences = [[5, 9, 20, 31], [7, 8], [11, 12, 13, 14, 15]]
    cache = decoder.new_cache(3, 5 + steps)
    decoder(ForwardBatch.of([item[:-1] for item in sequences], device=device), cache)
    graphs, answers = DecodeGraphs(decoder, cache), []
    for _ in range(steps):
        logits = graphs.logits([item[-1] for item in sequences], range(3)).clone()
        answers.append(logits)
        for item, token in zip(sequences, logits.argmax(-1).tolist(), strict=True):
            item.append(token)
    decoder.use_attention("eager")
    errors = []
    for index, answer in enumerate(answers):
        ends = [len(item) - steps + index for item in sequences]
        seen = [item[:end] for item, end in zip(sequences, ends, strict=True)]
        batch = ForwardBatch.of(seen, device=device)
        expected = decoder.logits(decoder(batch)[batch.last_tokens()])
        errors.append(largest_error(answer, expected))
    return max(errors)


def generated_error(device: torch.device, *, quant: str | None, steps: int) -> float:
    """Return how many greedy tokens of the bundled model depend on the kernel and on CUDA graphs."""
    prompts, found = ["Once upon a time", "The dog"], []
    for attention, graphs in (("auto", True), ("auto", False), ("eager", False)):
        model = hanok.load(
            hanok.BUNDLED,
            dtype="float32",
            device_map=device.type,
            quant=quant,
            attn_implementation=attention,
            graphs=graphs,
        )
        answers = model.generate(prompts, max_new_tokens=steps)
        found.append([token for answer in answers for token in answer.token_ids])
    pairs = [pair for others in found[1:] for pair in zip(found[0], others, strict=True)]
    return float(sum(first != second for first, second in pairs))


def quantized(
    method: QuantMethod, shape: tuple[int, int], generator: torch.Generator
) -> TritonWeight:
    """Return a quantized weight of numbers from N(0, 1)."""
    stored = TritonWeight(method.format, shape, generator.device, method)
    for start in range(0, shape[0], ROWS_AT_ONCE):
        count = min(ROWS_AT_ONCE, shape[0] - start)
        stored.write_rows(start, normal((count, shape[1]), torch.float32, generator))
    stored.finish()
    return stored


def normal(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return numbers from N(0, 1), where the generator is."""
    return torch.randn(shape, generator=generator, device=generator.device).to(dtype)
