"""A route as data: its path, its body and answer, and who may use it when."""

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from hanok.server.service import Service

Handler = Callable[[Service, Request, Any], Awaitable[Response]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One route: its body, its answer, and its access."""

    method: str
    path: str
    handler: Handler
    summary: str
    body: type[BaseModel] | None = None
    answer: type[BaseModel] | None = None
    """Of a JSON answer with status 200; None: described by `content_type` alone."""
    content_type: str = "application/json"
    streams: bool = False
    """Whether it may answer with server-sent events."""
    needs_key: bool = False
    key_header: str = ""
    """Another header that may hold the bare key; "": only `Authorization`."""
    needs_model: bool = False
    """Whether it needs the model, and answers 503 until it is loaded."""
    needs_head: bool = False
    """Whether it generates tokens, and answers 422 if the model only makes embeddings."""
    statuses: tuple[int, ...] = ()
    """Errors that it may answer with, besides those of every route with a body."""

    @property
    def shown_path(self) -> str:
        """The path without the router's converters: "{model}" for "{model:path}"."""
        return re.sub(r":\w+\}", "}", self.path)
