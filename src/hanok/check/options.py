"""How a folder is checked. Imports nothing, for the command line lists it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckOptions:
    """How a folder is checked. Fields are options of `hanok check`."""

    values: bool = True
    """Read every weight and look at its values; without it only headers and small files are read."""
    threads: int | None = None
    """Threads that read weights. None: one for each core, 4 at most."""
