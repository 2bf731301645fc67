"""A directory that is too large to be uploaded is refused before it is sent."""

from pathlib import Path

import pytest

from distft.cluster.client import upload
from distft.cluster.client.upload import check_upload
from distft.errors import ConfigError


@pytest.fixture(autouse=True)
def _small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "MAX_BYTES", 100 << 10)


def _write(path: Path, kib: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(kib << 10))


def test_the_largest_files_and_what_is_left_without_them_are_named(tmp_path: Path) -> None:
    _write(tmp_path / "data/shards.bin", 200)
    _write(tmp_path / "weights.pt", 90)
    for number in range(9):
        _write(tmp_path / f"code_{number}.py", 1)
    with pytest.raises(ConfigError) as caught:
        check_upload(tmp_path)
    message, *largest = str(caught.value).splitlines()
    assert f"{tmp_path} is too large to be uploaded: it has 0.3 MiB, and Ray takes less than" in message
    assert ".gitignore" in message
    assert "without the 5 largest files, 0.0 MiB are left" in message
    assert [line.split()[-1] for line in largest][:2] == ["data/shards.bin", "weights.pt"]
    assert len(largest) == 5


def test_files_that_gitignore_names_do_not_count(tmp_path: Path) -> None:
    _write(tmp_path / "data/shards.bin", 200)
    _write(tmp_path / "code.py", 1)
    (tmp_path / ".gitignore").write_text("data/\n")
    check_upload(tmp_path)
