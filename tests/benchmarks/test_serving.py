"""benchmarks/serving.py: what it asks, counts and says. No test looks at a speed."""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hanok.bench.arrivals import Arrival
from hanok.bench.traffic import Answer
from hanok.checkpoint.tokenizer import open_tokenizer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROGRAMS = ("serving", "serving_report", "serving_servers", "checkpoints", "gguf_files", "measure")


@pytest.fixture(scope="module")
def serving() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("serving")
    for name in PROGRAMS:
        sys.modules.pop(name, None)


def test_every_part_is_measured_on_a_tiny_shape(tmp_path: Path) -> None:
    report = tmp_path / "report.md"
    command = [sys.executable, str(BENCHMARKS / "serving.py"), "--quick", "--threads", "1"]
    command += ["--checkpoints", str(tmp_path), "--output", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    text = report.read_text()
    for part in ("Throughput", "Turns", "Overload", "Disconnects", "Soak", "Asked"):
        assert f"## {part}\n" in text
    found = json.loads(report.with_suffix(".json").read_text())
    whos = {row["who"] for row in found["throughput"]["rows"]}
    assert whos == {"hanok", "hanok's engine alone"}
    for row in found["overload"]["rows"]:
        assert set(row["statuses"]) <= {"200", "429"}
        assert row["broken"] == row["without_retry_after"] == 0
    for row in found["disconnects"]["rows"]:
        assert row["left"] > 0
        assert row["blocks_left"] == 0
        assert row["most_tokens_after"] <= 1


def test_words_are_tokens(serving: ModuleType, tmp_path: Path) -> None:
    servers = sys.modules["serving_servers"]
    shape = sys.modules["checkpoints"].SHAPES["tiny"]
    folder = servers.served_checkpoint(shape, tmp_path)
    ids = serving.Prompts(shape.vocab_size).ids(50)
    assert open_tokenizer(folder).encode(servers.words(ids)) == ids


def test_arrivals_keep_the_traces_pattern_at_the_rate_asked_for(serving: ModuleType) -> None:
    traced = [Arrival(at_s=at, prompt_tokens=1, new_tokens=1) for at in (0.0, 1.0, 1.0, 4.0, 10.0)]
    times = serving.times_at(traced, rate=2.0, seconds=10.0)
    assert len(times) == 20
    assert times == sorted(times)
    assert times[-1] == pytest.approx(10.0)
    unit = times[1] - times[0]
    assert [at / unit for at in times[:5]] == pytest.approx([0, 1, 1, 4, 10])


def test_what_came_of_requests_is_counted(serving: ModuleType) -> None:
    def answer(status: int, first: float, **more: Any) -> Answer:
        moments = [first] if status == 200 else []
        return Answer(due=0.0, sent=0.001, status=status, moments=moments, **more)

    answers = [answer(200, at / 100) for at in range(1, 101)]
    answers += [answer(200, 50.0, error="cut"), answer(429, 0, retry_after="2"), answer(429, 0)]
    row = serving.outcome(answers)
    assert row["statuses"] == {"200": 101, "429": 2}
    assert (row["broken"], row["without_retry_after"]) == (1, 1)
    assert (row["first_token_p50_s"], row["first_token_p99_s"]) == (0.5, 0.99)


def test_the_report_says_what_was_asked_and_whether_it_was_met(serving: ModuleType) -> None:
    def rows(who: str, rates: tuple[float, ...], first: float) -> list[dict[str, Any]]:
        return [
            {
                "shape": "s",
                "clients": clients,
                "who": who,
                "tokens_per_s": rate,
                "first_token_s": first,
                "is_disturbed": False,
            }
            for clients in (8, 32)
            for rate in rates
        ]

    found = [
        *rows("hanok", (30.0, 32.0), 1.0),
        *rows("llama.cpp", (20.0, 16.0), 1.25),
        *rows("transformers", (7.0,), 9.0),
        *rows("hanok's engine alone", (31.0, 33.0), 0.9),
    ]
    found.append({"shape": "s", "clients": 8, "who": "other", "failed": "it broke"})
    text, demands = importlib.import_module("serving_report").throughput_report(found)
    assert "s, 8 clients: llama.cpp" in text
    assert text.endswith("s, 8 clients: other gave none: it broke")
    met = {row[0]: row[1:] for row in demands}
    assert met["s, 8 clients: throughput, of that of llama.cpp"] == [
        "1.72 (1.50–2.00)",
        "≥ 1.5",
        "yes",
    ]
    assert met["s, 32 clients: throughput, of that of transformers"][-1] == "no"
    assert met["s, 32 clients: throughput, of that of hanok's engine alone"][-1] == "yes"
    assert met["s, 8 clients: time to first token of llama.cpp's"] == ["0.800", "≤ 0.7", "no"]
