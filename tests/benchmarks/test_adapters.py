"""benchmarks/adapters.py on the bundled model: what it compares and says, whatever the speed."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_sequences_with_adapters_are_compared_with_as_many_without(tmp_path: Path) -> None:
    report = tmp_path / "report.md"
    command = [sys.executable, str(BENCHMARKS / "adapters.py"), "--shape", "bundled"]
    command += ["--runs", "2", "--new-tokens", "6", "--sequences", "3", "--adapters", "2"]
    command += ["--folder", str(tmp_path), "--output", str(report), "--threads", "1"]
    command += ["--patience", "0", "--foreign", "1e9"]
    subprocess.run(command, check=True, capture_output=True)
    text = report.read_text(encoding="utf-8")
    assert "| with / without" in text
    assert "among the others and alone: the same." in text
    lines = [json.loads(line) for line in report.with_suffix(".jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == [
        *("3 without adapters", "3 with 2 adapters"),
        *("3 with 2 adapters", "3 without adapters"),
    ]
    assert all(line["tokens_per_s"] > 0 for line in lines)
