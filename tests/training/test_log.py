"""Logs: a step stands once in them, however often a training was killed and gone on with."""

import json
from pathlib import Path

from hanok.training.log import StepLog, read_lines


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_steps_that_were_lost_stand_once(tmp_path: Path) -> None:
    path = tmp_path / "run" / "log.jsonl"
    with StepLog(path, 0) as log:
        for step in range(6):
            log.add({"step": step, "loss": 1.0})
    with StepLog(path, 3) as log:  # the last checkpoint was of step 3
        assert [line["step"] for line in log.lines] == [0, 1, 2, 3]
        log.add({"step": 4, "loss": 0.5})
    assert steps(path) == [0, 1, 2, 3, 4]
    with StepLog(path, 0) as log:  # there was no checkpoint
        log.add({"step": 0})
    assert steps(path) == [0]


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    assert [line["step"] for line in read_lines(path)] == [1]
    with StepLog(path, 2) as log:
        log.add({"step": 3})
    assert steps(path) == [1, 3]
