"""Open connections to a hub and its storage, used again for further requests; directly or by a proxy."""

import base64
import http.client
import threading
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

HTTPS_PORT = 443


class Connections:
    """Open connections that are not in use; may be used by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: dict[str, list[http.client.HTTPConnection]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def take(
        self, url: str, timeout_s: float, *, is_new: bool = False
    ) -> tuple[http.client.HTTPConnection, bool]:
        """Return a connection to a URL's host, and whether it was used before."""
        with self._lock:
            idle = self._idle.get(origin(url))
            found = idle.pop() if idle and not is_new else None
        connection = found or _connect(origin(url), timeout_s)
        connection.timeout = timeout_s
        if connection.sock is not None:
            connection.sock.settimeout(timeout_s)
        return connection, found is not None

    def give(self, url: str, connection: http.client.HTTPConnection) -> None:
        """Keep a connection whose last answer was read to its end."""
        with self._lock:
            self._idle.setdefault(origin(url), []).append(connection)

    def close(self) -> None:
        """Close all that are kept."""
        with self._lock:
            for connection in [item for idle in self._idle.values() for item in idle]:
                connection.close()
            self._idle.clear()


def origin(url: str) -> str:
    """Return scheme, host and port."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def target_of(url: str) -> tuple[str, dict[str, str]]:
    """Return what a request's first line names, and the headers that a proxy wants."""
    parts = urlsplit(url)
    proxy = _proxy_of(parts.scheme, parts.hostname or "")
    if parts.scheme == "http" and proxy:
        return url, _proxy_headers(proxy)
    return f"{parts.path or '/'}{'?' + parts.query if parts.query else ''}", {}


def _connect(address: str, timeout_s: float) -> http.client.HTTPConnection:
    parts = urlsplit(address)
    host, port = parts.hostname or "", parts.port
    is_encrypted = parts.scheme == "https"
    kind = http.client.HTTPSConnection if is_encrypted else http.client.HTTPConnection
    proxy = _proxy_of(parts.scheme, host)
    if proxy is None:
        return kind(host, port, timeout=timeout_s)
    by = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    connection = kind(by.hostname or "", by.port, timeout=timeout_s)
    if is_encrypted:
        connection.set_tunnel(host, port or HTTPS_PORT, _proxy_headers(proxy))
    return connection


def _proxy_of(scheme: str, host: str) -> str | None:
    return None if proxy_bypass(host) else getproxies().get(scheme)


def _proxy_headers(proxy: str) -> dict[str, str]:
    """Return who asks, where the proxy's URL says so."""
    by = urlsplit(proxy)
    if by.username is None:
        return {}
    user = f"{unquote(by.username)}:{unquote(by.password or '')}"
    return {"Proxy-Authorization": f"Basic {base64.b64encode(user.encode()).decode()}"}
