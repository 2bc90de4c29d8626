"""A server's life cycle: listen at once, load, serve, and stop without cutting off answers."""

import asyncio
import gc
import logging
import math
import resource
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import uvicorn

from hanok.errors import HanokError
from hanok.server.app import create_app
from hanok.server.connection import Connection
from hanok.server.options import ServerOptions
from hanok.server.service import Service

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hanok.engine.engine import Engine
    from hanok.engine.model import Model

LOG = logging.getLogger("hanok.server")
GRACE_S = 5  # for answers still being written when the engine is done
OWN_FILES = 256
"""File descriptors that a process needs besides its connections."""
Opener = Callable[[Service], "tuple[Model, Engine]"]


def listen(options: ServerOptions) -> socket.socket:
    """Return a listening socket; port 0 chooses a free one. OSError if it is not available."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    found = socket.create_server((options.host, options.port), family=family, backlog=2048)
    # Closing a connection waits until its client has read what was written: one that never reads would
    # keep it open forever. Connections inherit the option of their listener.
    timeout_ms = int(1000 * options.write_timeout_s)
    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)
    return found


def configured(service: Service) -> uvicorn.Config:
    """Return uvicorn's configuration: the application, and the limits of connections."""
    options = service.options
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = options.max_connections
    if files != resource.RLIM_INFINITY:  # one that cannot be accepted would wait unseen
        most = max(1, min(most, files - OWN_FILES))
    return uvicorn.Config(
        create_app(service),
        http=partial(Connection, options, most),  # type: ignore[arg-type]  # called as a class is
        ws="none",  # there are none, and no limit of `Connection` would hold for one
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=math.ceil(options.idle_s),
        timeout_graceful_shutdown=GRACE_S,
    )


def serve(
    options: ServerOptions,
    open_model: Opener,
    listener: socket.socket,
    announce: Callable[[], None],
) -> int:
    """Serve until SIGTERM or SIGINT; return the exit code.

    `open_model` loads, in a thread, and returns an engine that was not started. Until then /health
    answers 503 with the progress that it writes into the service. `announce` is called when signals are
    obeyed and before anything is loaded.
    """
    service = Service(options=options)
    return asyncio.run(_Life(service, open_model, listener, announce).run())


class _Life:
    """One server from its start to its end, in one event loop."""

    def __init__(
        self,
        service: Service,
        open_model: Opener,
        listener: socket.socket,
        announce: Callable[[], None],
    ) -> None:
        self._service = service
        self._open_model = open_model
        self._listener = listener
        self._announce = announce
        self._exit_code = 0
        self._stopping: asyncio.Task[None] | None = None
        self._server = _Server(configured(service))

    async def run(self) -> int:
        """Listen, load and serve until stopped."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        self._announce()
        threading.Thread(target=self._load, args=(loop,), name="hanok-loading", daemon=True).start()
        try:
            await self._server.serve(sockets=[self._listener])
        finally:
            if self._service.engine is not None:
                await asyncio.to_thread(self._service.engine.close)
            self._service.close()
        return self._exit_code

    def _load(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            model, engine = self._open_model(self._service)
        except Exception as error:
            loop.call_soon_threadsafe(self._fail, error)
        else:
            # The objects made so far stay: garbage collection need not traverse them, which would take
            # as long as serving dozens of requests.
            gc.collect()
            gc.freeze()
            loop.call_soon_threadsafe(self._service.open, model, engine)

    def _fail(self, error: Exception) -> None:
        self._service.state, self._service.failure = "failed", str(error)
        if isinstance(error, HanokError):
            LOG.error("%s", error)
            self._exit_code = error.exit_code
        else:
            LOG.error("loading failed", exc_info=error)
            self._exit_code = 1
        self._server.should_exit = True

    def _stop(self) -> None:
        """Begin to stop; called a second time, stop at once."""
        if self._stopping is not None:
            self._server.should_exit = self._server.force_exit = True
            return
        self._stopping = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        service = self._service
        was_loading = service.state == "loading"
        service.state = "draining"
        if service.engine is not None and not was_loading:
            LOG.info("stopping: %d requests are finished first", service.num_open)
            seconds = service.options.termination_s
            if not await asyncio.to_thread(service.engine.drain, seconds):
                LOG.warning("requests were not finished within %g s and are cut off", seconds)
                await asyncio.to_thread(service.engine.close)
        self._server.should_exit = True


class _Server(uvicorn.Server):
    """uvicorn without signal handlers of its own."""

    @contextmanager
    def capture_signals(self) -> "Iterator[None]":
        """Leave signals to `_Life`."""
        yield
