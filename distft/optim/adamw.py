"""AdamW and what goes with its updates: schedule, clipping, decay, rates of single parameters."""

from typing import Annotated, Literal

from pydantic import Field

from distft.config import Settings
from distft.optim.schedules import CosineConfig, ScheduleConfig

Beta = Annotated[float, Field(ge=0, lt=1)]
Scale = Annotated[float, Field(gt=0, allow_inf_nan=False)]  # multiple of the learning rate


class AdamWConfig(Settings):
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019)."""

    type: Literal["adamw"] = "adamw"
    peak_lr: float = Field(3e-4, gt=0, allow_inf_nan=False)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(0.1, ge=0, allow_inf_nan=False)  # of matrices only
    decay_embeddings: bool = False  # whether embedding tables count as matrices
    max_grad_norm: float | None = Field(1.0, gt=0, allow_inf_nan=False)  # global; null: no clipping
    schedule: ScheduleConfig = CosineConfig()
    lr_scales: dict[str, Scale] = Field(default_factory=dict)  # by glob pattern; the last that matches counts

    def lr(self, step: int, total_steps: int) -> float:
        """The learning rate of update `step`, from 0, before any parameter's own scale."""
        return self.peak_lr * self.schedule.factor(step, total_steps)
