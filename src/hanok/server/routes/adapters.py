"""Adapters that come and go while the server runs; paths and bodies are vLLM's.

Both routes are off until `ServerOptions.adapters_below` names folders: a path is read from the server's
disk. Nothing outside these folders is opened, wherever links point, or said to be there.
"""

import logging
from pathlib import Path

from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from hanok.errors import BudgetError, CheckpointError, OptionError, UnsupportedError
from hanok.server.errors import ServerError, invalid
from hanok.server.options import ServerOptions
from hanok.server.route import Route
from hanok.server.service import Service

LOG = logging.getLogger("hanok.server")
LONGEST_NAME = 200


class LoadAdapterRequest(BaseModel):
    """Which adapter is to be loaded, and what requests call it."""

    lora_name: str = Field(min_length=1, max_length=LONGEST_NAME)
    lora_path: str = Field(min_length=1)
    """A folder in PEFT's format: absolute, or relative to a folder that is allowed."""


class UnloadAdapterRequest(BaseModel):
    """Which adapter is to be unloaded."""

    lora_name: str = Field(min_length=1)


async def load(service: Service, request: Request, body: LoadAdapterRequest) -> Response:
    """Load an adapter; answered when requests may name it."""
    _check_allowed(service.options)
    engine, name = service.needed_engine, body.lora_name
    if name in service.options.model_names:
        raise invalid(f"{name!r} is a name of the model itself", "lora_name")
    folder = folder_of(body.lora_path, service.options)
    try:
        await service.aside(engine.load_adapter, name, folder)
    except OptionError as error:
        raise invalid(str(error), "lora_name") from error
    except (BudgetError, CheckpointError, UnsupportedError) as error:
        raise invalid(str(error), "lora_path") from error
    LOG.info("adapter %r loaded from %s", name, folder)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


async def unload(service: Service, request: Request, body: UnloadAdapterRequest) -> Response:
    """Take no more requests with an adapter; those that are there are finished before it goes."""
    _check_allowed(service.options)
    engine, name = service.needed_engine, body.lora_name
    try:
        engine.unload_adapter(name)
    except OptionError as error:
        raise ServerError(
            str(error),
            kind="adapter_not_found",
            status=404,
            parameter="lora_name",
            code="not_found",
        ) from error
    LOG.info("adapter %r unloaded", name)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


def folder_of(path: str, options: ServerOptions) -> Path:
    """Return an adapter's folder; ServerError where it, or a file in it, is outside the allowed ones."""
    for root in (Path(item).resolve() for item in options.adapters_below):
        try:
            folder = (root / path).resolve()
            if not folder.is_relative_to(root):
                continue
            inside = [folder, *folder.iterdir()] if folder.is_dir() else []
        except (OSError, ValueError, RuntimeError):  # unreadable, a zero byte, links in a circle
            continue
        if inside and all(item.resolve().is_relative_to(root) for item in inside):
            return folder
    raise invalid(
        f"{path!r} is no folder below one that this server loads adapters from (--adapters-below)",
        "lora_path",
    )


def _check_allowed(options: ServerOptions) -> None:
    if not options.adapters_below:
        raise ServerError(
            "this server neither loads nor unloads adapters while it runs. Its operator allows it with "
            "--adapters-below FOLDER.",
            kind="not_allowed",
            status=404,
        )


ROUTES = (
    Route(
        method="POST",
        path="/v1/load_lora_adapter",
        handler=load,
        summary="Load an adapter, where the server allows it",
        body=LoadAdapterRequest,
        content_type="text/plain",
        needs_key=True,
        needs_model=True,
        statuses=(404,),
    ),
    Route(
        method="POST",
        path="/v1/unload_lora_adapter",
        handler=unload,
        summary="Unload an adapter, where the server allows it",
        body=UnloadAdapterRequest,
        content_type="text/plain",
        needs_key=True,
        needs_model=True,
        statuses=(404,),
    ),
)
