"""Whether two checkpoints give the same logits, bit for bit."""

from pathlib import Path

import torch

from hanok.engine.model import load
from hanok.errors import CheckpointError

PROMPT_TOKENS = 32


def compare_logits(before: Path, after: Path, num_tokens: int) -> None:
    """Raise CheckpointError unless two checkpoints give old tokens the same logits, bit for bit.

    On a prompt of tokens that are spread over the first `num_tokens`; both are loaded, in turn.
    """
    prompt = [index * (num_tokens - 1) // (PROMPT_TOKENS - 1) for index in range(PROMPT_TOKENS)]
    found = [
        load(path, weights="mapped").logits(prompt)[:, :num_tokens] for path in (before, after)
    ]
    if not torch.equal(found[0], found[1]):
        most = float((found[0] - found[1]).abs().max())
        raise CheckpointError(
            f"{before}: logits of old tokens differ by up to {most:.3g} after the edit. Nothing was "
            "changed."
        )
