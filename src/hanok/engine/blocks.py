"""Which blocks of the cache hold which tokens: handed out, shared by what begins alike, evicted.

A block is a row of the cache with `block_size` tokens. Full blocks are known by their place in a tree:
the block before them and their own tokens, compared exactly, so two sequences that begin with the same
tokens read the same blocks. A tree's root is whatever must not be shared across, such as an adapter or
a salt. Unused blocks stay in the tree until their memory is needed. Imports no torch.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import count

Node = tuple[Hashable, tuple[int, ...]]
"""A full block: its predecessor (a root, or a block's number in the tree), and its tokens."""


@dataclass(slots=True)
class _Block:
    users: int = 0
    node: Node | None = None
    """Its place in the tree, once it is full."""
    number: int = 0
    """Its number as predecessor: never given twice, so that an evicted block has no successors."""


class BlockPool:
    """The blocks of one cache."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._blocks = [_Block() for _ in range(num_blocks)]
        self._empty = list(range(num_blocks))[::-1]
        self._idle: OrderedDict[int, None] = OrderedDict()
        """In the tree and unused; the next to be evicted first."""
        self._tree: dict[Node, int] = {}
        self._numbers = count(1)

    @property
    def num_available(self) -> int:
        """Blocks that can be allocated: empty and unused ones."""
        return len(self._empty) + len(self._idle)

    @property
    def num_used(self) -> int:
        """Blocks that sequences use."""
        return self.num_blocks - self.num_available

    @property
    def num_cached(self) -> int:
        """Unused blocks whose tokens later sequences with the same prefix can share."""
        return len(self._idle)

    def needed(self, num_tokens: int) -> int:
        """Return how many blocks hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def match(self, root: Hashable, tokens: Sequence[int]) -> list[int]:
        """Return the blocks that hold the first of these tokens already, and use them.

        At least one token is left to compute, for its logits.
        """
        found: list[int] = []
        before: Hashable = (root,)
        for start in range(0, len(tokens) - self.block_size, self.block_size):
            block = self._tree.get((before, tuple(tokens[start : start + self.block_size])))
            if block is None:
                break
            found.append(block)
            before = self._blocks[block].number
        for block in found:
            self._use(block)
        return found

    def take(self, number: int) -> list[int]:
        """Return so many blocks to write to. There must be enough (`num_available`)."""
        if number > self.num_available:
            raise ValueError(f"{number} blocks are wanted and {self.num_available} can be had")
        return [self._take() for _ in range(number)]

    def keep(self, root: Hashable, tokens: Sequence[int], blocks: Sequence[int]) -> int:
        """Let others share the last of `blocks`, the first full blocks of these tokens.

        Returns the block that holds its tokens from now on: another one where somebody computed the
        same before, which is then used in its place.
        """
        last = blocks[-1]
        before: Hashable = (root,) if len(blocks) == 1 else self._blocks[blocks[-2]].number
        start = (len(blocks) - 1) * self.block_size
        node = (before, tuple(tokens[start : start + self.block_size]))
        known = self._tree.get(node)
        if known is not None:
            if known != last:
                self._use(known)
                self.release([last])
            return known
        entry = self._blocks[last]
        entry.node, entry.number = node, next(self._numbers)
        self._tree[node] = last
        return last

    def release(self, blocks: Sequence[int]) -> None:
        """Stop using blocks; the last ones of a sequence are evicted before their predecessors."""
        for block in reversed(blocks):
            entry = self._blocks[block]
            if entry.users <= 0:
                raise ValueError(f"block {block} is not in use")
            entry.users -= 1
            if entry.users == 0 and entry.node is None:
                self._empty.append(block)
            elif entry.users == 0:
                self._idle[block] = None

    def forget(self) -> None:
        """Empty the unused blocks."""
        for block in list(self._idle):
            self._evict(block)
            self._empty.append(block)

    def _use(self, block: int) -> None:
        self._blocks[block].users += 1
        self._idle.pop(block, None)

    def _take(self) -> int:
        if self._empty:
            block = self._empty.pop()
        else:
            block = next(iter(self._idle))
            self._evict(block)
        self._blocks[block].users = 1
        return block

    def _evict(self, block: int) -> None:
        del self._idle[block]
        entry = self._blocks[block]
        if entry.node is not None:
            del self._tree[entry.node]
        entry.node = None
