"""How far two models agree: on the distribution of each next token of a text, and on what they write."""

from dataclasses import dataclass

from hanok.engine.model import Model

WINDOW = 256  # tokens of a text that are looked at


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Of a model with another one, which is right by definition."""

    kl_mean: float
    """Mean divergence of the next token's distribution from the other's, in nats."""
    same_top: float
    """Share of positions at which both find the same token likeliest."""
    greedy_tokens: int
    """How many tokens both write alike after a prompt, likeliest ones, until the first that differs."""
    num_greedy: int
    """Of so many."""


def agreement(reference: Model, other: Model, text: str, *, num_greedy: int = 64) -> Agreement:
    """Compare two models of one vocabulary on a text's first tokens, and after its first sixteen."""
    tokens = reference.encode(text[: 2 * WINDOW])[:WINDOW]
    expected, found = (model.logits(tokens).log_softmax(-1) for model in (reference, other))
    divergence = (expected.exp() * (expected - found)).sum(-1)
    written = [
        model.generate(tokens[:16], max_new_tokens=num_greedy, temperature=0.0, ignore_eos=True)
        for model in (reference, other)
    ]
    pairs = list(zip(written[0].token_ids, written[1].token_ids, strict=True))
    same = next((index for index, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return Agreement(
        kl_mean=float(divergence.mean()),
        same_top=float((expected.argmax(-1) == found.argmax(-1)).float().mean()),
        greedy_tokens=same,
        num_greedy=len(pairs),
    )
