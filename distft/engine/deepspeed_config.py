"""Settings of the ZeRO engine, and the DeepSpeed configuration that follows from them."""

from typing import Any, Literal

from pydantic import Field, model_validator

from distft.engine.settings import EngineSettings, Precision
from distft.topology import BatchPlan

# Keys that distft's own settings determine, so `engine.deepspeed` must not set them.
_RESERVED_KEYS = {
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
_RESERVED_ZERO_KEYS = {"stage", "offload_optimizer", "offload_param", "compute_grad_norm"}

Offload = Literal["none", "cpu"]


class ZeroConfig(EngineSettings):
    """DeepSpeed ZeRO: higher stages partition more of the training state among ranks."""

    type: Literal["zero"] = "zero"
    zero_stage: Literal[0, 1, 2, 3] = 1  # 1 partitions moments and masters, 2 also gradients, 3 also weights
    reduce_dtype: Precision = "fp32"  # of gradients when they are reduced over ranks
    offload_optimizer: Offload = "none"  # where master weights and moments are stored
    offload_param: Offload = "none"  # where stage 3 stores a rank's partition of the weights
    reduce_bucket_size: int = Field(default=50_000_000, gt=0)  # elements per reduction
    overlap_comm: bool | Literal["auto"] = "auto"  # reduce during the backward; auto: on a GPU
    deepspeed: dict[str, Any] = Field(default_factory=dict)  # further keys of DeepSpeed's configuration

    @model_validator(mode="after")
    def _check_combinations(self) -> "ZeroConfig":
        errors = []
        if self.offload_optimizer != "none" and self.zero_stage == 0:
            errors.append(
                "offload_optimizer needs zero_stage 1, 2 or 3: at stage 0 DeepSpeed offloads nothing"
            )
        if self.offload_param != "none" and self.zero_stage != 3:
            errors.append(f"offload_param needs zero_stage 3, not {self.zero_stage}")
        reserved = sorted(_RESERVED_KEYS & self.deepspeed.keys())
        zero_section = self.deepspeed.get("zero_optimization", {})
        if not isinstance(zero_section, dict):
            errors.append("deepspeed.zero_optimization must be a mapping")
        else:
            reserved += [
                f"zero_optimization.{key}" for key in sorted(_RESERVED_ZERO_KEYS & zero_section.keys())
            ]
        errors += [f"deepspeed.{key} is set by distft's own settings; remove it" for key in reserved]
        if errors:
            raise ValueError("; ".join(errors))
        return self


def clips_in_kernel(settings: ZeroConfig) -> bool:
    """Whether the optimizer's kernel clips and skips; otherwise DeepSpeed does, on the host.

    It does so at stage 3, for offloaded states, and in bf16 and fp16 at stage 0.
    """
    if settings.offload_optimizer != "none" or settings.zero_stage == 3:
        return False
    return settings.zero_stage > 0 or settings.param_dtype == "fp32"


def deepspeed_config(
    settings: ZeroConfig, plan: BatchPlan, *, is_cuda: bool, max_grad_norm: float | None
) -> dict[str, Any]:
    """DeepSpeed's configuration, as the JSON object that users of plain DeepSpeed write themselves."""
    overlap_comm = is_cuda if settings.overlap_comm == "auto" else settings.overlap_comm
    in_kernel = clips_in_kernel(settings)
    zero: dict[str, Any] = {
        "stage": settings.zero_stage,
        "reduce_bucket_size": settings.reduce_bucket_size,
        "allgather_bucket_size": settings.reduce_bucket_size,
        "overlap_comm": overlap_comm and plan.dp_world_size > 1,
        # Staging buffers speed up reductions over ranks; on one rank they only cost copies.
        "contiguous_gradients": plan.dp_world_size > 1,
        "reduce_scatter": plan.dp_world_size > 1,
        **settings.deepspeed.get("zero_optimization", {}),
    }
    if settings.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": settings.offload_optimizer}
    if settings.offload_param != "none":
        zero["offload_param"] = {"device": settings.offload_param}
    if in_kernel and settings.zero_stage > 0:
        # ZeroEngine computes it before the step. DeepSpeed's optimizer for bf16 at stage 1 cannot omit it.
        zero["compute_grad_norm"] = settings.zero_stage == 1 and settings.param_dtype == "bf16"
    config: dict[str, Any] = {
        # DeepSpeed uses these two only for the accumulation count: ranks may have batches of unequal size.
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on a CPU without a JIT build
        "communication_data_type": settings.reduce_dtype,
        "steps_per_print": None,
        "gradient_clipping": 0.0 if in_kernel else max_grad_norm or 0.0,  # without this key it is 1.0
        "timers": {"throughput": {"enabled": False}},  # it waits for the device at every micro-batch
    }
    if settings.param_dtype == "bf16":
        # `immediate_grad_update`: at stage 1 each gradient is added to its fp32 sum as soon as it is there,
        # which takes 4 bytes per parameter and not 6; at other stages it changes nothing.
        config["bf16"] = {
            "enabled": True,
            "check_grad_overflow": not in_kernel,
            "immediate_grad_update": True,
        }
    if settings.param_dtype == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": 1.0}  # ZeroEngine has its own, or overrides it
    if settings.zero_stage > 0:  # stage 0 can only accumulate in the model's own dtype
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    extra = {key: value for key, value in settings.deepspeed.items() if key != "zero_optimization"}
    return {**config, **extra}
