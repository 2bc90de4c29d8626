"""The OpenAPI 3.1 document of the routes, made from the bodies and answers that they declare."""

import re
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from hanok import __version__
from hanok.server.tgi_models import ErrorResponse
from hanok.server.web import Route

REFERENCE = "#/components/schemas/{model}"
MEANINGS = {
    400: "The body is not JSON",
    401: "The API key is missing or wrong",
    404: "There is no such model or adapter",
    408: "Not finished in the time it had",
    413: "The body is too large",
    415: "The body is not declared as JSON",
    422: "The request is not valid",
    424: "Generation failed",
    429: "There is no room now; Retry-After says when there may be",
    500: "The server failed",
    503: "Not ready",
}
PARAMETER = re.compile(r"\{(\w+)")
OF_BODIES = (400, 408, 413, 415, 422)


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
        ],
        ref_template=REFERENCE,
    )
    paths: dict[str, Any] = {}
    for route in routes:
        operation = _operation(route, found, has_key=has_key)
        paths.setdefault(route.shown_path, {})[route.method.lower()] = operation
    components: dict[str, Any] = {"schemas": definitions.get("$defs", {})}
    if has_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "hanok",
            "version": __version__,
            "description": "Text generation over TGI's protocol and OpenAI's.",
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
        operation["security"] = [{"key": []}]
    shape = OpenAIErrorResponse if route.path.startswith("/v1/") else ErrorResponse
    for status in sorted(statuses):
        is_told = route.path != "/ready"
        operation["responses"][str(status)] = {
            "description": MEANINGS[status],
            "content": {
                "application/json": {"schema": found[shape, "serialization"] if is_told else {}}
            },
        }
    return operation
