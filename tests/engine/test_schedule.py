"""The scheduler under random arrivals, lengths and cancels, replayable by seed."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanok.engine.blocks import BlockPool
from hanok.engine.schedule import Row, Scheduler, StepPlan
from hanok.engine.step_budget import StepBudget

SIZE = 4


class Simulation:
    """A scheduler with an engine that only counts."""

    def __init__(
        self, seed: int, *, num_blocks: int, max_running: int, drafting: float = 0.0
    ) -> None:
        self.drafting = drafting
        self.random = random.Random(seed)
        self.pool = BlockPool(num_blocks, SIZE)
        self.scheduler = Scheduler(self.pool, max_running)
        self.most = num_blocks * SIZE
        self.wanted: dict[int, int] = {}
        self.rows: dict[int, Row] = {}
        self.ended: list[int] = []
        self.began: list[int] = []
        self.numbers = 0

    def arrive(self, *, priority: int = 0, leader: Row | None = None) -> Row:
        prompt = self.random.randint(1, self.most - 1)
        tokens = [self.random.randrange(2) for _ in range(prompt)]
        self.numbers += 1
        row = Row(id=self.numbers, tokens=tokens, priority=priority, leader=leader)
        self.wanted[row.id] = self.random.randint(prompt + 1, self.most)
        self.rows[row.id] = row
        self.scheduler.add(row)
        return row

    def cancel(self) -> None:
        if self.rows:
            row = self.rows.pop(self.random.choice(sorted(self.rows)))
            self.scheduler.remove(row)

    def drafts(self) -> dict[int, list[int]]:
        """Return guesses for some of those that wait for their next token, as far as they may grow."""
        found = {}
        for row in self.scheduler.running:
            left = self.wanted[row.id] - len(row.tokens) - 1
            if row.is_decoding and left > 0 and self.random.random() < self.drafting:
                count = self.random.randint(0, min(left, 3 * SIZE))
                found[row.id] = [self.random.randrange(2) for _ in range(count)]
        return found

    def step(self, budget: int) -> StepPlan:
        plan = self.scheduler.plan(budget, self.drafts())
        self.check(plan, budget)
        for chunk in plan.chunks:
            row = chunk.row
            if row.id not in self.began:
                self.began.append(row.id)
            if not chunk.is_last:
                self.scheduler.commit(chunk)
                continue
            accepted = self.random.randint(0, len(chunk.draft))
            row.tokens += [*chunk.draft[:accepted], self.random.randrange(2)]
            self.scheduler.commit(chunk, accepted)
            assert row.num_missing == 1
            assert len(row.blocks) <= self.pool.needed(len(row.tokens))
            if len(row.tokens) >= self.wanted[row.id]:
                self.scheduler.remove(row)
                self.ended.append(row.id)
                del self.rows[row.id]
        return plan

    def check(self, plan: StepPlan, budget: int) -> None:
        rows = [chunk.row for chunk in plan.chunks]
        assert len(set(map(id, rows))) == len(rows)
        assert plan.num_prompt_tokens + plan.num_drafted_tokens <= budget
        assert len(self.scheduler.running) <= self.scheduler.max_running
        for chunk in plan.chunks:
            assert chunk.count >= 1
            assert chunk.start == chunk.row.num_computed
            assert chunk.row in self.scheduler.running
            end = chunk.start + chunk.count + len(chunk.draft)
            assert len(chunk.row.blocks) * SIZE >= end
            assert chunk.is_last or not chunk.draft
        held = [block for row in self.scheduler.running for block in row.blocks]
        assert self.pool.num_used == len(set(held))
        assert all(not row.blocks and not row.num_computed for row in self.scheduler.waiting)
        # A block that several use holds what all of them begin with.
        for index, row in enumerate(self.scheduler.running):
            for other in self.scheduler.running[:index]:
                for place, block in enumerate(row.blocks):
                    if block in other.blocks:
                        end = (place + 1) * SIZE
                        assert other.blocks.index(block) == place
                        assert row.tokens[:end] == other.tokens[:end]


@settings(max_examples=150)
@given(
    seed=st.integers(0, 10**6),
    num_blocks=st.integers(1, 12),
    max_running=st.integers(1, 5),
    arrivals=st.floats(0.05, 0.9),
    cancels=st.floats(0, 0.1),
    drafting=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_everyone_who_stays_is_served_within_the_budget_and_no_block_is_lost(
    seed: int, num_blocks: int, max_running: int, arrivals: float, cancels: float, drafting: float
) -> None:
    run = Simulation(seed, num_blocks=num_blocks, max_running=max_running, drafting=drafting)
    for _ in range(80):
        if run.random.random() < arrivals:
            run.arrive(priority=run.random.choice([0, 0, 1]))
        if run.random.random() < cancels:
            run.cancel()
        run.step(run.random.randint(1, 20))
    for _ in range(20_000):
        if not run.rows:
            break
        plan = run.step(8)
        assert plan.chunks, "somebody waits and nothing is done"
    assert not run.rows
    assert run.pool.num_used == 0


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), num_blocks=st.integers(2, 12))
def test_nobody_overtakes_within_a_priority(seed: int, num_blocks: int) -> None:
    run = Simulation(seed, num_blocks=num_blocks, max_running=3)
    ids = [run.arrive().id for _ in range(12)]
    for _ in range(20_000):
        if not run.rows:
            break
        run.step(6)
    assert run.began == ids


def test_a_seed_replays() -> None:
    def trace() -> list[tuple[tuple[int, int, int], ...]]:
        run = Simulation(5, num_blocks=6, max_running=3)
        found = []
        for number in range(60):
            if number % 3 == 0:
                run.arrive()
            plan = run.step(7)
            found.append(tuple((c.row.id, c.start, c.count) for c in plan.chunks))
        return found

    assert trace() == trace()


def test_a_smaller_priority_comes_first() -> None:
    run = Simulation(1, num_blocks=12, max_running=1)
    late, urgent = run.arrive(priority=5), run.arrive(priority=-1)
    run.step(100)
    assert run.began == [urgent.id]
    assert late in run.scheduler.waiting


def test_the_youngest_gives_way_and_keeps_its_tokens() -> None:
    pool = BlockPool(3, SIZE)
    scheduler = Scheduler(pool, 2)
    old = Row(id=1, tokens=[1, 2, 3])
    young = Row(id=2, tokens=[5, 6, 7])
    for row in (old, young):
        scheduler.add(row)
    for _ in range(7):
        for chunk in scheduler.plan(100).chunks:
            scheduler.commit(chunk)
            if not chunk.row.num_missing:
                chunk.row.tokens.append(9)
    assert scheduler.num_preemptions >= 1
    assert old in scheduler.running
    assert young in scheduler.waiting
    assert young.tokens[:3] == [5, 6, 7]
    assert len(young.tokens) > 3
    assert old.num_computed > young.num_computed == 0


def test_drafts_take_only_blocks_that_are_free_and_give_back_what_was_refused() -> None:
    pool = BlockPool(4, SIZE)
    scheduler = Scheduler(pool, 2)
    rows = [Row(id=number, tokens=[number] * 3) for number in (1, 2)]
    for row in rows:
        scheduler.add(row)
    for chunk in scheduler.plan(100).chunks:
        scheduler.commit(chunk)
        chunk.row.tokens.append(0)
    guesses = list(range(10))
    plan = scheduler.plan(100, {1: guesses, 2: guesses})
    # Both have a block with all 4 tokens; the first takes the two that are left.
    assert [chunk.draft for chunk in plan.chunks] == [tuple(range(8)), ()]
    assert plan.num_drafted_tokens == 8
    first = plan.chunks[0]
    rows[0].tokens += [0, 1, 99]
    scheduler.commit(first, 2)
    assert (rows[0].num_computed, len(rows[0].blocks)) == (6, 2)
    assert pool.num_available == 1
    # What others may find is what was accepted, not what was guessed.
    rows[0].tokens += [5]
    for chunk in scheduler.plan(100).chunks:
        scheduler.commit(chunk)
    scheduler.remove(rows[0])
    assert len(pool.match(None, [1, 1, 1, 0, 0, 1, 2, 3, 4])) == 1
    assert len(pool.match(None, [1, 1, 1, 0, 0, 1, 99, 5, 4])) == 2


def test_siblings_wait_for_the_first_and_share_its_blocks() -> None:
    pool = BlockPool(20, SIZE)
    scheduler = Scheduler(pool, 8)
    prompt = list(range(14))
    leader = Row(id=1, tokens=[*prompt])
    scheduler.add(leader)
    for number in (2, 3):
        scheduler.add(Row(id=number, tokens=[*prompt], leader=leader))
    first = scheduler.plan(100)
    assert [chunk.row.id for chunk in first.chunks] == [1]
    scheduler.commit(first.chunks[0])
    leader.tokens.append(99)
    second = scheduler.plan(100)
    assert [(c.row.id, c.start, c.count) for c in second.chunks] == [
        (1, 14, 1),
        (2, 12, 2),
        (3, 12, 2),
    ]
    assert len({tuple(chunk.row.blocks[:3]) for chunk in second.chunks}) == 1


def test_steps_are_made_as_long_as_asked() -> None:
    budget = StepBudget(mixed_s=0.25, alone_s=1.0, most_tokens=2048)
    for _ in range(60):
        tokens = budget.prompt_tokens(0)
        budget.record(tokens, 0, 0.002 * tokens, is_waited=False)
        budget.record(0, 4, 0.05, is_waited=False)
    assert budget.prompt_tokens(0) == pytest.approx(500, rel=0.02)
    assert budget.prompt_tokens(4) == pytest.approx(100, rel=0.02)


def test_how_fast_a_queue_shrinks_is_known_from_steps_that_others_waited_for() -> None:
    budget = StepBudget(mixed_s=0.25, alone_s=1.0, most_tokens=2048)
    for _ in range(20):  # cold, and nobody waits
        budget.record(10, 0, 1.0, is_waited=False)
    assert budget.drain_rate == 0
    budget.record(100, 4, 1.9, is_waited=True)
    assert budget.drain_rate == 0
    for _ in range(40):
        budget.record(100, 4, 0.25, is_waited=True)
        budget.record(0, 8, 0.25, is_waited=True)  # no room for another one
    assert budget.drain_rate == pytest.approx(200, rel=0.05)
