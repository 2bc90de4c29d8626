"""The application: every route of `server/routes`, wrapped in the gate that all requests pass."""

import re
from collections.abc import Sequence
from html import escape

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route as StarletteRoute
from starlette.routing import Router
from starlette.types import ASGIApp

from hanok.registry import discover
from hanok.server.gate import Gate
from hanok.server.openapi import document
from hanok.server.route import Route
from hanok.server.service import Service
from hanok.server.web import Json, read_body


def all_routes() -> tuple[Route, ...]:
    """Return the routes that the files of `server/routes` declare."""
    found: list[Route] = []
    for routes in discover("hanok.server.routes", "ROUTES").values():
        found += routes
    return tuple(found)


def create_app(service: Service) -> ASGIApp:
    """Return the application that answers for a service."""
    routes = all_routes()
    described = document(routes, has_key=service.options.api_key is not None)

    async def openapi(request: Request) -> Response:
        return Json(described)

    async def docs(request: Request) -> Response:
        return HTMLResponse(_listing(routes))

    router = Router(
        [
            *(_route(route, service) for route in routes),
            StarletteRoute("/api-doc/openapi.json", openapi),
            StarletteRoute("/openapi.json", openapi),
            StarletteRoute("/docs", docs),
        ]
    )
    methods: dict[str, set[str]] = {}
    patterns: dict[str, re.Pattern[str]] = {}
    for item in router.routes:
        if isinstance(item, StarletteRoute):
            methods.setdefault(item.path, set()).update(item.methods or ())
            if item.param_convertors:
                patterns[item.path] = item.path_regex
    gate = Gate(
        router,
        service=service,
        routes={(route.method, route.path): route for route in routes},
        methods=methods,
        patterns=patterns,
    )
    return CORSMiddleware(
        gate,
        allow_origins=service.options.cors_allow_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["x-request-id", "retry-after"],
    )


def _route(route: Route, service: Service) -> StarletteRoute:
    async def answer(request: Request) -> Response:
        if route.needs_model:
            _ = service.needed_engine
        if route.needs_head:
            service.needed_model.check_head()
        body = None
        if route.body is not None:
            body = await read_body(request, route.body, service.options)
        return await route.handler(service, request, body)

    return StarletteRoute(route.path, answer, methods=[route.method], name=route.summary)


def _listing(routes: Sequence[Route]) -> str:
    """Return a page that lists the routes."""
    rows = "".join(
        f"<tr><td>{route.method}</td><td><code>{escape(route.shown_path)}</code></td>"
        f"<td>{escape(route.summary)}</td></tr>"
        for route in routes
    )
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>hanok: routes</title>"
        "<h1>Routes</h1><p>The whole contract: <a href=/openapi.json>openapi.json</a>.</p>"
        f"<table>{rows}</table></html>"
    )
