"""Every weight product goes through `Linear`, and every unquantized one through `dense`.

On a GPU `dense` is torch's own product. For bfloat16 on a CPU torch calls oneDNN, which for a few tokens
reads the weights at half the speed of memory or less, and on processors without bfloat16 instructions
computes many tokens at a fifth of the float32 rate or, without AVX-512, at a hundredth. What is faster
was measured (benchmarks/linear.py) and depends on the processor and the build alone, so that a result
never depends on a stopwatch:

| our kernels               | processor      | tokens | product                                      |
|---------------------------|----------------|--------|----------------------------------------------|
| portable, AVX2, AVX-VNNI  | x86            | any    | ours: a token's is the same in any company   |
| AVX-512, those of ARM     | any            | 1 to 8 | ours                                         |
| AVX-512                   | with bfloat16  | more   | torch (oneDNN); on Intel's without AMX up to |
|                           |                |        | 32, beyond as without                        |
| AVX-512                   | without        | more   | weights widened, a block of rows at a time   |
| not built                 | with bfloat16  | 1      | torch, oneDNN off                            |
| not built                 | with bfloat16  | more   | torch (oneDNN)                               |
| not built                 | without        | 1      | matrix times vector                          |
| not built                 | without        | more   | weights widened, a block of rows at a time   |
"""

from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hanok.kernels.native import native
from hanok.kernels.processor import is_x86, multiplies
from hanok.models.lora import Lora

# Rows widened at a time: few enough to stay in L2 when the product is short, enough to keep the
# float32 product busy when it is long (measured: 256 and 1024 rows of 2048 columns).
FEW_TOKENS, FEW_TOKENS_ROWS, MANY_TOKENS_ROWS = 32, 256, 1024

Product = Literal["torch", "native", "torch without oneDNN", "vector", "widened"]


def choose_product(weight: Tensor, num_tokens: int) -> Product:
    """Return how `dense` multiplies `num_tokens` rows with this weight."""
    is_plain = type(weight) in (Tensor, nn.Parameter)  # and no shard of a distributed one
    if weight.device.type != "cpu" or not is_plain or torch.compiler.is_compiling():
        return "torch"
    kernels = native()
    is_known = weight.dtype in (torch.bfloat16, torch.float32) and weight.is_contiguous()
    if is_known and kernels is not None and 0 < num_tokens <= kernels.dense_tokens:
        return "native"
    if multiplies(weight.dtype, weight.device, num_tokens):
        is_torch_slow = weight.dtype is torch.bfloat16 and num_tokens == 1 and is_x86()
        return "torch without oneDNN" if is_torch_slow else "torch"
    return "vector" if num_tokens == 1 else "widened"


def dense(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ weight.T + bias.

    x: (tokens, in)   weight: (out, in)   bias: (out,)   returns: (tokens, out), in x's dtype.
    """
    kind = choose_product(weight, x.shape[0])
    if kind != "torch" and torch.is_grad_enabled():
        needs = (x, weight) if bias is None else (x, weight, bias)
        if any(item.requires_grad for item in needs):
            product: Tensor = _Dense.apply(x, weight, bias, kind)  # type: ignore[no-untyped-call]  # torch's
            return product
    return _multiply(x, weight, bias, kind)


class _Dense(torch.autograd.Function):
    """The product that serves, and its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, kind: Product) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return _multiply(x, weight, bias, kind)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = _back(gradient, weight) if ctx.needs_input_grad[0] else None
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (_fast(gradient).t() @ _fast(x)).to(weight.dtype)
        return of_x, of_weight, gradient.sum(0) if ctx.needs_input_grad[2] else None, None


def _back(gradient: Tensor, weight: Tensor) -> Tensor:
    """Return gradient @ weight, (tokens, in), widened a block of rows at a time where that is faster."""
    if multiplies(weight.dtype, weight.device):
        return gradient @ weight
    found = torch.zeros(len(gradient), weight.shape[1])
    buffer = torch.empty(min(MANY_TOKENS_ROWS, weight.shape[0]), weight.shape[1])
    for start in range(0, weight.shape[0], MANY_TOKENS_ROWS):
        block = weight[start : start + MANY_TOKENS_ROWS]
        widened = buffer[: block.shape[0]].copy_(block)
        found.addmm_(gradient[:, start : start + MANY_TOKENS_ROWS].float(), widened)
    return found.to(gradient.dtype)


def _fast(values: Tensor) -> Tensor:
    """Return numbers in a dtype that this device multiplies fast."""
    return values if multiplies(values.dtype, values.device) else values.float()


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, kind: Product) -> Tensor:
    match kind:
        case "native":
            return _native(x, weight, bias)
        case "vector":
            row = x[0]
            product = torch.mv(weight, row) if bias is None else torch.addmv(bias, weight, row)
            return product[None]
        case "torch without oneDNN":
            return _without_onednn(x, weight, bias)
        case "widened":
            return _widened(x, weight, bias)
        case _:
            return F.linear(x, weight, bias)


def _native(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    kernels = native()
    if kernels is None:
        raise RuntimeError("the native product was chosen without its library")
    return kernels.dense(x, weight, bias)


def _without_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply with torch's own kernel.

    Sets the switch itself: `torch.backends.mkldnn.flags` sets others too, and warns about them.
    """
    was_enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        return F.linear(x, weight, bias)
    finally:
        torch._C._set_mkldnn_enabled(was_enabled)


def _widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply in float32, widening a block of rows at a time into one buffer."""
    rows = FEW_TOKENS_ROWS if x.shape[0] <= FEW_TOKENS else MANY_TOKENS_ROWS
    wide_x = x.float()
    buffer = torch.empty(min(rows, weight.shape[0]), weight.shape[1])
    output = x.new_empty(x.shape[0], weight.shape[0])
    for start in range(0, weight.shape[0], rows):
        block = weight[start : start + rows]
        wide = buffer[: block.shape[0]].copy_(block)
        product = wide_x @ wide.t()
        if bias is not None:
            product += bias[start : start + rows]
        output[:, start : start + rows] = product
    return output


class Weight(Protocol):
    """A quantized weight (out, in), a module of its own under the path of the floats it replaces.

    The layouts of `quant/kernels` are such weights; nothing here knows them.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    @property
    def nbytes(self) -> int:
        """Bytes held: codes, scales, zeros and padding."""

    def matmul(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(tokens, in) -> (tokens, out), in x's dtype."""

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return some rows dequantized, (ids, in) in `dtype`: an embedding's lookup."""

    @property
    def exact_tokens(self) -> int | None:
        """How many tokens of a product are computed as each alone is; None: any number."""

    def why_not_static(self) -> str | None:
        """Return why a product needs the CPU to look at numbers, which a CUDA graph cannot; or None."""


class Chosen(Protocol):
    """Tokens of which each may have an adapter; a `ForwardBatch` is one."""

    @property
    def adapters(self) -> Tensor | None:
        """(tokens,) int64, the number of each token's adapter, -1 for none; None where none is named."""


class Rows(NamedTuple):
    """The adapters of some rows alone."""

    adapters: Tensor | None


class Weighted(nn.Module):
    """What has a weight (out, in), in floats or quantized, always under the path `weight`."""

    weight: nn.Parameter | Weight
    lora: Lora | None

    @property
    def stored(self) -> Weight | None:
        """The quantized weight; None where it is floats."""
        weight = self.weight
        return None if isinstance(weight, Tensor) else weight

    def float_rows(self, rows: slice) -> Tensor:
        """Return some rows of the weight, (rows, in) float32: dequantized where it is quantized."""
        weight = self.weight
        if isinstance(weight, Tensor):
            return weight[rows].float()
        ids = torch.arange(rows.start, rows.stop, device=getattr(weight, "device", None))
        return weight.rows(ids, torch.float32)

    def set_weight(self, weight: nn.Parameter | Weight) -> None:
        """Take another weight in place of the one that is there."""
        del self.weight  # torch lets no module take a parameter's name
        self.weight = weight


class Linear(Weighted):
    """A weight (out, in) and perhaps a bias (out,)."""

    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, *, has_bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if has_bias else None
        self.lora = None

    def forward(self, x: Tensor, batch: Chosen | None = None) -> Tensor:
        """(tokens, in) -> (tokens, out); `batch` is what the tokens are part of."""
        weight = self.weight
        if isinstance(weight, Tensor):
            product = dense(x, weight, self.bias)
        else:
            product = weight.matmul(x, self.bias)
        if self.lora is not None:
            product = self.lora(x, product, None if batch is None else batch.adapters, self)
        return product

    def computed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the product with other weights."""
        return dense(x, weight, bias)

    @property
    def exact_tokens(self) -> int | None:
        """How many tokens of a pass our CPU kernels compute as each alone is; None: any number."""
        if self.lora is not None and not self.lora.is_exact:
            return 1  # torch multiplies by the adapter
        stored, kernels = self.stored, native()
        if stored is not None:
            return stored.exact_tokens
        return None if kernels is None else kernels.dense_tokens

    def why_not_static(self) -> str | None:
        """Return why a CUDA graph cannot hold the product, or None when it can."""
        if self.lora is not None:
            return "an adapter is attached"
        return None if self.stored is None else self.stored.why_not_static()


class Embedding(Weighted):
    """One row for each id.

    `nn.Embedding` would draw its rows, which on `meta` imports for a second.
    """

    like: Tensor

    def __init__(self, num_rows: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, size))
        # Holds nothing: its dtype, which `.to` changes, is that of rows from a quantized weight.
        self.register_buffer("like", torch.empty(0), persistent=False)
        self.lora = None

    def forward(self, ids: Tensor, batch: Chosen | None = None) -> Tensor:
        """(tokens,) int64 -> (tokens, size); `batch` is what the tokens are part of."""
        weight = self.weight
        if isinstance(weight, Tensor):
            found = F.embedding(ids, weight)
        else:
            found = weight.rows(ids, self.like.dtype)
        if self.lora is not None:
            found = self.lora(ids, found, None if batch is None else batch.adapters, self)
        return found

    def computed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the rows of other weights."""
        return F.embedding(x, weight)
