"""What a layer keeps between passes, as data: its bytes, and what may be done with it. Imports no torch.

One formula counts bytes for plans, `ModelConfig` and the cache that claims them (attention/cache.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import ClassVar

FLOAT_BYTES: Mapping[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}


class StateSpec:
    """One layer's state of a sequence. Dtypes are torch's names; "int8" keeps keys and values in a byte.

    `can_truncate`: the first tokens can be kept and the others forgotten. `can_page`: it lies in blocks
    of tokens. `can_share`: sequences that begin alike may read the same one.
    """

    name: ClassVar[str]
    """What it is, for messages."""
    can_truncate: ClassVar[bool]
    can_page: ClassVar[bool]
    can_share: ClassVar[bool]

    def bytes_per_token(self, dtype: str) -> int:
        """Return the bytes that each token of a sequence adds."""
        return 0

    def bytes_per_sequence(self, dtype: str) -> int:
        """Return the bytes that a sequence takes whatever its length."""
        return 0

    def nbytes(self, num_tokens: int, dtype: str) -> int:
        """Return the bytes of one sequence of `num_tokens`."""
        return self.bytes_per_sequence(dtype) + num_tokens * self.bytes_per_token(dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeysAndValues(StateSpec):
    """A key and a value of each head for each token."""

    name: ClassVar[str] = "keys and values"
    can_truncate: ClassVar[bool] = True
    can_page: ClassVar[bool] = True
    can_share: ClassVar[bool] = True

    num_kv_heads: int
    head_dim: int

    def bytes_per_token(self, dtype: str) -> int:
        """See `StateSpec`; in int8 each head's key and value have a float32 scale each."""
        if dtype == "int8":
            return 2 * self.num_kv_heads * (self.head_dim + FLOAT_BYTES["float32"])
        return 2 * self.num_kv_heads * self.head_dim * FLOAT_BYTES[dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedState(StateSpec):
    """Numbers that every token changes, float32, of one `shape` however long the sequence is."""

    name: ClassVar[str] = "a state of fixed size"
    can_truncate: ClassVar[bool] = False
    can_page: ClassVar[bool] = False
    can_share: ClassVar[bool] = False

    shape: tuple[int, ...]

    def bytes_per_sequence(self, dtype: str) -> int:
        """See `StateSpec`."""
        return prod(self.shape) * FLOAT_BYTES["float32"]
