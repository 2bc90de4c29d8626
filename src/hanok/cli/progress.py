"""Progress bars of bytes and of seconds on standard error; silent where it is not a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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


@contextmanager
def bytes_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Show one bar after another; yields what is called with a title, bytes done and those of all."""
    with ExitStack() as stack:
        shown, before = "", 0
        bar: Bar = _Silent()

        def show(title: str, done: int, total: int) -> None:
            nonlocal bar, shown, before
            if title != shown:
                stack.close()
                bar = stack.enter_context(bytes_bar(title))
                bar.start(total)
                shown, before = title, 0
            bar.advance(done - before)
            before = done

        yield show


@contextmanager
def seconds_bar(title: str) -> Iterator[Callable[[str, float, float | None], None]]:
    """Show what is done, how far that is and how long the rest takes; it disappears at the end.

    Yields what is called with a text, the seconds done, and those of all as far as they are known.
    """
    if not sys.stderr.isatty():
        yield lambda what, done_s, whole_s: None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TextColumn("{task.fields[left]}"),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as display:
        task = display.add_task(title, total=None, left="")

        def show(what: str, done_s: float, whole_s: float | None) -> None:
            left = "" if whole_s is None else f"about {max(0.0, whole_s - done_s):.0f} s left"
            display.update(
                task, description=f"{title}, {what}", completed=done_s, total=whole_s, left=left
            )

        yield show
