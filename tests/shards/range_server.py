"""A web server on loopback that serves a folder, with byte ranges or without."""

from __future__ import annotations

import base64
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit


class RangeServer:
    """Serves a folder; use it as a context manager.

    Args:
        folder: what is served.
        ranges: whether it knows byte ranges.
        login: `user:password` that it asks for.
        query: that every request must carry, as a signed URL does.
    """

    def __init__(self, folder: Path, *, ranges: bool = True, login: str | None = None, query: str = "") -> None:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.folder, self._server.ranges, self._server.login, self._server.query = folder, ranges, login, query
        self._server.status, self._server.answered, self._server.paths = None, 0, []
        self.port: int = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    def refuse_with(self, status: int) -> None:
        """Answer everything with this status from now on."""
        self._server.status = status

    @property
    def answered(self) -> int:
        """Requests so far."""
        return self._server.answered

    @property
    def paths(self) -> list[str]:
        """The path of every GET, in order."""
        return list(self._server.paths)

    def __enter__(self) -> RangeServer:
        """Start answering."""
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    folder: Path
    ranges: bool
    login: str | None
    query: str
    status: int | None
    answered: int
    paths: list[str]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client may hang up."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_GET(self) -> None:
        self.server.answered += 1
        if self.command == "GET":
            self.server.paths.append(urlsplit(self.path).path)
        if self.server.status is not None:
            return self._answer(self.server.status, {}, b"")
        split = urlsplit(self.path)
        path = self.server.folder / unquote(split.path).lstrip("/")
        if self.server.login is not None and self.headers.get("Authorization") != f"Basic {_encoded(self.server.login)}":
            return self._answer(401, {}, b"")
        if split.query != self.server.query:
            return self._answer(403, {}, b"")
        if not path.is_file():
            return self._answer(404, {}, b"")
        data = path.read_bytes()
        wanted = self.headers.get("Range")
        if wanted is None or not self.server.ranges:
            return self._answer(200, {}, data)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last or len(data)) + 1, len(data))
        if start >= len(data):
            return self._answer(416, {}, b"")
        return self._answer(206, {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}, data[start:end])

    do_HEAD = do_GET

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def _encoded(login: str) -> str:
    return base64.b64encode(login.encode()).decode()
