"""Arrivals as properties: what a seed draws, and that traces keep their order, times and lengths."""

import json
import math
import statistics
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hanok.bench.arrivals import Arrival, poisson, read_trace
from hanok.errors import OptionError, RequestError

quick = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
requests = st.lists(
    # Whole milliseconds, as both formats can write them.
    st.tuples(st.integers(0, 10**7), st.integers(1, 5000), st.integers(1, 900)),
    min_size=1,
    max_size=20,
)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rate", [0.5, 20.0])
def test_poisson_arrivals_have_exponential_gaps(rate: float, seed: int) -> None:
    found = poisson(rate, 4000 / rate, prompt_tokens=7, new_tokens=3, seed=seed)
    times = [item.at_s for item in found]
    # 4,000 on average, with a standard deviation of 63: five of them.
    assert abs(len(found) - 4000) < 5 * math.sqrt(4000)
    gaps = [after - before for before, after in pairwise([0.0, *times])]
    assert statistics.fmean(gaps) * rate == pytest.approx(1, rel=0.08)
    # An exponential distribution's deviation is its mean, and exp(-1) of it exceeds the mean.
    assert statistics.stdev(gaps) * rate == pytest.approx(1, rel=0.1)
    assert sum(gap * rate > 1 for gap in gaps) / len(gaps) == pytest.approx(math.exp(-1), abs=0.04)
    assert {(item.prompt_tokens, item.new_tokens) for item in found} == {(7, 3)}
    assert found == poisson(rate, 4000 / rate, prompt_tokens=7, new_tokens=3, seed=seed)
    assert found != poisson(rate, 4000 / rate, prompt_tokens=7, new_tokens=3, seed=seed + 100)


@pytest.mark.parametrize("values", [(0.0, 1.0), (-1.0, 1.0), (1.0, 0.0), (math.inf, 1.0)])
def test_rates_that_cannot_be_are_refused(values: tuple[float, float]) -> None:
    with pytest.raises(OptionError, match="must be greater than 0"):
        poisson(*values, prompt_tokens=1, new_tokens=1, seed=0)


def test_a_load_without_requests_is_refused() -> None:
    with pytest.raises(OptionError, match=r"no request comes within 0.001 s at 1 requests/s"):
        poisson(1.0, 0.001, prompt_tokens=1, new_tokens=1, seed=0)


def azure(rows: list[tuple[int, int, int]]) -> str:
    start = datetime(2023, 11, 16, 18, 1, 50, tzinfo=UTC)
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    for at, prompt, new in rows:
        moment = (start + timedelta(milliseconds=at)).replace(tzinfo=None)
        lines.append(f"{moment:%Y-%m-%d %H:%M:%S}.{moment.microsecond:06d}0,{prompt},{new}")
    return "\n".join(lines)


def mooncake(rows: list[tuple[int, int, int]]) -> str:
    return "\n".join(
        json.dumps(
            {"timestamp": at, "input_length": prompt, "output_length": new, "hash_ids": [at, 3]}
        )
        for at, prompt, new in rows
    )


@quick
@given(requests, st.sampled_from([azure, mooncake]), st.sampled_from([0.1, 1.0, 2.5]))
def test_traces_keep_order_times_and_lengths(
    tmp_path: Path, rows: list[tuple[int, int, int]], write: object, scale: float
) -> None:
    file = tmp_path / "trace"
    file.write_text(write(rows))  # type: ignore[operator]
    found = read_trace(file, time_scale=scale)
    expected = sorted(rows, key=lambda row: row[0])
    assert [(item.prompt_tokens, item.new_tokens) for item in found] == [
        row[1:] for row in expected
    ]
    assert [item.at_s for item in found] == pytest.approx(
        [(row[0] - expected[0][0]) / 1000 * scale for row in expected], abs=1e-5 * scale
    )
    if write is mooncake:
        assert [item.blocks for item in found] == [(row[0], 3) for row in expected]


@quick
@given(requests, st.sampled_from([0.01, 0.5, 2.0]))
def test_lengths_are_scaled_and_at_least_one(
    tmp_path: Path, rows: list[tuple[int, int, int]], scale: float
) -> None:
    file = tmp_path / "trace"
    file.write_text(mooncake(rows))
    for item, row in zip(
        read_trace(file, length_scale=scale), sorted(rows, key=lambda row: row[0]), strict=True
    ):
        assert item.prompt_tokens == max(1, round(row[1] * scale))
        assert item.new_tokens == max(1, round(row[2] * scale))
        assert item.block_tokens == round(512 * scale)


def test_a_trace_is_cut_at_the_duration(tmp_path: Path) -> None:
    file = tmp_path / "trace"
    file.write_text(mooncake([(5000, 1, 1), (6000, 2, 2), (9000, 3, 3)]))
    assert [item.at_s for item in read_trace(file, duration_s=4.0)] == [0.0, 1.0]
    assert [item.at_s for item in read_trace(file, time_scale=0.5, duration_s=2.1)] == [0, 0.5, 2]


def test_azures_newer_traces_name_a_zone(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:01.017335+00:00,2399,6\n"
    )
    assert read_trace(file) == [
        Arrival(at_s=0.0, prompt_tokens=2162, new_tokens=5),
        Arrival(at_s=pytest.approx(1.007405), prompt_tokens=2399, new_tokens=6),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no request"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens", "line 1 is not a request"),
        ("a,b\n1,2", "line 2 is not a request"),
        ('{"timestamp": 1}', "line 1 is not a request .*input_length"),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1}\nx', "line 2 is not a request"),
        ('{"timestamp": 1, "input_length": -1, "output_length": 1}', "line 1: a time or a length"),
    ],
)
def test_files_that_are_no_trace_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "trace"
    file.write_text(text)
    with pytest.raises(RequestError, match=message):
        read_trace(file)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be read"):
        read_trace(tmp_path / "nothing")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(RequestError, match="is not UTF-8"):
        read_trace(tmp_path / "bytes")
    with pytest.raises(OptionError, match="time scale is 0"):
        read_trace(tmp_path / "nothing", time_scale=0.0)
