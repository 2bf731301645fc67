"""The resources that a run requests from a Ray cluster; other launchers ignore them."""

from typing import Literal, Self

from pydantic import Field, model_validator

from distft.config import Settings

MOST_SECONDS = 1e8  # three years; clocks and timers overflow at some length


class ElasticWorkers(Settings):
    """Run on as many workers as the cluster has capacity for, from `min` to `max`."""

    min: int = Field(default=1, ge=1)
    max: int = Field(ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min={self.min} is more than max={self.max}")
        return self


class ClusterConfig(Settings):
    """Workers of one rank each, their resources, and when they are restarted."""

    workers: int | ElasticWorkers = 1
    cpus_per_worker: float = Field(default=1.0, gt=0)
    gpus_per_worker: float = Field(default=0.0, ge=0)
    memory_bytes_per_worker: int | None = Field(default=None, ge=1)  # null: no request
    accelerator_type: str | None = None  # Ray's name, such as H100; null: any
    # PACK: on as few nodes as possible; SPREAD: on many; STRICT_PACK: on one; STRICT_SPREAD: each on its own.
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    network_interface: str | None = None  # for gloo and NCCL, such as eth1; null: their choice
    env: dict[str, str] = Field(default_factory=dict)  # environment variables of the workers; not for secrets
    # Restarts from the last checkpoint after consecutive failures with no new checkpoint between them.
    max_failures: int = Field(default=3, ge=0)
    start_timeout_s: float = Field(
        default=300.0, gt=0, le=MOST_SECONDS
    )  # to wait for capacity for the workers
    grow_check_s: float = Field(
        default=10.0, gt=0, le=MOST_SECONDS
    )  # elastic: seconds between checks for more capacity

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        if isinstance(self.workers, int):
            if self.workers < 1:
                problems.append(f"workers={self.workers}: at least one is needed")
        elif self.placement.startswith("STRICT"):
            problems.append(
                f"placement={self.placement} with elastic workers: Ray counts resources, not nodes. Request "
                "all CPUs or GPUs of a node for each worker, with placement=SPREAD"
            )
        if self.accelerator_type is not None and self.gpus_per_worker == 0:
            problems.append(f"accelerator_type={self.accelerator_type}, but gpus_per_worker=0")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def min_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers.min

    @property
    def max_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers.max

    @property
    def is_elastic(self) -> bool:
        return self.min_workers < self.max_workers
