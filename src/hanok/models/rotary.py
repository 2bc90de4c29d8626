"""Rotary position embedding and its scalings (arXiv 2104.09864): angles in float32, applied to heads.

`inverse_frequencies` is the formula of each scaling; `Rotary` keeps the cosines and sines. Angles of
dynamic and longrope scaling depend on the length of the whole sequence (`Rope.angles_for`). What is
recorded gets cosines and sines from outside; what is compiled computes them from the positions.
"""

import math

import torch
from torch import Tensor

from hanok.attention.base import ForwardBatch
from hanok.kernels.fused import fused_for
from hanok.models.config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    YarnScaling,
)


def inverse_frequencies(rope: Rope, num_tokens: int) -> tuple[Tensor, float]:
    """Return the angle per position of each pair, (rotary_dim / 2,) float32, and a factor on cos, sin.

    `num_tokens` is the length of the sequence, which only dynamic and longrope scaling look at.
    """
    dim, theta = rope.rotary_dim, rope.theta
    exponents = _exponents(dim)
    match rope.scaling:
        case None:
            return 1.0 / theta**exponents, 1.0
        case LinearScaling(factor=factor):
            return 1.0 / theta**exponents / factor, 1.0
        case DynamicScaling(factor=factor, max_positions=limit):
            grown = factor * max(num_tokens, limit) / limit - (factor - 1)
            return 1.0 / (theta * grown ** (dim / (dim - 2))) ** exponents, 1.0
        case Llama3Scaling() as scaling:
            return _llama3(1.0 / theta**exponents, scaling), 1.0
        case YarnScaling() as scaling:
            return _yarn(theta**exponents, rope, scaling), scaling.attention_factor
        case LongRopeScaling() as scaling:
            is_long = num_tokens > scaling.original_max_positions
            factors = scaling.long_factor if is_long else scaling.short_factor
            by_pair = torch.tensor(factors, device="cpu")
            return 1.0 / (by_pair * theta**exponents), scaling.attention_factor


def _exponents(dim: int) -> Tensor:
    # Computed on the CPU where a decoder is built on another device or on `meta`.
    return torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim


def _llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    wavelengths = 2 * math.pi / frequencies
    original = scaling.original_max_positions
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    ramp = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 - ramp) * frequencies / scaling.factor + ramp * frequencies


def _yarn(periods: Tensor, rope: Rope, scaling: YarnScaling) -> Tensor:
    def pair_of(num_rotations: float) -> float:
        """Return the index of the pair that rotates so often within the original length."""
        period = scaling.original_max_positions / (num_rotations * 2 * math.pi)
        return rope.rotary_dim * math.log(period) / (2 * math.log(rope.theta))

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    high += 0.001 if low == high else 0
    pairs = torch.arange(len(periods), dtype=torch.float32, device="cpu")
    ramp = ((pairs - low) / (high - low)).clamp(0, 1)
    return ramp / (scaling.factor * periods) + (1 - ramp) / periods


def _query_growth(scaling: YarnScaling, positions: Tensor) -> Tensor:
    """Return what the queries at each position are multiplied by, (positions,) float32."""
    periods = positions // scaling.original_max_positions
    return 1 + scaling.query_growth * torch.log1p(periods.float())


class Rotary:
    """Cosines and sines of one `Rope`, kept in tables that grow with the longest position seen."""

    def __init__(self, rope: Rope) -> None:
        self.rope = rope
        self._tables: dict[object, tuple[int, Tensor]] = {}
        # As numbers, which a compiled program takes as constants of any device: for short and long
        # sequences, and the exponents that dynamic scaling makes them of.
        frequencies, self._factor = inverse_frequencies(rope, 1)
        self._short: list[float] = frequencies.tolist()
        self._long: list[float] = inverse_frequencies(rope, 2**62)[0].tolist()
        self._exponents: list[float] = _exponents(rope.rotary_dim).tolist()

    def cos_sin(self, batch: ForwardBatch, dtype: torch.dtype) -> Tensor:
        """Return the packed tokens' cosines and sines, (2, tokens, 1, rotary_dim) in `dtype`.

        Where queries grow with their position there are four: cosines and sines of keys, then those of
        queries.
        """
        if torch.compiler.is_compiling():
            return self._computed(batch.positions, self._frequencies(batch)).to(dtype)
        host = batch.host
        chosen = {self.rope.angles_for(length) for length in host.sequence_lengths}
        if len(chosen) == 1:
            table = self.table(chosen.pop(), max(host.key_lengths), batch.positions.device, dtype)
            return table[:, batch.positions]
        parts, start = [], 0
        for count, keys, length in zip(
            host.query_lengths, host.key_lengths, host.sequence_lengths, strict=True
        ):
            positions = batch.positions[start : start + count]
            table = self.table(self.rope.angles_for(length), keys, positions.device, dtype)
            parts.append(table[:, positions])
            start += count
        return torch.cat(parts, dim=1)

    def table(
        self, angles_for: int, num_positions: int, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """Return the table for at least `num_positions`, (2 or 4, positions, 1, rotary_dim).

        `angles_for` is the length that `Rope.angles_for` names. Only the table asked for last is kept
        for each device and dtype; a longer one takes its place and does not change it.
        """
        key = (device, dtype)
        kept_for, table = self._tables.get(key, (-1, torch.empty(2, 0)))
        if kept_for != angles_for or table.shape[1] < num_positions:
            size = 1 << max(num_positions - 1, 63).bit_length()
            frequencies, _ = inverse_frequencies(self.rope, angles_for)
            table = self._computed(torch.arange(size, device="cpu"), frequencies)
            table = table.to(device=device, dtype=dtype)
            self._tables[key] = (angles_for, table)
        return table

    def _computed(self, positions: Tensor, frequencies: Tensor) -> Tensor:
        """Return cosines and sines of some positions, (2 or 4, positions, 1, rotary_dim) float32.

        frequencies: (rotary_dim / 2,), or (positions, rotary_dim / 2) where each has its own.
        """
        angles = positions.float()[:, None] * frequencies
        if self.rope.is_interleaved:
            angles = angles.repeat_interleave(2, dim=-1)
        else:
            angles = torch.cat([angles, angles], dim=-1)
        values = torch.stack([angles.cos(), angles.sin()])[:, :, None] * self._factor
        if isinstance(self.rope.scaling, YarnScaling) and self.rope.query_growth:
            growth = _query_growth(self.rope.scaling, positions)[:, None, None]
            values = torch.cat([values, values * growth])
        return values

    def _frequencies(self, batch: ForwardBatch) -> Tensor:
        """Return the frequencies of a batch's tokens, as `_computed` takes them, from its tensors."""
        scaling, device = self.rope.scaling, batch.positions.device
        short = torch.tensor(self._short, device=device)
        if not isinstance(scaling, LongRopeScaling | DynamicScaling):
            return short
        lengths = batch.sequence_lengths[batch.sequence_of_tokens()][:, None]
        if isinstance(scaling, LongRopeScaling):
            long = torch.tensor(self._long, device=device)
            return torch.where(lengths > scaling.original_max_positions, long, short)
        dim, limit = self.rope.rotary_dim, scaling.max_positions
        grown = scaling.factor * lengths.double().clamp(min=limit) / limit - (scaling.factor - 1)
        theta = (self.rope.theta * grown ** (dim / (dim - 2))).float()
        return 1.0 / theta ** torch.tensor(self._exponents, device=device)

    def rotate(self, heads: Tensor, cos_sin: Tensor) -> Tensor:
        """Return heads rotated by their positions' angles; components past rotary_dim are kept.

        heads: (tokens, heads, head_dim)   cos_sin: (2, tokens, 1, rotary_dim)
        """
        kernels = fused_for(heads, cos_sin)
        if kernels is not None:
            return kernels.rotate(heads, cos_sin, is_interleaved=self.rope.is_interleaved)
        cos, sin = cos_sin[0], cos_sin[1]
        dim = self.rope.rotary_dim
        if dim == heads.shape[-1]:
            return heads * cos + self._rotated_half(heads) * sin
        rotated = heads[..., :dim]
        rotated = rotated * cos + self._rotated_half(rotated) * sin
        return torch.cat([rotated, heads[..., dim:]], dim=-1)

    def _rotated_half(self, heads: Tensor) -> Tensor:
        """Return each pair (a, b) as (-b, a): rotated by a right angle."""
        if self.rope.is_interleaved:
            return torch.stack([-heads[..., 1::2], heads[..., ::2]], dim=-1).flatten(-2)
        first, second = heads.chunk(2, dim=-1)
        return torch.cat([-second, first], dim=-1)
