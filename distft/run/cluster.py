"""What a run asks of a cluster; other launchers do not look at it."""

from pydantic import Field

from distft.config import Settings


class ClusterConfig(Settings):
    """Workers, one rank each, and what becomes of the run when some of them fail."""

    num_workers: int = Field(default=1, ge=1)
    cpus_per_worker: float = Field(default=1.0, gt=0)
    gpus_per_worker: float = Field(default=0.0, ge=0)
    env: dict[str, str] = Field(default_factory=dict)  # environment variables of the workers; no secrets
    max_failures: int = Field(default=0, ge=0)  # times that failed workers start again, from the last commit
    start_timeout_s: float = Field(default=300.0, gt=0)  # to wait for free CPUs and GPUs
