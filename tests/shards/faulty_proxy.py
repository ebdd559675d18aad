"""An HTTP proxy on loopback that fails, stalls and cuts answers short, the same way for the same seed; and counts what passes."""

from __future__ import annotations

import http.client
import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

STALL_S = 120.0
"""Longer than any reader waits."""


@dataclass(frozen=True, slots=True)
class Passed:
    """One request that reached the proxy."""

    method: str
    path: str
    range: str | None
    fault: str | None
    """fail, throttle, stall, truncate, reset, damage, or None where it was answered as it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Faults:
    """Shares of requests, drawn by (seed, request, how often it was made)."""

    fail: float = 0.0
    """Answered by 500."""
    throttle: float = 0.0
    """Answered by 429."""
    stall: float = 0.0
    """Not answered for STALL_S."""
    truncate: float = 0.0
    """Half of the body, then the connection ends. Of what is sent: the half is stored, and the answer says that all is well."""
    reset: float = 0.0
    """The connection ends without an answer."""
    seed: int = 0

    def __call__(self, method: str, path: str, byte_range: str | None, nth: int) -> str | None:
        """Draw the fault of a request."""
        draw = random.Random(f"{self.seed}|{method}|{path}|{byte_range}|{nth}").random()
        for name in ("fail", "throttle", "stall", "truncate", "reset"):
            draw -= getattr(self, name)
            if draw < 0:
                return name
        return None


class FaultyProxy:
    """Forwards to a server on this machine; use it as a context manager.

    Args:
        port: of the server.
        faults: (method, path, range, how often it was made before) to the name of a fault or None.
    """

    def __init__(self, port: int, faults: Callable[[str, str, str | None, int], str | None] | None = None) -> None:
        self.faults = faults or Faults()
        self.passed: list[Passed] = []
        self.upstream = port
        self._seen: Counter[tuple[str, str, str | None]] = Counter()
        self._lock = threading.Lock()
        self.ended = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self.port: int = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> FaultyProxy:
        """Start answering."""
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop; stalled requests end."""
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()

    def gets(self, suffix: str) -> list[Passed]:
        """Return the GET requests for objects whose name ends so."""
        return [p for p in self.passed if p.method == "GET" and p.path.partition("?")[0].endswith(suffix)]

    def draw(self, method: str, path: str, byte_range: str | None) -> str | None:
        """Choose the fault of a request, and remember it."""
        with self._lock:
            nth = self._seen[method, path, byte_range]
            self._seen[method, path, byte_range] += 1
            fault = self.faults(method, path, byte_range, nth)
            self.passed.append(Passed(method, path, byte_range, fault))
        return fault


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    proxy: FaultyProxy

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that hangs up is what this is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_GET(self) -> None:
        proxy = self.server.proxy
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = proxy.draw(self.command, self.path, self.headers.get("Range"))
        if fault in ("fail", "throttle"):
            return self._answer(500 if fault == "fail" else 429, {}, b"injected")
        if fault in ("stall", "reset"):
            proxy.ended.wait(STALL_S if fault == "stall" else 0)
            self.close_connection = True
            return None
        status, headers, body = self._forward(proxy.upstream, sent[: len(sent) // 2] if fault == "truncate" else sent)
        if fault == "damage":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if fault == "truncate" and not sent:
            self._answer(status, headers, body, cut=len(body) // 2)
            self.close_connection = True
        else:
            self._answer(status, headers, body)
        return None

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _forward(self, port: int, sent: bytes) -> tuple[int, dict[str, str], bytes]:
        upstream = http.client.HTTPConnection("127.0.0.1", port)
        try:
            headers = {k: v for k, v in self.headers.items() if k.lower() != "content-length"}
            upstream.request(self.command, self.path, sent or None, headers)
            answer = upstream.getresponse()
            dropped = ("connection", "transfer-encoding", "keep-alive")
            return answer.status, {k: v for k, v in answer.getheaders() if k.lower() not in dropped}, answer.read()
        finally:
            upstream.close()

    def _answer(self, status: int, headers: dict[str, str], body: bytes, cut: int | None = None) -> None:
        headers = {k.lower(): v for k, v in headers.items()}
        headers.setdefault("content-length", str(len(body)))
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
            self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""
