"""A live report: it follows the run, gives nothing else, and answers no other site."""

import http.client
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from distft.cli.main import main
from distft.errors import ConfigError
from distft.report.server import ReportServer


@pytest.fixture
def folder(runs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs / "first", tmp_path / "run"))


@pytest.fixture
def server(folder: Path) -> Iterator[ReportServer]:
    found = ReportServer([folder])
    thread = threading.Thread(target=found.serve)
    thread.start()
    yield found
    found.close()
    thread.join()


def _get(server: ReportServer, path: str, host: str | None = None, method: str = "GET") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request(method, path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, body


def _update(server: ReportServer, version: str) -> dict[str, object]:
    status, body = _get(server, f"/update?version={version}")
    assert status == 200
    return json.loads(body)  # type: ignore[no-any-return]


def test_the_page_follows_the_run(server: ReportServer, folder: Path) -> None:
    status, page = _get(server, "/")
    assert status == 200
    assert b"connect-src 'self'" in page
    first = _update(server, "")
    assert {"version", "note", "body", "charts"} == first.keys()
    assert _update(server, str(first["version"])).keys() == {"version", "note"}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4321, "loss": 0.5}\n')
    second = _update(server, str(first["version"]))
    assert "4,321" in str(second["body"])
    assert "4,321" not in str(first["body"])
    (folder / "config.yaml").write_text("a: [")  # while it is damaged, the last state is shown
    third = _update(server, str(second["version"]))
    assert third["version"] == second["version"]
    assert "config.yaml" in str(third["note"])


@pytest.mark.parametrize(
    "path", ["/config.yaml", "/../config.yaml", "/x", "/update/x", "/%2e%2e/metrics.jsonl"]
)
def test_no_file_is_served(server: ReportServer, path: str) -> None:
    assert _get(server, path)[0] == 404


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1", "localhost:1", ""])
def test_a_request_to_another_name_is_refused(server: ReportServer, host: str) -> None:
    status, body = _get(server, "/", host.format(port=server.port))
    assert status == 421
    assert b"loss" not in body
    assert _get(server, "/", f"localhost:{server.port}")[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS"])
def test_only_get_is_answered(server: ReportServer, method: str) -> None:
    assert _get(server, "/", method=method)[0] == 501


def test_mistakes_are_told_before_anything_is_served(
    runs: Path, server: ReportServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=f"--port {server.port} cannot be used"):
        ReportServer([runs / "first"], server.port)
    with pytest.raises(ConfigError, match="is no directory, so no run"):
        ReportServer([tmp_path / "nowhere"])
    for arguments in ([], ["--serve", "-o", str(tmp_path / "x.html")]):
        assert main(["report", str(runs / "first"), *arguments]) == 2
        assert "Name either a file with -o, such as report.html, or --serve." in capsys.readouterr().err
