"""A progress bar of bytes on standard error; silent where standard error is not a terminal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Bar(Protocol):
    """Something that counts bytes."""

    def start(self, total: int) -> None:
        """Say how many bytes there are in all."""

    def advance(self, count: int) -> None:
        """Count more bytes."""


class _Silent:
    def start(self, total: int) -> None:
        """Show nothing."""

    def advance(self, count: int) -> None:
        """Show nothing."""


@contextmanager
def bytes_bar(title: str) -> Iterator[Bar]:
    """Show a bar while the block runs; it disappears at the end."""
    if not sys.stderr.isatty():
        yield _Silent()
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as display:
        task = display.add_task(title, total=None)

        class Shown:
            def start(self, total: int) -> None:
                display.update(task, total=total)

            def advance(self, count: int) -> None:
                display.advance(task, count)

        yield Shown()
