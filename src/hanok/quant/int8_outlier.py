"""LLM.int8() (arXiv 2208.07339): int8 on both sides; columns of x that stand out stay in floating point.

Here so that it can be compared. Splitting x costs more than it saves at few tokens; `int8` is faster.
"""

from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

from torch import Tensor

from hanok.errors import OptionError
from hanok.quant.base import Format, QuantizedWeight
from hanok.quant.rounding import rounded


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Outlier:
    """A scale for each row of the weight and each row of x; columns of x above `threshold` apart."""

    name: ClassVar[str] = "int8-outlier"
    summary: ClassVar[str] = "LLM.int8(): 8 bits on both sides, outlying columns of x in float"

    threshold: float = 6.0
    """A column of x that holds a value this large is multiplied in floating point."""

    def __post_init__(self) -> None:
        if not (self.threshold > 0 and isfinite(self.threshold)):
            raise OptionError(f"{self.name}: threshold is {self.threshold}; it must be above 0.")

    @property
    def format(self) -> Format:
        """See `QuantMethod`."""
        return Format(
            kind="signed",
            bits=8,
            group_size=None,
            activations="outliers",
            outlier_threshold=self.threshold,
        )

    def bits_per_weight(self, columns: int) -> float:
        """See `QuantMethod`."""
        return 8 + 32 / columns

    def quantize(self, weight: Tensor) -> QuantizedWeight:
        """See `QuantMethod`."""
        codes, scale = rounded(weight.float()[:, None], is_half=False)
        return QuantizedWeight(format=self.format, codes=codes[:, 0], scale=scale)


METHOD = Int8Outlier
