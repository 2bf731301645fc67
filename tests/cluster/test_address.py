"""The choice of the dashboard's address, and secrets that are not sent to it in clear text."""

import socket
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support.commands import call_python

from distft.cluster.client.address import check_clear_text, choose_address
from distft.errors import ConfigError

TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "open sesame"}
PROXY = {"http_proxy": "proxy.example:3128"}


@pytest.mark.parametrize(
    ("given", "environ", "expected"),
    [
        (None, {}, "http://127.0.0.1:8265"),
        (None, {"RAY_ADDRESS": "http://a:1"}, "http://a:1"),
        (None, {"RAY_ADDRESS": "http://a:1", "RAY_API_SERVER_ADDRESS": "https://b/ray/"}, "https://b/ray"),
        ("http://c:3/", {"RAY_ADDRESS": "auto", "RAY_API_SERVER_ADDRESS": "http://b:2"}, "http://c:3"),
    ],
)
def test_a_given_address_takes_precedence_over_the_environment(
    given: str | None, environ: dict[str, str], expected: str
) -> None:
    assert choose_address(given, environ) == expected


@pytest.mark.parametrize("address", ["auto", "10.0.0.1:6379", "ray://head:10001", "head", "http://", "://x"])
def test_an_address_that_is_no_url_is_refused_with_its_source(address: str) -> None:
    with pytest.raises(ConfigError, match=r"^RAY_ADDRESS="):
        choose_address(None, {"RAY_ADDRESS": address})
    with pytest.raises(ConfigError, match=r"^--address="):
        choose_address(address, {})


@pytest.mark.parametrize(
    ("address", "environ", "is_refused"),
    [
        ("http://10.0.0.1:8265", TOKEN, True),
        ("http://head.example:8265", TOKEN, True),
        ("HTTP://head.example:8265", TOKEN, True),
        ("http://[2001:db8::1]:8265", TOKEN, True),
        ("http://0.0.0.0:8265", TOKEN, True),
        ("http://localhost.example:8265", TOKEN, True),
        ("http://127.0.0.1.example:8265", TOKEN, True),
        ("http://10.0.0.1:8265", {"RAY_AUTH_MODE": "Token", "RAY_AUTH_TOKEN_PATH": "/t"}, True),
        ("http://10.0.0.1:8265", {"RAY_AUTH_MODE": "token"}, True),  # ~/.ray/auth_token
        ("http://10.0.0.1:8265", {}, False),
        ("http://10.0.0.1:8265", {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "x"}, False),
        ("http://10.0.0.1:8265", {"RAY_AUTH_TOKEN": "x"}, False),  # Ray's client does not send it
        ("https://10.0.0.1:8265", TOKEN, False),
        ("http://127.0.0.1:8265", TOKEN, False),
        ("http://127.8.9.10:8265", TOKEN, False),
        ("http://[::1]:8265", TOKEN, False),
        ("http://LocalHost:8265", TOKEN, False),
        ("http://me:password@10.0.0.1:8265", {}, True),
        ("http://me:password@127.0.0.1:8265", {}, False),
        ("http://127.0.0.1:8265", TOKEN | PROXY, True),
        ("http://127.0.0.1:8265", TOKEN | PROXY | {"NO_PROXY": "localhost,127.0.0.1"}, False),
        ("http://10.0.0.1:8265", TOKEN | PROXY | {"no_proxy": "*"}, True),
        ("http://127.0.0.1:8265", TOKEN | {"HTTP_PROXY": "http://localhost:9"}, False),
        ("https://10.0.0.1:8265", TOKEN | PROXY, False),
    ],
)
def test_a_secret_in_clear_text_stays_on_this_machine(
    address: str, environ: dict[str, str], is_refused: bool
) -> None:
    if not is_refused:
        check_clear_text(address, environ)
        return
    with pytest.raises(ConfigError, match="--allow-clear-text-token") as raised:
        check_clear_text(address, environ)
    assert "https" in str(raised.value)
    assert not any(secret in str(raised.value) for secret in ("sesame", "password"))


class Recorder(ThreadingHTTPServer):
    """A dashboard without jobs, at every address of this machine; records the tokens that it receives."""

    def __init__(self) -> None:
        super().__init__(("", 0), _Handler)
        self.tokens: list[str | None] = []

    def url(self, host: str) -> str:
        return f"http://{host}:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Recorder

    def do_GET(self) -> None:
        self.server.tokens.append(self.headers.get("authorization"))
        text = b"[]" if "jobs" in self.path else b'{"ray_version": "2.60.0", "session_name": "x"}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *arguments: object) -> None: ...


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    with Recorder() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


def status(address: str, *options: str, cwd: Path, env: Mapping[str, str]) -> int:
    return call_python("-m", "distft", "status", "--address", address, *options, cwd=cwd, env=env).returncode


@pytest.mark.ray
@pytest.mark.parametrize("mode", ["token", "TOKEN", "disabled", None])
def test_rays_client_sends_a_token_in_token_mode_only(
    recorder: Recorder, environment: Mapping[str, str], tmp_path: Path, mode: str | None
) -> None:
    environ = {**environment, "RAY_AUTH_TOKEN": "sesame"} | ({} if mode is None else {"RAY_AUTH_MODE": mode})
    assert status(recorder.url("127.0.0.1"), cwd=tmp_path, env=environ) == 0
    assert set(recorder.tokens) == {"Bearer sesame" if mode in {"token", "TOKEN"} else None}


@pytest.mark.ray
def test_another_host_receives_nothing_until_the_user_allows_clear_text(
    recorder: Recorder, environment: Mapping[str, str], tmp_path: Path
) -> None:
    environ = {**environment, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "sesame", "NO_PROXY": "*"}
    address = recorder.url(_own_address())
    for verb in (["status"], ["logs", "x"], ["submit", "c.yaml"]):
        done = call_python("-m", "distft", *verb, "--address", address, cwd=tmp_path, env=environ)
        assert (done.returncode, done.stdout) == (2, "")
        assert "in clear text" in done.stderr
    assert recorder.tokens == []
    assert status(address, "--allow-clear-text-token", cwd=tmp_path, env=environ) == 0
    assert set(recorder.tokens) == {"Bearer sesame"}


def _own_address() -> str:
    """This machine's address on its network; sends nothing to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no network")
        return str(probe.getsockname()[0])
