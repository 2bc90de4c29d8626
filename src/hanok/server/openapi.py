"""The OpenAPI 3.1 document of the routes, made from the bodies and answers that they declare."""

import re
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from hanok.package import __version__
from hanok.server.errors import is_anthropic, status_on
from hanok.server.route import Route
from hanok.server.tgi_models import ErrorResponse

REFERENCE = "#/components/schemas/{model}"
MEANINGS = {
    400: "The body is not JSON",
    401: "The API key is missing or wrong",
    404: "There is no such model or adapter",
    408: "Not finished before its deadline",
    413: "The body is too large",
    415: "The body is not declared as JSON",
    422: "The request is not valid",
    424: "Generation failed",
    429: "There is no room now; Retry-After says when there may be",
    500: "The server failed",
    503: "Not ready",
    504: "Not finished before its deadline",
    529: "There is no room now; Retry-After says when there may be",
}
PARAMETER = re.compile(r"\{(\w+)")
OF_BODIES = (400, 408, 413, 415, 422)


class AnthropicErrorResponse(BaseModel):
    """What went wrong, as Anthropic writes it."""

    type: Literal["error"]
    error: dict[str, str]


class OpenAIErrorResponse(BaseModel):
    """What went wrong, as OpenAI writes it."""

    error: dict[str, Any]
    error_type: str


def document(routes: Iterable[Route], *, has_key: bool) -> dict[str, Any]:
    """Return the document."""
    routes = list(routes)
    inputs = {route.body for route in routes if route.body is not None}
    outputs = {route.answer for route in routes if route.answer is not None}
    found, definitions = models_json_schema(
        [
            *((model, "validation") for model in sorted(inputs, key=lambda m: m.__name__)),
            *((model, "serialization") for model in sorted(outputs, key=lambda m: m.__name__)),
            (ErrorResponse, "serialization"),
            (OpenAIErrorResponse, "serialization"),
            (AnthropicErrorResponse, "serialization"),
        ],
        ref_template=REFERENCE,
    )
    paths: dict[str, Any] = {}
    for route in routes:
        operation = _operation(route, found, has_key=has_key)
        paths.setdefault(route.shown_path, {})[route.method.lower()] = operation
    components: dict[str, Any] = {"schemas": definitions.get("$defs", {})}
    if has_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}} | {
            name: {"type": "apiKey", "in": "header", "name": name}
            for name in sorted({route.key_header for route in routes} - {""})
        }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "hanok",
            "version": __version__,
            "description": "Text generation over TGI's protocol, OpenAI's and Anthropic's.",
        },
        "paths": paths,
        "components": components,
    }


def _operation(route: Route, found: dict[Any, Any], *, has_key: bool) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if route.answer is not None:
        content["application/json"] = {"schema": found[route.answer, "serialization"]}
    elif route.content_type:
        content[route.content_type] = {}
    if route.streams:
        content["text/event-stream"] = {}
    operation: dict[str, Any] = {
        "summary": route.summary,
        "operationId": "_".join([route.method.lower(), *re.findall(r"[\w-]+", route.shown_path)]),
        "responses": {
            "200": {"description": "The answer", **({"content": content} if content else {})}
        },
    }
    if names := PARAMETER.findall(route.shown_path):
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in names
        ]
    statuses = set(route.statuses)
    if route.body is not None:
        statuses |= {*OF_BODIES}
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": found[route.body, "validation"]}},
        }
    if route.needs_model:
        statuses.add(503)
    if route.needs_key and has_key:
        statuses.add(401)
        operation["security"] = [{name: []} for name in ("key", route.key_header) if name]
    shape = _error_shape(route.path)
    for status in sorted({status_on(status, route.path) for status in statuses}):
        is_told = route.path != "/ready"
        operation["responses"][str(status)] = {
            "description": MEANINGS[status],
            "content": {
                "application/json": {"schema": found[shape, "serialization"] if is_told else {}}
            },
        }
    return operation


def _error_shape(path: str) -> type[BaseModel]:
    if is_anthropic(path):
        return AnthropicErrorResponse
    return OpenAIErrorResponse if path.startswith("/v1/") else ErrorResponse
