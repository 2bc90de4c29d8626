"""Who computes how many tokens in the next step. Pure: no torch, no clock, no input or output.

Every sequence has tokens that are computed and tokens that are not; a step computes some of the latter.
Sequences that wait for their next token come first, one each and what is drafted after it. What is
left of the budget goes to prompts in the order of arrival within their priority, cut where the budget
ends. A sequence gets the blocks of all it has when it begins, and one more whenever it outgrows them;
when none is left, the youngest of the lowest priority gives its blocks up and is computed again later,
so the oldest always comes forward.
"""

from bisect import insort
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from types import MappingProxyType

from hanok.engine.blocks import BlockPool


@dataclass(slots=True, kw_only=True, eq=False)
class Row:
    """What the scheduler knows of a sequence."""

    id: int
    tokens: list[int]
    """The prompt and the generated tokens; the generating sequence appends to it."""
    priority: int = 0
    """Smaller ones come first."""
    adapter: int = -1
    """The number of its adapter, -1 for none."""
    root: Hashable = None
    """Only sequences with the same root share blocks; see `BlockPool`."""
    is_shared: bool = True
    """Whether it may read blocks that others computed."""
    leader: "Row | None" = None
    """One with the same prompt, whose blocks are worth waiting for."""
    order: int = 0
    """Of arrival."""
    num_computed: int = 0
    """Tokens whose keys and values its blocks hold."""
    num_cached: int = 0
    """Of its prompt's tokens those that were found computed when it first began."""
    blocks: list[int] = field(default_factory=list)
    has_begun: bool = False

    @property
    def num_missing(self) -> int:
        """Tokens that are not computed."""
        return len(self.tokens) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Whether only its newest token is missing."""
        return self.num_missing == 1 and self.num_computed > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Tokens of one sequence that a step computes."""

    row: Row
    start: int
    count: int
    draft: tuple[int, ...] = ()
    """Tokens that may follow, to be checked in the same step; its row's blocks have room for them."""

    @property
    def is_last(self) -> bool:
        """Whether the next token follows from it."""
        return self.start + self.count == len(self.row.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """What the next step computes."""

    chunks: tuple[Chunk, ...]
    num_decoding: int
    """Chunks of one token that follow another generated one; they come first."""

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the other chunks."""
        return sum(chunk.count for chunk in self.chunks[self.num_decoding :])

    @property
    def num_drafted_tokens(self) -> int:
        """Drafted tokens to be checked in addition."""
        return sum(len(chunk.draft) for chunk in self.chunks)


class Scheduler:
    """The queue and the running sequences over one pool of blocks."""

    def __init__(self, pool: BlockPool, max_running: int) -> None:
        self.pool = pool
        self.max_running = max_running
        self.waiting: list[Row] = []
        self.running: list[Row] = []
        """Both by priority, then arrival."""
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self._orders = count(1)

    def add(self, row: Row) -> None:
        """Queue a sequence. Its tokens, and all that it may generate, must fit the pool alone."""
        row.order = next(self._orders)
        insort(self.waiting, row, key=_rank)

    def remove(self, row: Row) -> None:
        """Forget a sequence, finished or given up, wherever it is; its blocks are free for others."""
        for queue in (self.waiting, self.running):
            if row in queue:
                queue.remove(row)
        self._release(row)

    def plan(
        self, prompt_tokens: int, drafts: Mapping[int, Sequence[int]] = MappingProxyType({})
    ) -> StepPlan:
        """Return what to compute, with at most `prompt_tokens` besides the next tokens.

        `drafts` are tokens that may follow, by the id of their row. They count among these tokens, and
        are cut where blocks are short: no sequence is evicted for a guess.
        """
        chunks: dict[Row, Chunk] = {}
        for row in list(self.running):
            if row.is_decoding and row in self.running and self._grow(row, chunks):
                chunks[row] = Chunk(row=row, start=row.num_computed, count=1)
        num_decoding = len(chunks)
        left = prompt_tokens
        for row in chunks:
            draft = self._with_room(row, drafts.get(row.id, ())[: max(0, left)])
            if draft:
                chunks[row] = replace(chunks[row], draft=draft)
                left -= len(draft)
        for row in self._prompts():
            if left <= 0:
                break
            count = min(row.num_missing, left)
            chunks[row] = Chunk(row=row, start=row.num_computed, count=count)
            left -= count
        return StepPlan(chunks=tuple(chunks.values()), num_decoding=num_decoding)

    def commit(self, chunk: Chunk, num_accepted: int = 0) -> None:
        """Count a computed chunk and let others share the blocks it filled.

        Of its draft `num_accepted` tokens are the row's by now. Blocks that only refused ones needed
        are given back; in others, what is computed next takes their place.
        """
        row, size = chunk.row, self.pool.block_size
        first = row.num_computed // size
        row.num_computed += chunk.count + num_accepted
        for index in range(first, row.num_computed // size):
            row.blocks[index] = self.pool.keep(row.root, row.tokens, row.blocks[: index + 1])
        needed = self.pool.needed(len(row.tokens))
        self.pool.release(row.blocks[needed:])
        del row.blocks[needed:]

    def restart(self, row: Row) -> None:
        """Let a running sequence be computed again from its first token."""
        self.running.remove(row)
        self._release(row)
        insort(self.waiting, row, key=_rank)

    def restart_all(self) -> None:
        """Let all sequences be computed again, and forget what blocks hold: nothing of it is valid."""
        for row in list(self.running):
            self.restart(row)
        self.pool.forget()

    def _prompts(self) -> Iterator[Row]:
        """Yield running sequences with a prompt to compute, then those that may begin."""
        yield from [row for row in self.running if not row.is_decoding]
        for row in list(self.waiting):
            if len(self.running) >= self.max_running:
                return
            if row.leader is not None and self._is_worth_waiting(row.leader):
                continue
            if not self._begin(row):
                return  # those after it wait too: none overtakes
            yield row

    def _is_worth_waiting(self, leader: Row) -> bool:
        return leader.num_missing > 1 and (leader in self.running or leader in self.waiting)

    def _begin(self, row: Row) -> bool:
        found = self.pool.match(row.root, row.tokens) if row.is_shared else []
        missing = self.pool.needed(len(row.tokens)) - len(found)
        # Those that run will each want a block before long.
        if self.pool.num_available < missing + len(self.running):
            self.pool.release(found)
            return False
        self.waiting.remove(row)
        insort(self.running, row, key=_rank)
        row.blocks = found + self.pool.take(missing)
        row.num_computed = len(found) * self.pool.block_size
        if not row.has_begun:
            row.has_begun, row.num_cached = True, row.num_computed
            self.num_prompt_tokens += len(row.tokens)
            self.num_cached_tokens += row.num_cached
        return True

    def _grow(self, row: Row, chunks: dict[Row, Chunk]) -> bool:
        """Give a decoding sequence its next block, if it needs one, even at another's cost."""
        if self.pool.needed(len(row.tokens)) <= len(row.blocks):
            return True
        while not self.pool.num_available:
            youngest = self.running[-1]
            chunks.pop(youngest, None)
            self.restart(youngest)
            self.num_preemptions += 1
            if youngest is row:
                return False
        row.blocks += self.pool.take(1)
        return True

    def _with_room(self, row: Row, draft: Sequence[int]) -> tuple[int, ...]:
        """Return what of a draft there are blocks for, and claim them."""
        length, size = len(row.tokens), self.pool.block_size
        missing = self.pool.needed(length + len(draft)) - len(row.blocks)
        if draft and missing > 0:
            row.blocks += self.pool.take(min(missing, self.pool.num_available))
        return tuple(draft[: len(row.blocks) * size - length])

    def _release(self, row: Row) -> None:
        self.pool.release(row.blocks)
        row.blocks = []
        row.num_computed = 0


def _rank(row: Row) -> tuple[int, int]:
    return row.priority, row.order
