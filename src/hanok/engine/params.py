"""How one sequence is continued: the options, their ranges, and a checkpoint's own defaults.

Imports no torch, so that the command line can list the options with their help.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from hashlib import sha256
from typing import Any, TypedDict, TypeGuard

from hanok.errors import OptionError
from hanok.registry import nearest_first

# What a checkpoint's generation_config.json decides: always, and only where it says `do_sample`.
ALWAYS_READ = ("repetition_penalty", "presence_penalty", "frequency_penalty", "max_new_tokens")
READ_WHEN_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")
GENERATION_CONFIG_FIELDS = ALWAYS_READ + READ_WHEN_SAMPLING
STOP_STRINGS = "stop_strings"
"""The file's name for `stop`."""

# What a generation_config.json may ask for and hanok does not do, with the values that ask for nothing.
NEUTRAL: Mapping[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "min_length": 0,
    "max_length": 20,  # transformers' default, in every file that was written whole
    "min_new_tokens": 0,
    "penalty_alpha": 0.0,
    "guidance_scale": 1.0,
    "bad_words_ids": (),
    "force_words_ids": (),
    "sequence_bias": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "forced_bos_token_id": 0,
    "forced_eos_token_id": 0,
    "forced_decoder_ids": (),
    "exponential_decay_length_penalty": (),
    "constraints": (),
    "watermarking_config": (),
    "diversity_penalty": 0.0,
    "top_h": 1.0,
    "token_healing": False,
    "dola_layers": "",
    "max_time": 0,
    "num_return_sequences": 1,
}


class SamplingOptions(TypedDict, total=False):
    """The keyword arguments of `generate` and `stream`; see `SamplingParams` for each."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    top_logprobs: int
    min_new_tokens: int
    include_stop: bool
    model_logprobs: bool
    watermark_gamma: float
    watermark_delta: float
    spelled_token_ids: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one sequence is continued. The defaults are greedy: the likeliest token each time."""

    max_new_tokens: int = 256
    """Tokens to generate at the most; the model's context may end it earlier."""
    temperature: float = 0.0
    """Divides the scores; 0 takes the likeliest token, 1 draws from the model's distribution."""
    top_k: int = 0
    """Draw among so many likeliest tokens; 0 or -1: all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability; 0: the likeliest alone."""
    min_p: float = 0.0
    """Draw among tokens at least this fraction as likely as the likeliest."""
    typical_p: float = 1.0
    """Draw among the tokens of most typical surprise with this probability (arXiv 2202.00666)."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative scores of tokens already seen, the prompt's too."""
    presence_penalty: float = 0.0
    """Subtracted from the score of every token generated before."""
    frequency_penalty: float = 0.0
    """Subtracted once for every time the token was generated before."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the scores of these token ids."""
    seed: int | None = None
    """Fixes the draws; without one each run draws anew."""
    stop: tuple[str, ...] = ()
    """Texts that end the generation; they are not part of the answer."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the generation, besides the model's own."""
    ignore_eos: bool = False
    """Go on after the model's end tokens."""
    top_logprobs: int = 0
    """How many of the likeliest tokens to report at each step."""
    min_new_tokens: int = 0
    """Generate no end token before so many others."""
    include_stop: bool = False
    """Let a stop text that ends the generation be part of the answer."""
    model_logprobs: bool = True
    """Report log-probabilities as the model gives them, not after the options above."""
    watermark_gamma: float = 0.5
    """Share of the vocabulary that a watermark prefers at each step (arXiv 2301.10226)."""
    watermark_delta: float = 0.0
    """Added to the scores of preferred tokens; 0: no watermark."""
    spelled_token_ids: tuple[int, ...] = ()
    """Special token ids that are spelled out in the text, unless they end it; others are left out."""

    def __post_init__(self) -> None:
        self._check("max_new_tokens", self.max_new_tokens >= 1, "at least 1")
        # Smaller ones overflow float32 scores and draw as 0 takes.
        is_temperature = self.temperature == 0 or 1e-6 <= self.temperature < float("inf")
        self._check("temperature", is_temperature, "0, or from 1e-6 on")
        self._check("top_k", self.top_k >= -1, "0 or -1 (all), or more")
        self._check("top_p", 0 <= self.top_p <= 1, "between 0 and 1")
        self._check("min_p", 0 <= self.min_p <= 1, "between 0 and 1")
        self._check("typical_p", 0 < self.typical_p <= 1, "above 0 and at most 1")
        is_penalty = 0 < self.repetition_penalty < float("inf")
        self._check("repetition_penalty", is_penalty, "above 0 and finite")
        self._check("presence_penalty", -100 <= self.presence_penalty <= 100, "-100 to 100")
        self._check("frequency_penalty", -100 <= self.frequency_penalty <= 100, "-100 to 100")
        are_biases = all(bias < float("inf") for bias in self.logit_bias.values())
        self._check("logit_bias", are_biases, "numbers below infinity for each token id")
        # What torch's generators take.
        is_seed = self.seed is None or -(2**63) <= self.seed < 2**64
        self._check("seed", is_seed, "None or -2**63 to 2**64 - 1")
        self._check("stop", all(self.stop), "texts that are not empty")
        self._check("min_new_tokens", self.min_new_tokens >= 0, "0 or more")
        self._check("watermark_gamma", 0 < self.watermark_gamma < 1, "between 0 and 1")
        self._check("watermark_delta", 0 <= self.watermark_delta <= 100, "0 (none) to 100")
        self._check("top_logprobs", 0 <= self.top_logprobs <= 1000, "0 to 1000")

    def check_ids(self, vocab_size: int) -> None:
        """Raise OptionError where an option names a token that a vocabulary of this size lacks."""
        for name in ("logit_bias", "stop_token_ids", "spelled_token_ids"):
            wrong = [token for token in getattr(self, name) if not is_token(token, vocab_size)]
            if wrong:
                raise OptionError(
                    f"{name} names token {wrong[0]}; this model's tokens are 0 to {vocab_size - 1}."
                )

    def _check(self, name: str, is_right: bool, expected: str) -> None:
        if not is_right:
            raise OptionError(f"{name} is {getattr(self, name)!r}; it must be {expected}.")

    def updated(self, options: Mapping[str, Any]) -> "SamplingParams":
        """Return these parameters with some changed.

        Raises OptionError for an unknown name, a wrong type or range, and for options that only make
        sense when drawing while the temperature is 0.
        """
        known = [item.name for item in fields(self)]
        for name, value in options.items():
            if name not in known:
                guess = nearest_first(name, known)[0]
                raise OptionError(f"there is no option {name!r}; did you mean {guess!r}?")
            if not _is_like(value, getattr(self, name), name):
                raise OptionError(f"{name} is {value!r}, which is not of the right type.")
        values = dict(options)
        for name in ("stop", "stop_token_ids", "spelled_token_ids"):
            if name in values:
                given = values[name]
                values[name] = (given,) if isinstance(given, str | int) else tuple(given)
        changed = replace(self, **values)
        if changed.temperature == 0:
            idle = [name for name in ("top_k", "top_p", "min_p", "typical_p") if name in options]
            if idle:
                raise OptionError(
                    f"{', '.join(idle)} given, but the temperature is 0, which always takes the "
                    "likeliest token. Give a temperature above 0 as well."
                )
        return changed


def seed_of_answer(seed: int | None, index: int) -> int | None:
    """Return the seed of one of several answers to a prompt; the first has the seed itself.

    The others' depend on nothing else, and are not those of neighbouring seeds.
    """
    if seed is None or index == 0:
        return seed
    digest = sha256(f"{seed} {index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def from_generation_config(values: Mapping[str, Any]) -> SamplingParams:
    """Return the defaults that a checkpoint's generation_config.json recommends.

    Without `do_sample` they are greedy, whatever temperature the file names, as in transformers. What
    cannot be is left out (`unsupported_defaults` says so): the user's own value counts then.
    """
    base = {"temperature": 1.0} if _samples(values) else {}
    found = {
        name: value for name, value in _recommended(values).items() if not _objection(name, value)
    }
    return SamplingParams().updated(base | found)


def unsupported_defaults(values: Mapping[str, Any], max_context_tokens: int) -> tuple[str, ...]:
    """Return a note for each recommendation of a generation_config.json that is not followed."""
    asked = {name: values[name] for name in NEUTRAL if values.get(name)}
    length = asked.get("max_length", 0)
    if _is_number(length, int) and length >= max_context_tokens:
        del asked["max_length"]  # the context ends a text as well
    notes = [
        f"generation_config.json asks for {name} = {value!r}, which hanok does not do"
        for name, value in asked.items()
        if value != NEUTRAL[name]
    ]
    if values.get("do_sample") not in (None, True, False):
        notes.append(
            "generation_config.json is not followed in one point: do_sample is "
            f"{values['do_sample']!r}; it must be true or false. The likeliest token is taken."
        )
    for name, value in _recommended(values).items():
        if objection := _objection(name, value):
            notes.append(f"generation_config.json is not followed in one point: {objection}")
    return tuple(notes)


def _samples(values: Mapping[str, Any]) -> bool:
    asks = values.get("do_sample")  # 1 as well as true, no text
    return not isinstance(asks, str) and asks == 1 and values.get("temperature") != 0


def _recommended(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a generation_config.json says of options that hanok has, right or not."""
    names = GENERATION_CONFIG_FIELDS if _samples(values) else ALWAYS_READ
    found = {name: values[name] for name in names if values.get(name) is not None}
    return found | ({"stop": values[STOP_STRINGS]} if values.get(STOP_STRINGS) else {})


def _objection(name: str, value: Any) -> str:
    """Return what is wrong with the value of an option; "" if nothing is."""
    try:
        SamplingParams(temperature=1.0).updated({name: value})
    except OptionError as error:
        return f"{STOP_STRINGS}: {error}" if name == "stop" else str(error)
    return ""


def end_ids_of(
    files: Mapping[str, Mapping[str, Any]], last: int | None, vocab_size: int
) -> tuple[frozenset[int], tuple[str, ...]]:
    """Return the end tokens of the first file that names any, else `last`, the tokenizer's own.

    With notes of those that a model of `vocab_size` tokens does not have: they are as if not there.
    """
    notes: list[str] = []
    for file, values in files.items():
        given = values.get("eos_token_id")
        listed = given if isinstance(given, list) else [given]
        known = frozenset(token for token in listed if is_token(token, vocab_size))
        notes += (
            f"{file} names {token!r} as an end token, which this model does not have (its tokens are 0 "
            f"to {vocab_size - 1}): it ends nothing"
            for token in listed
            if token is not None and not is_token(token, vocab_size)
        )
        if known or given == []:
            return known, tuple(notes)
    return frozenset([last] if is_token(last, vocab_size) else []), tuple(notes)


def is_token(value: object, vocab_size: int) -> TypeGuard[int]:
    """Return whether a value is a token id of a vocabulary of this size."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size


def _is_like(value: Any, default: Any, name: str) -> bool:
    if name == "seed":
        return value is None or _is_number(value, int)
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, int):
        return _is_number(value, int)
    if isinstance(default, float):
        return _is_number(value, int, float)
    if name == "logit_bias":
        return isinstance(value, Mapping) and all(
            _is_number(token, int) and _is_number(bias, int, float) for token, bias in value.items()
        )
    if name == "stop":  # one text, or several
        return isinstance(value, Sequence) and all(isinstance(item, str) for item in value)
    items = value if isinstance(value, Sequence) else [value]
    return all(_is_number(item, int) for item in items) and not isinstance(value, str)


def _is_number(value: Any, *kinds: type) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)
