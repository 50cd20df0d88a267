"""An S3 server on loopback (moto), and in front of it a proxy that counts requests and injects faults.

Example::

    with serving() as server:                  # sets AWS_* in the environment; the bucket is s3://bucket
        server.faults = Faults(seed=1, share=0.2)
        Store("s3://bucket/run").write("a", b"1")
        server.requests["PUT"]
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BUCKET = "bucket"
KINDS = ("500", "503", "lost", "timeout", "torn_put", "short_put", "torn_get", "flipped_get", "stale_list")
"""500, 503: refused, nothing done. lost: done, but the connection is closed without an answer. timeout: no answer for
longer than the client waits. torn_put: the connection closes in the middle of the body. short_put: half of the body is
stored and success is answered. torn_get, flipped_get: half of the content; one bit of it differs. stale_list: a listing
of an earlier moment."""
TIMEOUTS = {"connect_timeout": 2, "read_timeout": 1}
"""Of the driver, in seconds; its own are 5 and 15."""


class Faults:
    """Which request meets which fault: a share of all, drawn by a seed. ``done`` counts them by kind."""

    def __init__(self, *, seed: int, share: float, kinds: tuple[str, ...] = KINDS) -> None:
        self._draw, self.share, self.kinds = random.Random(seed), share, kinds
        self.done: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __call__(self, method: str, path: str, *, is_list: bool) -> str | None:
        with self._lock:
            if self._draw.random() >= self.share:
                return None
            fits = {
                "torn_put": method == "PUT",
                "short_put": method == "PUT",
                "torn_get": method == "GET" and not is_list,
                "flipped_get": method == "GET" and not is_list,
                "stale_list": is_list,
            }
            kind = self._draw.choice([kind for kind in self.kinds if fits.get(kind, True)] or [""])
            return kind or None

    def count(self, kind: str) -> None:
        with self._lock:
            self.done[kind] += 1


class Server:
    """What :func:`serving` yields.

    Attributes:
        requests: number of requests by method (``LIST`` is a GET of a listing).
        faults: ``None`` for a proxy that only counts.
        down: refuse everything with 503.
        skew_seconds: how far the clock in the answers is off.
        timeout_seconds: how long a ``timeout`` keeps the client waiting.
    """

    def __init__(self, moto_port: int) -> None:
        self.moto_port = moto_port
        self.requests: Counter[str] = Counter()
        self.faults: Faults | None = None
        self.down = False
        self.skew_seconds = 0.0
        self.timeout_seconds = 2.0
        self.listings: dict[str, bytes] = {}
        self.lock = threading.Lock()
        proxy = _Proxy(("127.0.0.1", 0), type("Handler", (_Handler,), {"server_state": self}))
        proxy.daemon_threads = True
        self.proxy = proxy
        self.url = f"http://127.0.0.1:{proxy.server_address[1]}"
        threading.Thread(target=proxy.serve_forever, name="s3 proxy", daemon=True).start()

    def objects(self) -> dict[str, bytes]:
        """All objects of the bucket, by key, past the proxy."""
        return {name: bytes(key.value) for name, key in _backend().buckets[BUCKET].keys.items()}

    def set_object(self, name: str, data: bytes) -> None:
        """Replace an object past the proxy: what a failing disk of the store would do."""
        _backend().put_object(BUCKET, name, data)


def _backend() -> Any:
    from moto.s3.models import s3_backends

    return s3_backends["123456789012"]["aws"]


class _Proxy(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed, or hung up on."""


class _Handler(BaseHTTPRequestHandler):
    server_state: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _serve(self) -> None:
        state, method = self.server_state, self.command
        is_list = method == "GET" and ("list-type=2" in self.path)
        with state.lock:
            state.requests["LIST" if is_list else method] += 1
        fault = state.faults(method, self.path, is_list=is_list) if state.faults is not None else None
        if state.faults is not None and fault:
            state.faults.count(fault)
        length = int(self.headers.get("Content-Length") or 0)
        if fault == "torn_put":
            self.rfile.read(length // 2)
            self._hang_up()
            return
        body = self.rfile.read(length)
        if fault == "timeout":
            time.sleep(state.timeout_seconds)
            self._hang_up()
            return
        if state.down or fault in ("500", "503"):
            code, word = (500, "InternalError") if fault == "500" else (503, "SlowDown")
            self._answer(code, [], f"<Error><Code>{word}</Code><Message>injected</Message></Error>".encode())
            return
        headers = {
            key: value for key, value in self.headers.items() if key.lower() not in ("host", "connection")
        }
        if fault == "short_put" and length:
            body = body[: length // 2]
            headers = {
                k: v for k, v in headers.items() if "md5" not in k.lower() and "checksum" not in k.lower()
            }
            headers["Content-Length"] = str(len(body))
        backend = http.client.HTTPConnection("127.0.0.1", state.moto_port, timeout=30)
        try:
            backend.request(method, self.path, body=body, headers=headers)
            answer = backend.getresponse()
            content = answer.read()
        finally:
            backend.close()
        if is_list and answer.status == 200:
            with state.lock:
                earlier = state.listings.get(self.path)
                if fault != "stale_list" or earlier is None:
                    state.listings.setdefault(self.path, content)
                    if random.random() < 0.5:
                        state.listings[self.path] = content
                else:
                    content = earlier
        if fault == "lost":
            self._hang_up()
            return
        if fault == "flipped_get" and content and answer.status in (200, 206):
            place = len(content) // 2
            content = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        kept = [
            (key, value)
            for key, value in answer.getheaders()
            if key.lower() not in ("content-length", "connection", "transfer-encoding")
            and not ("checksum" in key.lower() and fault == "flipped_get")
        ]
        if state.skew_seconds:
            kept = [
                (key, self._skewed(value)) if key in ("Date", "Last-Modified") else (key, value)
                for key, value in kept
            ]
        length_of_head = answer.getheader("Content-Length") if method == "HEAD" else None
        self._answer(answer.status, kept, content, torn=fault == "torn_get", length=length_of_head)

    def _skewed(self, value: str) -> str:
        from email.utils import formatdate, parsedate_to_datetime

        return formatdate(
            parsedate_to_datetime(value).timestamp() + self.server_state.skew_seconds, usegmt=True
        )

    def _answer(
        self,
        code: int,
        headers: list[tuple[str, str]],
        content: bytes,
        *,
        torn: bool = False,
        length: str | None = None,
    ) -> None:
        try:
            self.send_response_only(code)
            for key, value in headers:
                self.send_header(key, value)
            self.send_header("Content-Length", length or str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[: len(content) // 2] if torn else content)
            if torn:
                self._hang_up()
        except OSError:
            self.close_connection = True

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.close()


@contextlib.contextmanager
def serving(*, also: tuple[str, ...] = ()) -> Iterator[Server]:
    """A server with an empty bucket, and with those of the names ``also``, for this process and those that it starts."""
    import fsspec
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    server = Server(moto.get_host_and_port()[1])
    before, settings = dict(os.environ), fsspec.config.conf.get("s3")
    os.environ.update(environment(server.url))
    # What FSSPEC_S3 in the environment says at its import
    fsspec.config.conf["s3"] = {"config_kwargs": TIMEOUTS}
    S3FileSystem.clear_instance_cache()
    try:
        connection = http.client.HTTPConnection("127.0.0.1", server.moto_port, timeout=30)
        connection.request("POST", "/moto-api/reset")
        connection.getresponse().read()
        for bucket in (BUCKET, *also):
            connection.request("PUT", f"/{bucket}")
            assert connection.getresponse().read() is not None
        connection.close()
        yield server
    finally:
        for name in environment(server.url):
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]
        fsspec.config.conf.pop("s3")
        if settings is not None:
            fsspec.config.conf["s3"] = settings
        S3FileSystem.clear_instance_cache()
        server.proxy.shutdown()
        server.proxy.server_close()
        moto.stop()


def environment(url: str) -> dict[str, str]:
    """The variables that a run needs to use the server."""
    return {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "not-a-secret-of-anybody",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
        "AWS_MAX_ATTEMPTS": "1",
        "FSSPEC_S3": json.dumps({"config_kwargs": TIMEOUTS}),
    }


def manifest_steps(server: Server, run: str) -> list[int]:
    """The steps of all checkpoints that exist in a run folder of the bucket."""
    pattern = re.compile(rf"{re.escape(run)}/checkpoints/step-(\d+)/manifest\.json")
    return sorted(int(match[1]) for name in server.objects() if (match := pattern.fullmatch(name)))
