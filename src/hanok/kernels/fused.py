"""Fused kernels for norm, rotation and gate: our CPU library's or our GPU kernels, where they fit."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from hanok.kernels.differentiable import Differentiable, Fused
from hanok.kernels.native import native_for

GPU_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def fused_for(*tensors: Tensor) -> Fused | None:
    """Return the kernels for these tensors, None where none fit; differentiable where it is needed."""
    first = tensors[0]
    if first.is_cpu:
        kernels: Fused | None = native_for(*tensors)
        if kernels is not None or not torch.is_grad_enabled():
            return kernels
        kernels = native_for(*(tensor.detach() for tensor in tensors))
    elif not first.is_cuda or torch.compiler.is_compiling():
        return None
    else:
        is_known = all(tensor.dtype in GPU_FLOATS for tensor in tensors)
        kernels = _triton() if is_known else None
    needs = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return Differentiable(kernels) if needs and kernels is not None else kernels


@cache
def _triton() -> Fused | None:
    if find_spec("triton") is None:
        return None
    from hanok.kernels.triton_elementwise import FUSED

    return FUSED
