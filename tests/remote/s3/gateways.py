"""S3 endpoints for tests: where they are, how to look into a bucket without our code, and a proxy that watches."""

from __future__ import annotations

import http.client
import importlib
import itertools
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec
from kvconnect_s3 import S3Options, S3Store

from kvconnect.options import Secret
from kvconnect.protocol import BlockKey
from kvconnect.store import StoreContext

__all__ = ["ACCESS_KEY", "SECRET_KEY", "Place", "Proxy", "Request"]

ACCESS_KEY = "AKIDTEST"
SECRET_KEY = "SECRETTEST"
_names = itertools.count()


class Place:
    """A bucket of its own under an endpoint; boto3 looks into it, so that what is found is not our word."""

    def __init__(self, endpoint: str) -> None:
        """Make a bucket."""
        self.endpoint = endpoint
        self.bucket = f"bucket-{next(_names)}"
        boto3 = importlib.import_module("boto3")
        self.client: Any = boto3.client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
        )
        self.client.create_bucket(Bucket=self.bucket)

    def options(self, **changes: Any) -> dict[str, Any]:
        """Return what a configuration says of it."""
        return {
            "host": self.bucket,
            "path": "some/prefix",
            "endpoint": self.endpoint,
            "region": "us-east-1",
            "access_key_id": ACCESS_KEY,
            "secret_access_key": Secret(SECRET_KEY),
            **changes,
        }

    def open(self, *, timeout_s: float = 10.0, **changes: Any) -> S3Store:
        """Open a store there."""
        return S3Store(S3Options(**self.options(**changes)), StoreContext(name="s3", timeout_s=timeout_s))

    def objects(self, folder: str = "") -> dict[str, int]:
        """Return paths under the prefix and sizes."""
        found: dict[str, int] = {}
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self._name(folder))
        for page in pages:
            for each in page.get("Contents", ()):
                found[each["Key"].removeprefix(self._name(""))] = each["Size"]
        return found

    def read(self, path: str) -> bytes:
        """Return an object."""
        body: bytes = self.client.get_object(Bucket=self.bucket, Key=self._name(path))["Body"].read()
        return body

    def put(self, path: str, data: bytes) -> None:
        """Put an object, over whatever is there."""
        self.client.put_object(Bucket=self.bucket, Key=self._name(path), Body=data)

    def delete(self, path: str) -> None:
        """Delete an object, as a lifecycle rule would."""
        self.client.delete_object(Bucket=self.bucket, Key=self._name(path))

    def packed_keys(self) -> list[list[BlockKey]]:
        """Return the keys that each log entry names, read by the format's definition alone."""
        entries = []
        for path in sorted(self.objects("log/")):
            _, _, packs, _, _ = msgspec.msgpack.decode(self.read(path))
            joined = b"".join(keys for _, keys, _ in packs)
            entries.append([BlockKey(joined[i : i + 72]) for i in range(0, len(joined), 72)])
        return entries

    def _name(self, path: str) -> str:
        return f"some/prefix/{path}"


class Request(NamedTuple):
    """One request that went through a proxy: `range` is the header's ``first-last``."""

    method: str
    path: str
    query: str
    range: str


class Proxy:
    """Passes HTTP on to an endpoint on loopback, and writes down what; a context manager.

    Attributes:
        requests: What came through, in order.
        without: Names of headers that are not passed on.
        before: Called with each request before it is passed on.
        answer: Called with each request and its status when it was answered; what it returns is the status to give.
    """

    def __init__(self, endpoint: str) -> None:
        """Listen on a port of its own."""
        self.requests: list[Request] = []
        self.without: frozenset[str] = frozenset()
        self.before: Callable[[Request], None] = lambda request: None
        self.answer: Callable[[Request, int], int] = lambda request, status: status
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler(endpoint))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def count(self, method: str, part: str) -> int:
        """Return how many requests had `part` in their path."""
        return sum(request.method == method and part in request.path for request in self.requests)

    def __enter__(self) -> Proxy:
        """Start."""
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _handler(self, endpoint: str) -> type[BaseHTTPRequestHandler]:
        proxy = self
        target = urlsplit(endpoint)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            wbufsize = -1

            def pass_on(self) -> None:
                parts = urlsplit(self.path)
                request = Request(
                    self.command,
                    parts.path,
                    parts.query,
                    self.headers.get("Range", "").removeprefix("bytes="),
                )
                proxy.requests.append(request)
                proxy.before(request)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                headers = {k: v for k, v in self.headers.items() if k.lower() not in proxy.without}
                connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=30)
                try:
                    connection.request(self.command, self.path, body, headers)
                    answer = connection.getresponse()
                    data = answer.read()
                    self.send_response(proxy.answer(request, answer.status))
                    for name, value in answer.getheaders():
                        if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                            self.send_header(name, value)
                    length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
                    self.send_header("Content-Length", length or "0")
                    self.end_headers()
                    self.wfile.write(data)
                    self.wfile.flush()
                finally:
                    connection.close()

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = pass_on  # noqa: N815 - names that http.server asks for

            def log_message(self, *args: object) -> None:
                pass

        return Handler
