"""Where a benchmark meets speculation: can it be measured, how is it asked for, what did it bring."""

from pathlib import Path

from hanok.engine.generate import TokenStream
from hanok.engine.model import Model
from hanok.engine.speculate import Speculation
from hanok.models.config import ModelConfig


def why_not(method: str, draft: Path | None, config: ModelConfig) -> str | None:
    """Return why a method cannot be measured with a model, or None."""
    if method == "draft" and draft is None:
        return "needs a draft model (--draft)"
    return None if method == "off" else config.why_not_truncated()


def asked(method: str, draft: Model | None) -> Speculation | None:
    """Return what `Model.stream` takes for a method, with the draft model where it is that one's."""
    if method == "draft":
        return Speculation(method="draft", draft=draft)
    return Speculation(method="ngram") if method == "ngram" else None


def counts(method: str, stream: TokenStream) -> dict[str, int | None]:
    """Return how many tokens a stream guessed, and how many of them were right; None without."""
    if method == "off":
        return {"proposed": None, "accepted": None}
    found = stream.speculation
    return {"proposed": found.proposed, "accepted": found.accepted}
