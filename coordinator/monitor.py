"""A small web server for whoever runs the coordinator: its metrics, and a page to watch it.

It answers GET, changes nothing, asks nobody who they are, and so should be reachable only from
where the operator is: 127.0.0.1, or a network of theirs. Neither page nor metrics name a device. In
threads of its own, so that whoever watches does not hold up devices.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import threading
from collections.abc import Callable, Sequence
from functools import cache, partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST

from edge_runtime.errors import AddressError, StorageError
from edge_runtime.finite import dumps

MOST_CONNECTIONS = 32
# A connection that says nothing for so long is closed.
IDLE_SECONDS = 5.0
# Nor does one last longer, whatever it says meanwhile.
LONGEST_SECONDS = 15.0
PAGE = {
    "/": ("dashboard.html", "text/html; charset=utf-8"),
    "/dashboard.css": ("dashboard.css", "text/css; charset=utf-8"),
    "/dashboard.js": ("dashboard.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src 'self'; "
    "script-src 'self'; style-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

# Path -> what makes the answer, and its content type.
Answers = dict[str, tuple[Callable[[], bytes], str]]


class Monitor:
    """Serves until it is closed."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        names: Sequence[str],
        metrics: Callable[[], bytes],
        overview: Callable[[], dict[str, Any]],
    ) -> None:
        """
        Args:
            host: address to listen on.
            port: 0 takes a free one.
            names: by which browsers may call it, beside localhost and addresses.
            metrics: in Prometheus' text format; called in other threads, as `overview` is.
            overview: what the page shows.

        Raises:
            AddressError: it cannot be listened on.
        """

        answers: Answers = {
            **{path: (partial(_file, name), kind) for path, (name, kind) in PAGE.items()},
            "/metrics": (metrics, CONTENT_TYPE_LATEST),
            "/overview.json": (partial(_json, overview), "application/json"),
        }
        hosts = frozenset({"localhost", *(name.lower() for name in names)})
        handler = partial(_Handler, answers, hosts)
        try:
            self._server = _Server(host.strip("[]"), port, handler)
        except OSError as error:
            raise AddressError(
                f"cannot listen on {host}:{port}: {error.strerror}; stop what uses it, or choose "
                "another --monitor (port 0 takes a free one)"
            ) from error
        self.address = f"{host}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="monitor")
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_port = False

    def __init__(self, host: str, port: int, handler: Callable[..., _Handler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._free = threading.BoundedSemaphore(MOST_CONNECTIONS)
        super().__init__((host, port), handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread can be started
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        late = threading.Timer(LONGEST_SECONDS, _hang_up, [request])
        late.daemon = True
        late.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            late.cancel()
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever hung up while they were answered is no trouble of ours."""


class _Handler(BaseHTTPRequestHandler):
    timeout = IDLE_SECONDS
    server_version = "comigs"
    sys_version = ""

    def __init__(self, answers: Answers, hosts: frozenset[str], *connection: Any) -> None:
        self._answers = answers
        self._hosts = hosts
        super().__init__(*connection)  # which answers

    def do_GET(self) -> None:
        if not self._is_meant():
            # Another site's page may have its name lead here, to read along (DNS rebinding).
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST, "Call it by its address or localhost")
            return
        answer = self._answers.get(self.path.partition("?")[0])
        if answer is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        make, kind = answer
        try:
            content = make()
        except StorageError as error:
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, explain=str(error))
            return
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *_: object) -> None:
        """Who looks is of no interest."""

    def _is_meant(self) -> bool:
        """Whether the request is for this server, and not for a name that leads here by chance."""
        host = self.headers.get("Host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return name.lower() in self._hosts  # browsers send lower case, whatever was typed
        return True


def _hang_up(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has ended
        connection.shutdown(socket.SHUT_RDWR)


def _json(value: Callable[[], dict[str, Any]]) -> bytes:
    return dumps(value()).encode()


@cache
def _file(name: str) -> bytes:
    return (files("coordinator") / name).read_bytes()
