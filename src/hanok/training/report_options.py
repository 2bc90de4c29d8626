"""Every option of what is seen of a training, for Python and the command line. Imports no torch."""

from dataclasses import dataclass

from hanok.errors import OptionError
from hanok.registry import nearest_first

TENSORBOARD = "tensorboard"
TARGETS = (TENSORBOARD,)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportOptions:
    """What is seen of a training besides its log. Raises OptionError for a value that cannot be."""

    samples: tuple[str, ...] = ()
    """A prompt whose likeliest continuation is shown before the first step, at those that eval_steps
    names and after the last; as a question where the data is conversations. Repeatable."""
    sample_tokens: int = 64
    """Tokens of such a continuation at the most."""
    report_to: tuple[str, ...] = ()
    """Where else the log's numbers are written: tensorboard, as event files in the output folder.
    Repeatable."""

    def __post_init__(self) -> None:
        if self.sample_tokens < 1:
            raise OptionError(f"sample_tokens is {self.sample_tokens}; it must be at least 1.")
        for name in self.report_to:
            if name not in TARGETS:
                known = ", ".join(nearest_first(name, list(TARGETS)))
                raise OptionError(f"report_to: {name!r} is unknown. Known: {known}.")
