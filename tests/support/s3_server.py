"""A local S3 server (moto) for tests, which injects faults on demand."""

import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NoReturn
from urllib.parse import parse_qs

from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import make_server

_STATUS = {
    200: "200 OK",
    500: "500 Internal Server Error",
    503: "503 Service Unavailable",
    403: "403 Forbidden",
}
CUT = 0  # instead of a status: close the connection without a response
HALF = 1  # cut the response in the middle


@dataclass(frozen=True, slots=True)
class Request:
    """A client's request."""

    method: str
    path: str
    query: dict[str, list[str]]
    num_bytes: int

    @property
    def part_number(self) -> int | None:
        """The number of the uploaded part, or None for other requests."""
        number = self.query.get("partNumber")
        return int(number[0]) if number and self.method == "PUT" else None


@dataclass(slots=True)
class Fault:
    """Which requests fail, how, and how often."""

    is_affected: Callable[[Request], bool]
    status: int
    code: str
    times: float
    body: bytes | None
    num_injected: int = field(default=0)


class _Quiet(MotoRequestHandler):
    def handle_expect_100(self) -> bool:
        # werkzeug already sends 100 Continue. After a second one, aiohttp's read time-out no longer works.
        return True

    def log(self, type: str, message: str, *args: Any) -> None:  # noqa: A002
        pass


class S3Server:
    """Runs between `start` and `stop`. Clients find it through the variables in `environment`."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.most_parts_at_once = 0
        self.num_bytes_sent = 0  # bodies of responses
        self._parts_now = 0
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._buckets = count()
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet)
        self._thread = threading.Thread(target=self._server.serve_forever, name="s3-server", daemon=True)

    def start(self) -> "S3Server":
        self._thread.start()
        return self

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """AWS variables for this server; they hide the AWS configuration of the user who runs the tests."""
        return {
            "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{self._server.port}",
            "AWS_ACCESS_KEY_ID": "tests",
            "AWS_SECRET_ACCESS_KEY": "tests",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        }

    def make_bucket(self) -> str:
        """The URL of a new bucket."""
        name = f"bucket-{next(self._buckets)}"
        self.client().create_bucket(Bucket=name)
        return f"s3://{name}"

    def client(self) -> Any:
        """A boto3 client, independent of the tested one."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.environment["AWS_ENDPOINT_URL_S3"],
            aws_access_key_id="other",
            aws_secret_access_key="other",
            region_name="us-east-1",
        )

    def keys(self, bucket: str) -> dict[str, int]:
        """The objects of a bucket with their sizes in bytes."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket.removeprefix("s3://"))
        return {found["Key"]: found["Size"] for page in pages for found in page.get("Contents", [])}

    def unfinished_uploads(self, bucket: str) -> list[str]:
        """Keys of multipart uploads that were neither completed nor aborted."""
        found = self.client().list_multipart_uploads(Bucket=bucket.removeprefix("s3://"))
        return [upload["Key"] for upload in found.get("Uploads", [])]

    @contextmanager
    def failing(
        self,
        is_affected: Callable[[Request], bool],
        *,
        status: int = 500,
        code: str = "InternalError",
        times: float = float("inf"),
        body: bytes | None = None,
    ) -> Iterator[Fault]:
        """Within the block, the first `times` requests that match `is_affected` fail and change nothing."""
        fault = Fault(is_affected, status, code, times, body)
        self._faults.append(fault)
        try:
            yield fault
        finally:
            self._faults.remove(fault)

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        request = Request(
            environ["REQUEST_METHOD"],
            environ["PATH_INFO"],
            parse_qs(environ["QUERY_STRING"], keep_blank_values=True),
            int(environ.get("CONTENT_LENGTH") or 0),
        )
        self.requests.append(request)
        for fault in self._faults:
            if fault.num_injected < fault.times and fault.is_affected(request):
                fault.num_injected += 1
                if fault.status == HALF:
                    return _half(self._moto, environ, start_response)
                return _refuse(fault, request, environ, start_response)
        with self._counting_parts(request):
            answer: Iterable[bytes] = self._moto(environ, start_response)
        return self._counted(answer)

    def _counted(self, answer: Iterable[bytes]) -> Iterator[bytes]:
        for body in answer:
            with self._lock:
                self.num_bytes_sent += len(body)
            yield body

    @contextmanager
    def _counting_parts(self, request: Request) -> Iterator[None]:
        number = int(request.part_number is not None)
        with self._lock:
            self._parts_now += number
            self.most_parts_at_once = max(self.most_parts_at_once, self._parts_now)
        try:
            yield
        finally:
            with self._lock:
                self._parts_now -= number


def _refuse(
    fault: Fault, request: Request, environ: dict[str, Any], start_response: Callable[..., Any]
) -> Iterable[bytes]:
    environ["wsgi.input"].read(request.num_bytes)
    if fault.status == CUT:
        _cut(environ)
    body = fault.body
    if body is None:
        body = f"<Error><Code>{fault.code}</Code><Message>injected by a test</Message></Error>".encode()
    start_response(
        _STATUS[fault.status], [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
    )
    return [] if request.method == "HEAD" else [body]


def _half(
    moto: Callable[..., Iterable[bytes]], environ: dict[str, Any], start_response: Callable[..., Any]
) -> Iterator[bytes]:
    body = b"".join(moto(environ, start_response))
    yield body[: len(body) // 2]
    _cut(environ)


def _cut(environ: dict[str, Any]) -> NoReturn:
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    raise ConnectionResetError  # werkzeug ignores it
