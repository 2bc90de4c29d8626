"""Lines of JSON about a training's steps, each step once, however often the training was interrupted.

A line is written when its step is done, before its checkpoint. A training that was killed does the steps
after its last checkpoint again, so their lines are removed when it goes on.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hanok.checkpoint.writer import write_bytes

LOG, SAMPLES = "log.jsonl", "samples.jsonl"


class StepLog:
    """A file of JSON lines with a `step` in each; a context that keeps it open."""

    def __init__(self, path: Path, first_step: int) -> None:
        """Keep the lines up to `first_step`, which were written before; none where it is 0."""
        self.lines: list[dict[str, Any]] = []
        """What the file has, from its first line on."""
        if first_step:
            self.lines = [line for line in read_lines(path) if line["step"] <= first_step]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, b"".join(map(_line, self.lines)))
        self._file = path.open("ab")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def add(self, line: Mapping[str, Any]) -> None:
        """Write a line, at once."""
        self.lines.append(dict(line))
        self._file.write(_line(line))
        self._file.flush()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log; the last one may have been cut off, and is left out then."""
    found: list[dict[str, Any]] = []
    if not path.is_file():
        return found
    for text in path.read_bytes().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            found.append(line)
    return found


def _line(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"
