"""Where relative paths start, by how the run was started."""

from pathlib import Path

import pytest

from distft.cluster.places import Places
from distft.errors import ConfigError

HOME = Path("/home/somebody")
JOB = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}


def test_without_a_job_paths_start_here(tmp_path: Path) -> None:
    places = Places.find({}, cwd=tmp_path, home=HOME)
    assert places.outlasting("runs/a") == str(tmp_path / "runs/a")
    assert places.hint() == ""


def test_a_job_reads_its_upload_and_writes_to_where_ray_deletes_nothing(tmp_path: Path) -> None:
    places = Places.find(JOB, cwd=tmp_path, home=HOME)
    assert places.working_dir == tmp_path
    assert places.outlasting("runs/a") == "/home/somebody/distft/runs/a"
    assert "DISTFT_RUN_ROOT" in places.hint()


@pytest.mark.parametrize("environ", [{}, JOB])
def test_a_root_that_is_set_holds_for_everything(environ: dict[str, str], tmp_path: Path) -> None:
    places = Places.find({**environ, "DISTFT_RUN_ROOT": str(tmp_path)}, cwd=Path("/elsewhere"), home=HOME)
    assert places.working_dir == tmp_path
    assert places.outlasting("runs/a") == str(tmp_path / "runs/a")


@pytest.mark.parametrize("path", ["/shared/runs/a", "s3://bucket/runs/a"])
@pytest.mark.parametrize("environ", [{}, JOB])
def test_absolute_paths_and_urls_stay_what_they_are(
    environ: dict[str, str], path: str, tmp_path: Path
) -> None:
    assert Places.find(environ, cwd=tmp_path, home=HOME).outlasting(path) == path


@pytest.mark.parametrize("root", ["relative", "/not/there"])
def test_a_root_that_nodes_cannot_share_is_refused(root: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=root):
        Places.find({"DISTFT_RUN_ROOT": root}, cwd=tmp_path, home=HOME)
