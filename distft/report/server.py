"""A report as a page on this machine that follows its runs: only GET, no file of the disk, no other host."""

import json
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from distft.errors import ConfigError, DistftError
from distft.report.html import Content
from distft.report.page import charts_data, content_of, page_of, require_drawing_library
from distft.report.recorded_run import FollowedRun
from distft.run.paths import CONFIG_FILE
from distft.search.ranking import SEARCH_FILE

_HOST = "127.0.0.1"
_SILENCE_S = 300.0  # after which a page is made anew though nothing was written
_TIMEOUT_S = 10.0  # of a request's lines: a client that sends none holds a thread no longer


class ReportServer:
    """Serves `/`, the page, and `/update?version=V`, what has changed since version V as JSON.

    A page of another site cannot read it: requests must name this host and port, as a rebound name does not.
    """

    def __init__(self, directories: Sequence[str | Path], port: int = 0) -> None:
        """Raises `ConfigError` as `content_of`, and if `port` (0: a free one) cannot be had."""
        require_drawing_library()
        self._report = _LiveReport([Path(directory) for directory in directories])
        self._report.current()
        handler = partial(_Handler, self._report)
        try:
            self._server = ThreadingHTTPServer((_HOST, port), handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(
                f"--port {port} cannot be used ({reason}): give another one, or none for a free one."
            ) from None
        self._server.daemon_threads = True

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"http://{_HOST}:{self.port}/"

    def serve(self) -> None:
        """Answer until `close` of another thread, or Ctrl-C."""
        try:
            self._server.serve_forever(poll_interval=0.2)
        finally:
            self._server.server_close()

    def close(self) -> None:
        self._server.shutdown()


class _LiveReport:
    """The page's content, made anew when a file has changed."""

    def __init__(self, directories: Sequence[Path]) -> None:
        self._directories = directories
        self._lock = threading.Lock()  # requests come in threads
        self._version = ""
        self._content: Content | None = None
        self.problem = ""  # why the content is not the newest

    def current(self) -> tuple[str, Content]:
        """Version and content. Raises `ConfigError` if there never was any."""
        with self._lock:
            version = self._newest_version()
            if version != self._version or self._content is None:
                try:
                    content, notes = content_of(self._directories)
                except (DistftError, OSError) as error:
                    if self._content is None:
                        raise
                    self.problem = str(error)
                    return self._version, self._content
                self._version, self._content, self.problem = version, content, "; ".join(notes)
            return self._version, self._content

    def _newest_version(self) -> str:
        files = [
            file
            for directory in self._directories
            for file in (
                directory / CONFIG_FILE,
                directory / SEARCH_FILE,
                *(lines.path for lines in FollowedRun(directory).files),
            )
        ]
        # A run that writes nothing becomes silent.
        return "-".join([*map(_state_of, files), str(int(time.time() // _SILENCE_S))])


def _state_of(file: Path) -> str:
    try:
        found = file.stat()
    except OSError:
        return "0"
    return f"{found.st_size}.{found.st_mtime_ns}"


class _Handler(BaseHTTPRequestHandler):
    """Answers one client."""

    timeout = _TIMEOUT_S
    server_version, sys_version = "distft", ""

    def __init__(self, report: _LiveReport, *arguments: object) -> None:
        self._report = report
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        port = self.server.server_address[1]  # type: ignore[index]
        if self.headers.get("Host") not in {f"{_HOST}:{port}", f"localhost:{port}"}:
            self._refuse(HTTPStatus.MISDIRECTED_REQUEST, "This server answers requests to localhost alone.")
            return
        url = urlsplit(self.path)
        answers: dict[str, Callable[[], tuple[str, bytes]]] = {
            "/": self._page,
            "/update": lambda: self._update(parse_qs(url.query).get("version", [""])[0]),
        }
        if url.path not in answers:
            self._refuse(HTTPStatus.NOT_FOUND, "There is nothing but the report, at /.")
            return
        kind, body = answers[url.path]()
        self._send(HTTPStatus.OK, kind, body)

    def _page(self) -> tuple[str, bytes]:
        version, content = self._report.current()
        return "text/html; charset=utf-8", page_of(content, version=version)

    def _update(self, known: str) -> tuple[str, bytes]:
        version, content = self._report.current()
        note = f"Following the run. {self._report.problem}".rstrip()
        update = {"version": version, "note": note}
        if version != known:
            update |= {"body": content.body, "charts": charts_data(content)}  # type: ignore[dict-item]
        return "application/json", json.dumps(update).encode()

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        self._send(status, "text/plain; charset=utf-8", f"{reason}\n".encode())

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            ("X-Frame-Options", "DENY"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Nothing: a request every two seconds is no news."""
