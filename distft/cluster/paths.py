"""Where the relative paths of a configuration start, on this machine and in a job on a cluster."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from distft import storage
from distft.cluster.ray_internals import is_submitted_job
from distft.errors import ConfigError

RUN_ROOT = "DISTFT_RUN_ROOT"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPaths:
    """Base directories of a run's relative paths. They differ because Ray deletes an upload after the job."""

    working_dir: Path  # of paths that are read
    run_root: Path  # of paths that are written, such as run_dir
    is_uploaded: bool  # Ray copied working_dir to every node, at a path of the node's own

    @classmethod
    def find(cls, environ: Mapping[str, str], *, cwd: Path, home: Path) -> "RunPaths":
        """DISTFT_RUN_ROOT if set; else, in a Ray job, the uploaded `cwd` and `home`/distft; else `cwd`.

        Raises `ConfigError` if DISTFT_RUN_ROOT is not an absolute path of a directory.
        """
        if root := environ.get(RUN_ROOT):
            if not Path(root).is_absolute():
                raise ConfigError(
                    f"{RUN_ROOT}={root} is not an absolute path: give one, so that every node finds the same "
                    "directory."
                )
            if not Path(root).is_dir():
                raise ConfigError(
                    f"{RUN_ROOT}={root} is not a directory on this machine: create it, or name another."
                )
            return cls(working_dir=Path(root), run_root=Path(root), is_uploaded=False)
        if is_submitted_job(environ):
            return cls(working_dir=cwd, run_root=home / "distft", is_uploaded=True)
        return cls(working_dir=cwd, run_root=cwd, is_uploaded=False)

    def output_path(self, path: str) -> str:
        """`path` as every worker can write to it: absolute, or a URL."""
        local = storage.local_path(path)
        return path if local is None else str(self.run_root / local)

    def missing_file_hint(self) -> str:
        """Advice for an error that a missing file may have caused; empty unless the files were uploaded."""
        if not self.is_uploaded:
            return ""
        return (
            "Relative paths of this job start in its copy of the submitted directory, without the files that "
            f".gitignore names: give absolute paths, or set {RUN_ROOT} to a directory that all nodes have "
            "(`distft submit` does so if the cluster's head is the machine that it runs on)."
        )
