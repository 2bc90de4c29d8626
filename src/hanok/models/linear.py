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
| AVX-512                   | with bfloat16  | more   | torch (oneDNN)                               |
| AVX-512                   | without        | more   | weights widened, a block of rows at a time   |
| not built                 | with bfloat16  | 1      | torch, oneDNN off                            |
| not built                 | with bfloat16  | more   | torch (oneDNN)                               |
| not built                 | without        | 1      | matrix times vector                          |
| not built                 | without        | more   | weights widened, a block of rows at a time   |
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hanok.kernels.native import native
from hanok.kernels.processor import is_x86, multiplies

# Rows widened at a time: few enough to stay in L2 when the product is short, enough to keep the
# float32 product busy when it is long (measured: 256 and 1024 rows of 2048 columns).
FEW_TOKENS, FEW_TOKENS_ROWS, MANY_TOKENS_ROWS = 32, 256, 1024

Product = Literal["torch", "native", "torch without oneDNN", "vector", "widened"]


def choose_product(weight: Tensor, num_tokens: int) -> Product:
    """Return how `dense` multiplies `num_tokens` rows with this weight."""
    needs_grad = torch.is_grad_enabled() and weight.requires_grad
    if weight.device.type != "cpu" or needs_grad:
        return "torch"
    kernels = native()
    is_known = weight.dtype in (torch.bfloat16, torch.float32) and weight.is_contiguous()
    if is_known and kernels is not None and 0 < num_tokens <= kernels.dense_tokens:
        return "native"
    if multiplies(weight.dtype, weight.device):
        is_torch_slow = weight.dtype is torch.bfloat16 and num_tokens == 1 and is_x86()
        return "torch without oneDNN" if is_torch_slow else "torch"
    return "vector" if num_tokens == 1 else "widened"


def dense(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ weight.T + bias.

    x: (tokens, in)   weight: (out, in)   bias: (out,)   returns: (tokens, out), in x's dtype.
    """
    inputs_need_grad = x.requires_grad or (bias is not None and bias.requires_grad)
    if torch.is_grad_enabled() and inputs_need_grad:
        return F.linear(x, weight, bias)
    match choose_product(weight, x.shape[0]):
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


class Linear(nn.Module):
    """A weight (out, in) and perhaps a bias (out,)."""

    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, *, has_bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, in) -> (tokens, out)."""
        return dense(x, self.weight, self.bias)
