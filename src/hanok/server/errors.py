"""Errors on the wire, in the format of the requested path's protocol.

`error` is TGI's message on its routes, and OpenAI's object on /v1; `error_type` is TGI's on both.
Anthropic's routes have a shape and statuses of their own.
"""

from collections.abc import Mapping
from typing import Any

from hanok.engine.grammar_spec import GrammarError
from hanok.errors import HanokError

# OpenAI's types by status; its clients choose their exception by the status alone.
OPENAI_TYPES: Mapping[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    414: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
}

LONGEST = 4000
"""Most characters of a message."""
ANTHROPIC_STATUSES: Mapping[int, int] = {408: 504, 422: 400, 424: 500, 429: 529}
"""Anthropic's statuses by ours, where they differ: its 429 means that the client's rate is too high."""
ANTHROPIC_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}
"""Anthropic's types by its status; any other status is an invalid request."""


class ServerError(HanokError):
    """A request that is answered with an error.

    `kind` is TGI's error_type; `parameter` names the wrong field of the body, if it is one.
    """

    def __init__(
        self,
        message: str,
        *,
        kind: str = "validation",
        status: int = 422,
        parameter: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.status = status
        self.parameter = parameter
        self.code = code
        self.headers = dict(headers or {})


def invalid(message: str, parameter: str | None = None) -> ServerError:
    """Return the error of an invalid request, in TGI's words."""
    return ServerError(f"Input validation error: {message}", parameter=parameter)


class ContextExceededError(ServerError):
    """A request that is longer than the context."""

    num_prompt = 0
    """Tokens of the prompt, or a lower bound if they were not counted."""
    are_counted = True
    max_input = 0
    """Tokens that a prompt may have."""


def context_exceeded(
    num_prompt: int,
    num_asked: int,
    *,
    max_input: int,
    max_total: int,
    parameter: str,
    are_counted: bool = True,
) -> ContextExceededError:
    """Return the error of a request that is longer than the context.

    If the prompt's tokens were not counted, the lower bound is given.

    Clients that fall back to a summary or a larger model recognize it by its message: litellm by the
    first words, langchain-openai by the code, which it looks for in the message.
    """
    code = "context_length_exceeded"
    limits = f"{max_total} tokens"
    if max_input < max_total - 1:
        limits += f", at most {max_input} of them in the {parameter}"
    more = "" if are_counted else ", or more"
    error = ContextExceededError(
        f"This model's maximum context length is {limits}. However, you requested "
        f"{num_prompt + num_asked} tokens ({num_prompt} in the {parameter}, {num_asked} in the "
        f"completion){more}. Shorten the {parameter}, or ask for fewer tokens ({code}).",
        status=400,
        parameter=parameter,
        code=code,
    )
    error.num_prompt, error.max_input, error.are_counted = num_prompt, max_input, are_counted
    return error


def overloaded(retry_after_s: float) -> ServerError:
    """Return the error of a request for which there is no room now."""
    seconds = max(1, round(retry_after_s))
    return ServerError(
        "Model is overloaded",
        kind="overloaded",
        status=429,
        code="overloaded",
        headers={"Retry-After": str(seconds)},
    )


def as_server_error(error: BaseException) -> ServerError:
    """Return the error as clients see it; of an exception that is not hanok's, only its type."""
    if isinstance(error, ServerError):
        return error
    if not isinstance(error, HanokError):
        return ServerError(
            f"the server failed ({type(error).__name__}); its log has the details",
            kind="internal",
            status=500,
        )
    kinds = {408: "timeout", 424: "generation", 499: "dropped", 503: "overloaded"}
    kind = kinds.get(error.http_status, "validation" if error.http_status < 500 else "internal")
    if kind == "generation":
        return ServerError(f"Request failed during generation: {error}", kind=kind, status=424)
    if isinstance(error, GrammarError):
        return invalid(f"grammar is not valid: {error}", error.pointer)
    if kind == "validation":
        return ServerError(f"Input validation error: {error}", status=422)
    status = 500 if kind == "internal" else error.http_status
    return ServerError(str(error), kind=kind, status=status)


def flat_body(error: ServerError) -> dict[str, Any]:
    """Return an error as TGI writes it."""
    return {"error": _told(error), "error_type": error.kind}


def openai_body(error: ServerError) -> dict[str, Any]:
    """Return an error as OpenAI writes it, with TGI's `error_type` added."""
    return {
        "error": {
            "message": _told(error),
            "type": OPENAI_TYPES.get(error.status, "server_error"),
            "param": error.parameter,
            "code": error.code,
            "http_status_code": error.status,
        },
        "error_type": error.kind,
    }


def _told(error: ServerError) -> str:
    """Return an error's message, shortened where it quotes a long request."""
    text = str(error)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text):,} characters)"


def is_anthropic(path: str) -> bool:
    """Return whether a path is of Anthropic's protocol."""
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def anthropic_body(error: ServerError) -> dict[str, Any]:
    """Return an error as Anthropic writes it."""
    message = _told(error)
    if isinstance(error, ContextExceededError):  # the words by which its clients recognize it
        message = f"prompt is too long: {error.num_prompt} tokens > {error.max_input} maximum"
        message += "" if error.are_counted else " (there may be more)"
    kind = ANTHROPIC_TYPES.get(status_on(error.status, "/v1/messages"), "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


def status_on(status: int, path: str) -> int:
    """Return the status of a path's protocol for one of ours."""
    return ANTHROPIC_STATUSES.get(status, status) if is_anthropic(path) else status


def body_on(error: ServerError, path: str) -> dict[str, Any]:
    """Return an error in the shape of a path's protocol."""
    if is_anthropic(path):
        return anthropic_body(error)
    return openai_body(error) if path.startswith("/v1/") else flat_body(error)
