"""Where a benchmark meets speculation: whether it can be measured, and how it is asked for."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MODULE = "hanok.engine.speculate"


def why_not(method: str, draft: Path | None) -> str | None:
    """Return why a method cannot be measured, or None."""
    if method == "off":
        return None
    if find_spec(MODULE) is None:
        return "this version of hanok does not speculate"
    if method == "draft" and draft is None:
        return "needs a draft model (--draft)"
    return None


def arguments(method: str, draft: Any) -> dict[str, Any]:
    """Return what `Model.stream` takes for a method, with the loaded draft model where it needs one."""
    if method == "off":
        return {}
    return {"speculation": import_module(MODULE).Speculation(method=method, draft=draft)}


def counts(method: str, stream: Any) -> dict[str, int | None]:
    """Return how many tokens a stream guessed, and how many of them were right; None without."""
    if method == "off":
        return {"proposed": None, "accepted": None}
    return {"proposed": stream.speculation.proposed, "accepted": stream.speculation.accepted}
