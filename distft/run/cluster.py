"""What a run asks of a cluster; other launchers do not look at it."""

from typing import Literal, Self

from pydantic import Field, model_validator

from distft.config import Settings


class ElasticWorkers(Settings):
    """A run that goes on with as many workers as there is room for, from `min` to `max`."""

    min: int = Field(default=1, ge=1)
    max: int = Field(ge=1)

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min={self.min} is more than max={self.max}")
        return self


class ClusterConfig(Settings):
    """Workers, one rank each, and what becomes of the run when some of them fail."""

    workers: int | ElasticWorkers = 1
    cpus_per_worker: float = Field(default=1.0, gt=0)
    gpus_per_worker: float = Field(default=0.0, ge=0)
    memory_bytes_per_worker: int | None = Field(default=None, ge=1)  # None: not asked for
    accelerator_type: str | None = None  # as Ray calls it, such as H100; None: any
    # PACK: on as few nodes as can be; SPREAD: on many; STRICT_SPREAD: each on a node of its own.
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    network_interface: str | None = None  # for gloo and NCCL, such as eth1; None: they choose
    env: dict[str, str] = Field(default_factory=dict)  # environment variables of the workers; no secrets
    # Failures in a row, without a commit between them, after which workers start again from the last commit.
    max_failures: int = Field(default=3, ge=0)
    start_timeout_s: float = Field(default=300.0, gt=0)  # to wait for room for the workers
    grow_check_s: float = Field(default=10.0, gt=0)  # elastic: how often to look for room for more workers

    @model_validator(mode="after")
    def _check(self) -> Self:
        faults = []
        if isinstance(self.workers, int):
            if self.workers < 1:
                faults.append(f"workers={self.workers}: at least one is needed")
        elif self.placement.startswith("STRICT"):
            faults.append(
                f"placement={self.placement} with elastic workers: Ray counts room, not nodes. Ask for all "
                "CPUs or GPUs of a node for each worker, with placement=SPREAD"
            )
        if self.accelerator_type is not None and self.gpus_per_worker == 0:
            faults.append(f"accelerator_type={self.accelerator_type}, but gpus_per_worker=0")
        if faults:
            raise ValueError("; ".join(faults))
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
