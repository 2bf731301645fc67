"""Where the relative paths of a configuration start, which a job on a cluster has to be told."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from distft import storage
from distft.errors import ConfigError

RUN_ROOT = "DISTFT_RUN_ROOT"
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the entry point of a submitted job


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Two directories: what a run reads is uploaded with a job, but what it writes must outlive the job."""

    working_dir: Path  # where relative paths start
    run_root: Path  # where a relative run_dir starts
    is_uploaded: bool  # working_dir is the job's own copy, at another place on every node

    @classmethod
    def find(cls, environ: Mapping[str, str], *, cwd: Path, home: Path) -> "Places":
        """The root that is set; for a job its upload and `home`/distft; for all others `cwd`.

        A job runs in a copy of the directory that was submitted, which Ray deletes afterwards.
        """
        if root := environ.get(RUN_ROOT):
            if not Path(root).is_absolute():
                raise ConfigError(f"{RUN_ROOT}={root} is not absolute: every node must find the same place.")
            if not Path(root).is_dir():
                raise ConfigError(f"{RUN_ROOT}={root} is not a directory here: make it, or name another.")
            return cls(working_dir=Path(root), run_root=Path(root), is_uploaded=False)
        if _JOB in environ:
            return cls(working_dir=cwd, run_root=home / "distft", is_uploaded=True)
        return cls(working_dir=cwd, run_root=cwd, is_uploaded=False)

    def outlasting(self, path: str) -> str:
        """`path`, to be written to, as every worker can use it: absolute, or a URL."""
        local = storage.local_path(path)
        return path if local is None else str(self.run_root / local)

    def hint(self) -> str:
        """What to say beside an error about a file that is not found; empty where nothing is to be said."""
        if not self.is_uploaded:
            return ""
        return (
            "Relative paths of this job start in its copy of the submitted directory, which lacks whatever "
            f".gitignore names: give absolute paths, or set {RUN_ROOT} to a directory that all nodes have "
            "(`distft submit` sets it to the one that it is called in, where the cluster is that machine)."
        )
