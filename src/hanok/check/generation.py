"""generation_config.json: options that contradict each other, or that no reader can follow.

What counts as a conflict is what transformers' `GenerationConfig.validate` refuses or warns of. Imports
no torch.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from hanok.check.finding import Finding
from hanok.engine.params import SamplingParams
from hanok.errors import OptionError

FILE = "generation_config.json"
NEUTRAL_WHEN_GREEDY: Mapping[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "top_k": 50,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
"""Options that only sampling reads, with the values that every file may have."""
NEUTRAL_WITHOUT_BEAMS: Mapping[str, Any] = {"early_stopping": False, "length_penalty": 1.0}
RANGES = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")


def generation_findings(values: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield the conflicts of a generation_config.json."""
    samples = values.get("do_sample") is True
    if values.get("do_sample") not in (None, True, False):
        yield _conflict("error", f"do_sample is {values['do_sample']!r}", "write true or false")
    idle = _others(values, NEUTRAL_WHEN_GREEDY)
    if idle and not samples:
        said = "false" if values.get("do_sample") is False else "not set"
        yield _conflict(
            "warning",
            f"do_sample is {said}, so {idle} {'has' if ',' not in idle else 'have'} no effect",
            "write do_sample: true to sample with it, or remove it",
        )
    if (values.get("num_beams") or 1) == 1 and (beams := _others(values, NEUTRAL_WITHOUT_BEAMS)):
        yield _conflict(
            "warning", f"without num_beams, {beams} has no effect", "remove it, or write num_beams"
        )
    yield from _impossible(values, samples=samples)


def _impossible(values: Mapping[str, Any], *, samples: bool) -> Iterator[Finding]:
    for name in RANGES:
        value = values.get(name)
        if value is None or (name == "temperature" and value == 0 and not samples):
            continue
        try:
            SamplingParams(temperature=1.0).updated({name: value})
        except OptionError as error:
            yield _conflict("error", str(error), "correct it, or remove the key")
    if samples and values.get("temperature") == 0:
        yield _conflict(
            "error",
            "do_sample is true with temperature 0, which transformers refuses",
            "write do_sample: false to take the likeliest token",
        )
    several, beams = values.get("num_return_sequences") or 1, values.get("num_beams") or 1
    is_number = isinstance(several, int) and isinstance(beams, int)
    if is_number and several > beams and not (samples and beams == 1):
        yield _conflict(
            "error",
            f"num_return_sequences is {several} with num_beams {beams}",
            "remove num_return_sequences, or sample without beams",
        )
    most = values.get("max_new_tokens")
    if isinstance(most, int) and most < 1:
        yield _conflict("error", f"max_new_tokens is {most}", "write a number of at least 1")
    least = values.get("min_new_tokens")
    if isinstance(most, int) and isinstance(least, int) and least > most >= 1:
        yield _conflict(
            "error",
            f"min_new_tokens is {least} and max_new_tokens {most}",
            "make the first one smaller",
        )


def _others(values: Mapping[str, Any], neutral: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} = {values[name]!r}"
        for name, usual in neutral.items()
        if values.get(name) is not None and values[name] != usual
    )


def _conflict(level: Any, what: str, advice: str) -> Finding:
    return Finding(
        level=level, kind="generation-config", where=FILE, what=what.rstrip("."), advice=advice
    )
