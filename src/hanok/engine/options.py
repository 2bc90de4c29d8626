"""Every option of an engine, once. Imports no torch."""

from dataclasses import dataclass

from hanok.errors import OptionError

MAX_RUNNING = 64
MAX_STEP_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How the engine of a server is made. Raises OptionError for a value that none could have."""

    users: int | None = None
    """Requests of the full context to have memory for. None: what fits, at most 64."""
    max_running: int = MAX_RUNNING
    """Requests computed at a time."""
    max_step_s: float = MAX_STEP_S
    """Seconds that a step with a part of a prompt should take, while others wait for a token."""

    def __post_init__(self) -> None:
        for name in ("users", "max_running"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name} is {value}; it must be at least 1.")
        if not self.max_step_s > 0:
            raise OptionError(f"max_step_s is {self.max_step_s}; it must be above 0.")
