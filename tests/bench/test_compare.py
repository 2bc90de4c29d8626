"""Comparing two runs: noise and slow machines are no change, changes are."""

from dataclasses import replace

import pytest

from hanok.bench.compare import MIN_EFFECT, compare
from hanok.bench.report import Report
from hanok.bench.settings import Setting

from .conftest import LONG, SPEEDS, made_report

INT8 = Setting(attention="native", quant="int8")


def changed_rows(before: Report, after: Report) -> list[str]:
    return [
        item.before.label
        for item in compare(before, after).changes
        if item.verdict != "same" or item.differences
    ]


@pytest.mark.parametrize("rounds", [3, 8])
@pytest.mark.parametrize("machine", [1.0, 1.15, 0.8])
def test_two_runs_of_one_program_do_not_differ(rounds: int, machine: float) -> None:
    """The machine may be another, each round disturbed as a whole: at most 1 in 10 is a false alarm."""
    alarms = sum(
        changed_rows(
            made_report(2 * seed, rounds=rounds),
            made_report(2 * seed + 1, rounds=rounds, machine=machine),
        )
        != []
        for seed in range(60)
    )
    assert alarms <= 6


@pytest.mark.parametrize("unseen", [0.75, 1.3])
def test_what_all_rows_share_is_told_of_none_alone(unseen: float) -> None:
    """A machine may change by what its probes do not see."""
    alarms = 0
    for seed in range(60):
        before, after = made_report(2 * seed), made_report(2 * seed + 1, unseen=unseen)
        found = compare(before, after)
        assert found.shared == pytest.approx(1 / unseen, rel=0.15)
        alarms += any(item.verdict != "same" for item in found.changes)
    assert alarms <= 6
    # What changed by itself beside that is still found.
    after = made_report(1, unseen=unseen, sigma=0.01, changed={INT8: 2.0})
    assert set(changed_rows(made_report(0, sigma=0.01), after)) <= {INT8.label("auto")}
    after = made_report(1, unseen=1.0, sigma=0.01, changed={INT8: 2.0})
    assert set(changed_rows(made_report(0, sigma=0.01), after)) == {INT8.label("auto")}


def test_few_rows_share_nothing() -> None:
    before, after = made_report(0, only=LONG), made_report(1, only=LONG, unseen=2.0)
    found = compare(before, after)
    assert found.shared is None
    assert {item.verdict for item in found.changes} == {"slower"}


@pytest.mark.parametrize(("factor", "verdict"), [(0.7, "faster"), (1.5, "slower")])
def test_a_change_is_found_where_it_is(factor: float, verdict: str) -> None:
    found = 0
    for seed in range(20):
        before = made_report(2 * seed)
        after = made_report(2 * seed + 1, changed={INT8: factor})
        verdicts = {item.before.setting: item.verdict for item in compare(before, after).changes}
        assert {key for key, value in verdicts.items() if value != "same"} <= {INT8}
        found += verdicts[INT8] == verdict
    assert found >= 18


def test_what_the_machine_changed_by_is_no_change_of_a_row() -> None:
    before, after = made_report(1, sigma=0.001), made_report(2, sigma=0.001, machine=1.5)
    least, most = compare(before, after).machine
    assert least == pytest.approx(1 / 1.5, rel=0.1)
    assert most == 1.0
    assert changed_rows(before, after) == []
    # Beyond it, it is.
    worse = made_report(2, sigma=0.001, machine=1.5, changed={INT8: 1.5})
    assert set(changed_rows(before, worse)) == {INT8.label("auto")}


def test_a_row_is_compared_with_itself() -> None:
    before = made_report(3, rounds=5)
    found = compare(before, before)
    assert [item.ratio.value for item in found.changes] == pytest.approx([1.0] * len(SPEEDS))
    assert found.machine == (1.0, 1.0)
    assert found.only_before == found.only_after == ()
    assert found.notes == ()


def test_what_changed_beside_speed_is_told() -> None:
    before = made_report(4)
    row = before.rows[2]
    assert row.quality is not None
    assert row.peak_bytes is not None
    other = replace(
        row,
        quality=replace(row.quality, perplexity=row.quality.perplexity * 1.001),  # type: ignore[operator]
        peak_bytes=row.peak_bytes * 2,
        is_same_text=False,
    )
    after = replace(before, rows=(*before.rows[:2], other, *before.rows[3:]))
    (changed,) = [item for item in compare(before, after).changes if item.differences]
    assert changed.differences == (
        "peak 200 to 400 MiB",
        "text was the reference's, is another",
        "perplexity 50.0100 to 50.0600",
    )
    little = replace(row, peak_bytes=round(row.peak_bytes * (MIN_EFFECT - 0.01)))
    after = replace(before, rows=(*before.rows[:2], little, *before.rows[3:]))
    assert [item for item in compare(before, after).changes if item.differences] == []


def test_rows_and_facts_of_one_alone_are_told() -> None:
    before = made_report(5)
    after = replace(
        before,
        rows=before.rows[1:],
        versions={"hanok": "0.2.0", "torch": "2.13.0"},
        checkpoint=replace(before.checkpoint, fingerprint="0" * 32, name="other"),
        quality_tokens=64,
    )
    found = compare(before, after)
    assert found.only_before == (before.rows[0],)
    assert len(found.changes) == len(before.rows) - 1
    assert found.notes == (
        "these are different checkpoints, tiny</script>story and other",
        "quality is over 1,024 tokens in one and 64 in the other",
        "hanok: 0.1.0 in one, 0.2.0 in the other",
    )
