"""Where relative paths start, for each way of starting a run."""

from pathlib import Path

import pytest

from distft.cluster.paths import RunPaths
from distft.errors import ConfigError

HOME = Path("/home/somebody")
JOB = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}


def test_without_a_job_paths_start_in_the_current_directory(tmp_path: Path) -> None:
    paths = RunPaths.find({}, cwd=tmp_path, home=HOME)
    assert paths.output_path("runs/a") == str(tmp_path / "runs/a")
    assert paths.missing_file_hint() == ""


def test_a_job_reads_its_upload_and_writes_below_the_home_directory(tmp_path: Path) -> None:
    paths = RunPaths.find(JOB, cwd=tmp_path, home=HOME)
    assert paths.working_dir == tmp_path
    assert paths.output_path("runs/a") == "/home/somebody/distft/runs/a"
    assert "DISTFT_RUN_ROOT" in paths.missing_file_hint()


@pytest.mark.parametrize("environ", [{}, JOB])
def test_a_run_root_applies_to_input_and_output(environ: dict[str, str], tmp_path: Path) -> None:
    paths = RunPaths.find({**environ, "DISTFT_RUN_ROOT": str(tmp_path)}, cwd=Path("/elsewhere"), home=HOME)
    assert paths.working_dir == tmp_path
    assert paths.output_path("runs/a") == str(tmp_path / "runs/a")


@pytest.mark.parametrize("path", ["/shared/runs/a", "s3://bucket/runs/a"])
@pytest.mark.parametrize("environ", [{}, JOB])
def test_absolute_paths_and_urls_stay_unchanged(environ: dict[str, str], path: str, tmp_path: Path) -> None:
    assert RunPaths.find(environ, cwd=tmp_path, home=HOME).output_path(path) == path


@pytest.mark.parametrize("root", ["relative", "/not/there"])
def test_a_run_root_that_is_no_absolute_directory_is_refused(root: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=root):
        RunPaths.find({"DISTFT_RUN_ROOT": root}, cwd=tmp_path, home=HOME)
