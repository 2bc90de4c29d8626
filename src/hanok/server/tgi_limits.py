"""TGI's rules for a request's parameters, with its messages, and what they mean for hanok."""

import json
from collections.abc import Callable
from typing import Any

from hanok.engine.grammar_spec import MAX_BYTES, GrammarSpec
from hanok.engine.params import SamplingOptions
from hanok.server.errors import invalid
from hanok.server.options import ServerOptions
from hanok.server.tgi_models import Grammar, Parameters


def check(asked: Parameters, options: ServerOptions, *, max_input: int, streams: bool) -> None:
    """Raise ServerError for the first parameter out of its range."""
    for parameter, is_wrong, message in _rules(asked, options, max_input, streams=streams):
        if is_wrong:
            raise invalid(message, parameter)


def _rules(
    asked: Parameters, options: ServerOptions, max_input: int, *, streams: bool
) -> list[tuple[str, bool, str]]:
    best_of, most = asked.best_of, options.max_best_of
    several = best_of is not None and best_of != 1
    top_n = asked.top_n_tokens
    return [
        (
            "best_of",
            several and most == 1,
            "`best_of` != 1 is not allowed for this endpoint",
        ),
        (
            "best_of",
            best_of is not None and not 1 <= best_of <= most,
            f"`best_of` must be > 0 and <= {most}. Given: {best_of}",
        ),
        (
            "best_of",
            several and not samples(asked),
            "you must use sampling when `best_of` is > 1",
        ),
        (
            "seed",
            several and asked.seed is not None,
            "`seed` must not be set when `best_of` > 1",
        ),
        (
            "best_of",
            several and streams,
            "`best_of` != 1 is not supported when streaming tokens",
        ),
        (
            "top_n_tokens",
            bool(top_n) and options.max_top_n_tokens == 0,
            "`top_n_tokens` != 0 is not allowed for this endpoint",
        ),
        (
            "top_n_tokens",
            top_n is not None and not 0 <= top_n <= options.max_top_n_tokens,
            f"`top_n_tokens` must be >= 0 and <= {options.max_top_n_tokens}. Given: {top_n}",
        ),
        (
            "decoder_input_details",
            asked.decoder_input_details and streams,
            "`decoder_input_details` == true is not supported when streaming tokens",
        ),
        *_range_rules(asked),
        (
            "truncate",
            asked.truncate is not None and not 0 < asked.truncate <= max_input,
            f"`truncate` must be strictly positive and less than {max_input}. "
            f"Given: {asked.truncate}",
        ),
        (
            "stop",
            len(asked.stop) > options.max_stop_sequences,
            f"`stop` supports up to {options.max_stop_sequences} stop sequences. "
            f"Given: {len(asked.stop)}",
        ),
        (
            "stop",
            not all(asked.stop),
            "`stop` sequences cannot be empty",
        ),
    ]


def _range_rules(asked: Parameters) -> list[tuple[str, bool, str]]:
    def is_off(value: float | None, is_right: Callable[[float], bool]) -> bool:
        return value is not None and not is_right(value)

    return [
        (
            "temperature",
            is_off(asked.temperature, lambda x: x > 0),
            "`temperature` must be strictly positive",
        ),
        (
            "repetition_penalty",
            is_off(asked.repetition_penalty, lambda x: x > 0),
            "`repetition_penalty` must be strictly positive",
        ),
        (
            "frequency_penalty",
            is_off(asked.frequency_penalty, lambda x: -2 <= x <= 2),
            "`frequency_penalty` must be >= -2.0 and <= 2.0",
        ),
        (
            "presence_penalty",
            is_off(asked.presence_penalty, lambda x: -2 <= x <= 2),
            "`presence_penalty` must be >= -2.0 and <= 2.0",
        ),
        (  # 1.0 means "no restriction": TGI refuses it, but clients send it
            "top_p",
            is_off(asked.top_p, lambda x: 0 < x <= 1),
            "`top_p` must be > 0.0 and < 1.0",
        ),
        (
            "top_k",
            is_off(asked.top_k, lambda x: x > 0),
            "`top_k` must be strictly positive",
        ),
        (
            "typical_p",
            is_off(asked.typical_p, lambda x: 0 < x <= 1),
            "`typical_p` must be > 0.0 and < 1.0",
        ),
        (
            "min_p",
            is_off(asked.min_p, lambda x: 0 <= x <= 1),
            "`min_p` must be >= 0.0 and <= 1.0",
        ),
        (
            "max_new_tokens",
            is_off(asked.max_new_tokens, lambda x: x > 0),
            "`max_new_tokens` must be strictly positive",
        ),
    ]


def check_lengths(
    asked: Parameters, num_inputs: int, *, max_input: int, max_total: int, are_counted: bool = True
) -> int:
    """Return how many tokens to generate at the most. Raises ServerError for lengths beyond limits.

    If the tokens were not counted, `num_inputs` is a lower bound.
    """
    given = f"{num_inputs}" if are_counted else f"{num_inputs} or more"
    wanted = asked.max_new_tokens
    if wanted is not None and wanted > max_total:
        raise invalid(f"`max_new_tokens` must be <= {max_total}. Given: {wanted}", "max_new_tokens")
    if wanted is not None and num_inputs + wanted > max_total:
        raise invalid(
            f"`inputs` tokens + `max_new_tokens` must be <= {max_total}. Given: {given} "
            f"`inputs` tokens and {wanted} `max_new_tokens`",
            "max_new_tokens",
        )
    if num_inputs > max_input:
        raise invalid(f"`inputs` must have less than {max_input} tokens. Given: {given}", "inputs")
    return max_total - num_inputs if wanted is None else wanted


def samples(asked: Parameters) -> bool:
    """Return whether tokens are sampled instead of taking the likeliest."""
    given = (asked.temperature, asked.top_k, asked.top_p, asked.typical_p)
    return asked.do_sample or any(value is not None for value in given)


def sampling_options(
    asked: Parameters, options: ServerOptions, max_new_tokens: int, *, includes_stop: bool
) -> SamplingOptions:
    """Return a request's parameters as the engine's. Log-probabilities are those sampled from."""
    found: SamplingOptions = {
        "max_new_tokens": max_new_tokens,
        "temperature": 0.0,
        "repetition_penalty": asked.repetition_penalty or 1.0,
        "frequency_penalty": asked.frequency_penalty or 0.0,
        "presence_penalty": asked.presence_penalty or 0.0,
        "stop": asked.stop,
        "seed": asked.seed,
        "top_logprobs": asked.top_n_tokens or 0,
        "min_new_tokens": asked.min_tokens or 0,
        "ignore_eos": asked.ignore_eos,
        "include_stop": includes_stop
        if asked.include_stop_str_in_output is None
        else asked.include_stop_str_in_output,
        "model_logprobs": False,
    }
    if samples(asked):
        found["temperature"] = max(asked.temperature or 1.0, 1e-6)
        found["top_k"] = asked.top_k or 0
        found["top_p"] = asked.top_p or 1.0
        found["typical_p"] = asked.typical_p or 1.0
        found["min_p"] = asked.min_p or 0.0
    if asked.watermark:
        found["watermark_gamma"] = options.watermark_gamma
        found["watermark_delta"] = options.watermark_delta
    return found


def grammar_of(grammar: Grammar | None) -> GrammarSpec | None:
    """Return the constraint on an answer. ServerError for a value that does not match its type."""
    if grammar is None:
        return None
    value: Any = grammar.value
    if grammar.type == "regex":
        if not isinstance(value, str):
            raise invalid("grammar is not valid: the value of a regex must be a string", "grammar")
        return GrammarSpec("regex", value)
    if grammar.type == "json_schema" and isinstance(value, dict) and "schema" in value:
        value = value["schema"]
    if grammar.type == "json_object" and value is None:
        return GrammarSpec("json_object", "{}")
    return GrammarSpec("json_schema", _schema_text(value))


def _schema_text(value: Any) -> str:
    """Return a schema's JSON text. One with properties and no type describes an object, as in TGI.

    JSON Schema itself would let any string or number pass.
    """
    schema = value
    if isinstance(value, str):
        if len(value) > MAX_BYTES:
            return value  # too large to inspect; the compiler reports it
        try:
            schema = json.loads(value)
        except (ValueError, RecursionError):
            return value  # the compiler reports what is wrong
    if isinstance(schema, dict) and "properties" in schema and "type" not in schema:
        return json.dumps({**schema, "type": "object"})
    return value if isinstance(value, str) else json.dumps(value)
