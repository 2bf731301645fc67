"""From our settings to DeepSpeed's JSON: one pure function. Users never write that JSON."""

from typing import Any, Literal

from pydantic import Field, model_validator

from distft.engine.interface import EngineSettings, Precision
from distft.topology import BatchPlan

_LONG_NAMES: dict[Precision, str] = {"fp32": "fp32", "bf16": "bf16", "fp16": "fp16"}
# What we decide ourselves; a passed-through key that touches these would contradict the run's own settings.
_OWNED = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "fp16",
    "bf16",
    "optimizer",
    "scheduler",
    "data_types",
    "communication_data_type",
    "zero_force_ds_cpu_optimizer",
}
_OWNED_ZERO = {"stage", "offload_optimizer", "offload_param"}

Offload = Literal["none", "cpu"]


class ZeroConfig(EngineSettings):
    """DeepSpeed ZeRO: state divided among ranks, the more the higher the stage."""

    type: Literal["zero"] = "zero"
    zero_stage: Literal[0, 1, 2, 3] = (
        1  # 0: nothing is divided; 1: moments and masters; 2: gradients; 3: weights
    )
    reduce_dtype: Precision = "fp32"  # in which gradients are summed over ranks
    offload_optimizer: Offload = "none"  # where masters and moments are kept
    offload_param: Offload = "none"  # where a stage-3 rank keeps its part of the weights
    reduce_bucket_size: int = Field(default=50_000_000, gt=0)  # elements in one reduction
    overlap_comm: bool = False  # reduce while the backward goes on; for NCCL
    deepspeed: dict[str, Any] = Field(default_factory=dict)  # further keys of DeepSpeed's own configuration

    @model_validator(mode="after")
    def _consistent(self) -> "ZeroConfig":
        faults = []
        if self.offload_optimizer != "none" and self.zero_stage == 0:
            faults.append(
                "offload_optimizer needs zero_stage 1, 2 or 3: at stage 0 DeepSpeed offloads nothing"
            )
        if self.offload_param != "none" and self.zero_stage != 3:
            faults.append(f"offload_param needs zero_stage 3, not {self.zero_stage}")
        if self.compile and self.zero_stage == 3:
            faults.append(
                "compile does not go with zero_stage 3, whose weights come and go; use stage 1 or 2"
            )
        owned = sorted(_OWNED & self.deepspeed.keys())
        zero_section = self.deepspeed.get("zero_optimization", {})
        if not isinstance(zero_section, dict):
            faults.append("deepspeed.zero_optimization must be a mapping")
        else:
            owned += [f"zero_optimization.{key}" for key in sorted(_OWNED_ZERO & zero_section.keys())]
        faults += [f"deepspeed.{key} is set by distft's own settings; remove it" for key in owned]
        if faults:
            raise ValueError("; ".join(faults))
        return self


def deepspeed_config(settings: ZeroConfig, plan: BatchPlan, *, max_grad_norm: float | None) -> dict[str, Any]:
    """DeepSpeed's configuration for a run. Pure: the same arguments give the same JSON."""
    zero: dict[str, Any] = {
        "stage": settings.zero_stage,
        "reduce_bucket_size": settings.reduce_bucket_size,
        "allgather_bucket_size": settings.reduce_bucket_size,
        "overlap_comm": settings.overlap_comm,
        # Staging buffers pay for themselves where gradients cross ranks; on one rank they are mere copies.
        "contiguous_gradients": plan.dp_world_size > 1,
        "reduce_scatter": plan.dp_world_size > 1,
        **settings.deepspeed.get("zero_optimization", {}),
    }
    if settings.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": settings.offload_optimizer}
    if settings.offload_param != "none":
        zero["offload_param"] = {"device": settings.offload_param}
    config: dict[str, Any] = {
        # Only the accumulation count means anything to DeepSpeed here: the shares of a batch may be uneven.
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on a CPU, with no JIT build
        "communication_data_type": _LONG_NAMES[settings.reduce_dtype],
        "steps_per_print": None,
    }
    if not (settings.zero_stage == 0 and settings.param_dtype == "fp32"):
        config["gradient_clipping"] = max_grad_norm or 0.0  # else we clip: DeepSpeed would not tell the norm
    if settings.param_dtype == "bf16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
    if settings.param_dtype == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": 1.0}  # the run's own loss scale overrides it
    if settings.zero_stage > 0:  # stage 0 accumulates in the model's own type, and offers no other
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    extra = {key: value for key, value in settings.deepspeed.items() if key != "zero_optimization"}
    return {**config, **extra}
