"""OpenAI's parameters as the engine's, and where each value comes from."""

from typing import Any, Literal

from hanok.engine.params import SamplingOptions, SamplingParams
from hanok.server.errors import ServerError, invalid
from hanok.server.openai_models import NOT_SERVED, ChatRequest, Sampling
from hanok.server.options import ServerOptions
from hanok.server.service import Service

DRAWING = ("top_k", "top_p", "min_p", "typical_p")
"""Options of sampling, without effect at temperature 0."""

MOST_STOPS = 64
"""Stop texts on OpenAI's routes, where editors send a dozen; OpenAI itself takes 4."""
PENALTIES: tuple[Literal["repetition_penalty", "presence_penalty", "frequency_penalty"], ...] = (
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


def check(asked: Sampling, options: ServerOptions) -> None:
    """Raise ServerError for values beyond the server's limits, and for unsupported fields."""
    for name, value in (asked.model_extra or {}).items():
        if name in NOT_SERVED and value is not None and value not in NOT_SERVED[name]:
            raise invalid(f"`{name}` is not supported: leave it out", name)
    if (asked.n or 1) > options.max_choices:
        raise invalid(f"`n` must be <= {options.max_choices}. Given: {asked.n}", "n")
    most = max(MOST_STOPS, options.max_stop_sequences)
    if len(asked.stop) > most:
        raise invalid(
            f"`stop` supports up to {most} stop sequences. Given: {len(asked.stop)}", "stop"
        )
    if isinstance(asked, ChatRequest) and asked.add_special_tokens:
        raise invalid(
            "`add_special_tokens` is not supported: a chat's template writes them. Leave it out",
            "add_special_tokens",
        )
    if asked.stream and asked.prompt_logprobs is not None:
        raise invalid("`prompt_logprobs` is not supported when streaming", "prompt_logprobs")
    if not all(asked.stop):
        raise invalid("`stop` sequences cannot be empty", "stop")


def check_model(name: str | None, service: Service) -> str | None:
    """Return the adapter that a request names as its model; None: the model itself.

    Raises ServerError for one that is not served; no other one replaces it.

    Clients written for TGI call the model "tgi", huggingface_hub's "dummy", and @huggingface/inference
    sends the server's address as its name.
    """
    if _is_base(name, service):
        return None
    if name not in service.adapter_names:
        raise unknown_model(str(name), service)
    return name


def answering(name: str | None, service: Service) -> str:
    """Return what an answer calls the model: its first name, or the adapter that was asked for.

    One that was unloaded meanwhile keeps its name.
    """
    return service.options.model_id if _is_base(name, service) else str(name)


def _is_base(name: str | None, service: Service) -> bool:
    if name in (None, "", "tgi", "dummy", *service.options.model_names):
        return True
    return str(name).startswith(("http://", "https://"))


def unknown_model(name: str, service: Service) -> ServerError:
    """Return the error of a model that is not served."""
    served = ", ".join(map(repr, (*service.options.model_names, *service.adapter_names)))
    return ServerError(
        f"the model {name!r} does not exist; this server has {served}",
        kind="model_not_found",
        status=404,
        parameter="model",
        code="model_not_found",
    )


def sampling_options(
    asked: Sampling, defaults: SamplingParams, max_new_tokens: int
) -> SamplingOptions:
    """Return a request's parameters as the engine's.

    Defaults come from the checkpoint if it recommends sampling, else from OpenAI's protocol, which
    samples at temperature 1. Log-probabilities are the model's own.
    """
    temperature = asked.temperature
    if temperature is None:
        temperature = defaults.temperature or 1.0
    found: SamplingOptions = {
        "max_new_tokens": max_new_tokens,
        "temperature": max(temperature, 1e-6) if temperature else 0.0,
        "logit_bias": {int(token): bias for token, bias in (asked.logit_bias or {}).items()},
        "seed": asked.seed,
        "ignore_eos": asked.ignore_eos,
        "min_new_tokens": asked.min_tokens or 0,
        "include_stop": asked.include_stop_str_in_output,
    }
    for penalty in PENALTIES:
        if getattr(asked, penalty) is not None:
            found[penalty] = getattr(asked, penalty)
    if asked.stop:
        found["stop"] = asked.stop
    if asked.stop_token_ids:
        found["stop_token_ids"] = asked.stop_token_ids
    if temperature:
        given: dict[str, Any] = {name: getattr(asked, name) for name in DRAWING}
        if defaults.temperature == 0:  # the checkpoint's sampling options do not apply
            given = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0} | {
                name: value for name, value in given.items() if value is not None
            }
        for name, value in given.items():
            if value is not None:
                found[name] = value  # type: ignore[literal-required]  # a key of it
    return found


def origins(
    asked: Sampling, params: SamplingParams, defaults: SamplingParams
) -> dict[str, dict[str, Any]]:
    """Return every effective parameter with its value and where it comes from."""
    spellings = {
        "max_new_tokens": ("max_tokens", "max_completion_tokens"),
        "min_new_tokens": ("min_tokens",),
        "include_stop": ("include_stop_str_in_output",),
        "top_logprobs": ("logprobs", "top_logprobs"),
    }
    found = {}
    for name in SamplingParams.__dataclass_fields__:
        value = getattr(params, name)
        names = spellings.get(name, (name,))
        if any(getattr(asked, item, None) not in (None, [], {}, False) for item in names):
            origin = "request"
        elif value == getattr(SamplingParams(), name):
            origin = "default"
        elif value == getattr(defaults, name):
            origin = "generation_config.json"
        else:
            origin = "protocol"
        found[name] = {"value": value, "origin": origin}
    return found
