"""What a run needs: memory, checkpoints, steps and time. `distft config check` prints it."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import lcm, prod
from typing import Any

from distft.checkpoint.config import CheckpointConfig
from distft.engine.deepspeed_config import ZeroConfig
from distft.engine.quantized_weights import quantizable_weights
from distft.engine.state_bytes import StateBytes, checkpoint_bytes, state_bytes
from distft.optim.groups import parameter_groups
from distft.run.config import RunConfig
from distft.run.model import build_module
from distft.run.phases import each_phase, run_flops
from distft.run.run_inputs import RunInputs
from distft.topology import BatchPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """What the user expects of the machine; no arithmetic gives it."""

    mfu: float  # share of the peak that the run reaches
    peak_tflops: float  # of one rank's device, in the run's param_dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class RunNeeds:
    """Exact numbers of a run on a number of ranks."""

    world_size: int
    num_parameters: int
    num_active: int  # of these, what one token passes through: not the experts that it leaves out
    num_trainable: int
    num_steps: int
    num_tokens: int  # positions of the rows of all steps
    num_epochs: float
    flops: float  # of all ranks
    state: StateBytes
    checkpoint_bytes: int  # of a commit, with the frozen weights
    shared_bytes: int  # of these, the frozen weights, which all commits share
    num_kept: int  # commits at the end of the run
    hours: float | None  # None: without `Speed`

    @property
    def kept_bytes(self) -> int:
        """Of all commits that are kept to the end."""
        return self.num_kept * (self.checkpoint_bytes - self.shared_bytes) + self.shared_bytes

    def as_json(self) -> dict[str, Any]:
        """The numbers, by name."""
        state = self.state
        return {
            "world_size": self.world_size,
            "parameters": {
                "all": self.num_parameters,
                "active": self.num_active,
                "trainable": self.num_trainable,
            },
            "length": {
                "steps": self.num_steps,
                "tokens": self.num_tokens,
                "epochs": self.num_epochs,
                "flops": self.flops,
                "hours": self.hours,
            },
            "bytes_per_rank": {
                "weights": state.weights,
                "gradients": state.gradients,
                "optimizer": state.optimizer,
                "buffers": state.buffers,
                "total": state.total,
                "of_it_on_host": state.offloaded,
            },
            "checkpoint_bytes": {
                "each": self.checkpoint_bytes,
                "kept": self.kept_bytes,
                "num_kept": self.num_kept,
            },
        }


def run_needs(inputs: RunInputs, plan: BatchPlan, speed: Speed | None) -> RunNeeds:
    """What the run of these inputs needs on `plan.dp_world_size` ranks."""
    config, num_steps, world_size = inputs.config, inputs.total_steps, plan.dp_world_size
    numel = {name: prod(shape) for name, shape in inputs.shapes.items()}
    state, own, shared = _largest_state(inputs, world_size)
    flops, hours = run_flops(inputs), None
    if speed is not None:
        hours = flops / (world_size * speed.peak_tflops * 1e12 * speed.mfu) / 3600
    return RunNeeds(
        world_size=world_size,
        num_parameters=sum(numel.values()),
        num_active=sum(numel.values()) - inputs.model.num_idle_parameters,
        num_trainable=sum(numel[name] for name in inputs.trainable),
        num_steps=num_steps,
        num_tokens=num_steps * plan.global_batch_tokens,
        num_epochs=inputs.num_epochs,
        flops=flops,
        state=state,
        checkpoint_bytes=own + shared,
        shared_bytes=shared,
        num_kept=num_kept_commits(config.checkpoint, num_steps),
        hours=hours,
    )


def _largest_state(inputs: RunInputs, world_size: int) -> tuple[StateBytes, int, int]:
    """Bytes a rank, of a commit and of the frozen weights, in the phase that needs most memory."""
    found = []
    widths = inputs.model.widths(inputs.shapes)
    quantizable: Collection[str] = ()
    if inputs.config.engine.frozen_bits is not None:
        quantizable = quantizable_weights(build_module(inputs.model, inputs.heads, inputs.config.lora))
    for phase in each_phase(inputs):
        config = phase.config
        groups = parameter_groups(inputs.shapes, phase.trainable, config.optim, {}, widths)
        state = state_bytes(
            inputs.shapes, groups, config.engine, config.optim, world_size, quantizable=quantizable
        )
        own, shared = checkpoint_bytes(inputs.shapes, groups, config.optim, inputs.original_bytes)
        refers = inputs.init_from is not None and config.lora is not None and not config.lora.copies_base
        found.append((state, own, 0 if refers else shared))
    return max(found, key=lambda entry: entry[0].total)


def num_kept_commits(config: CheckpointConfig, num_steps: int) -> int:
    """How many commits are there after the last step, if the run saves as configured."""
    saved = {num_steps}
    if config.every_steps is not None:
        # Only the last `keep_last` multiples are looked at: a run may have millions.
        last = num_steps // config.every_steps
        saved |= {
            multiple * config.every_steps for multiple in range(max(1, last - config.keep_last), last + 1)
        }
    newest = sorted(saved)[-config.keep_last :]
    if config.keep_every_steps is None:
        return len(newest)
    every = lcm(config.keep_every_steps, config.every_steps or num_steps)
    is_last_kept = num_steps % config.keep_every_steps == 0 and num_steps % every != 0
    older = num_steps // every + is_last_kept
    return older + sum(step % config.keep_every_steps != 0 for step in newest)


def describe_needs(needs: RunNeeds, config: RunConfig, speed: Speed | None) -> Iterator[str]:
    """A short table."""
    state, engine = needs.state, config.engine
    where = f"at ZeRO stage {engine.zero_stage}" if isinstance(engine, ZeroConfig) else "on one rank"
    buffers = f", buffers {show_bytes(state.buffers)}" if state.buffers else ""
    yield (
        f"length      {needs.num_steps:,} steps, {needs.num_tokens:,} tokens, {needs.num_epochs:.2f} epochs, "
        f"{needs.flops:.2e} FLOPs"
    )
    yield (
        f"memory      {show_bytes(state.total)} a rank {where}, besides activations: weights "
        f"{show_bytes(state.weights)}, gradients {show_bytes(state.gradients)}, optimizer "
        f"{show_bytes(state.optimizer)}{buffers}"
    )
    if state.offloaded:
        yield f"            {show_bytes(state.offloaded)} of it in the host's memory"
    commits = f"{needs.num_kept:,} commit{'s' * (needs.num_kept != 1)}"
    yield (
        f"checkpoint  {show_bytes(needs.checkpoint_bytes)} each; {show_bytes(needs.kept_bytes)} for the "
        f"{commits} kept in the end, and one more while it saves"
    )
    if speed is None or needs.hours is None:
        yield "time        depends on the machine: give --mfu and --peak-tflops"
    else:
        time = show_hours(needs.hours)
        yield f"time        {time} at {speed.mfu:.0%} of {speed.peak_tflops:g} TFLOP/s a rank"


def show_hours(hours: float) -> str:
    """In hours, minutes or seconds, whichever is at least one of them."""
    if hours >= 1:
        return f"{hours:,.1f} hours"
    if hours * 60 >= 1:
        return f"{hours * 60:.1f} minutes"
    return f"{hours * 3600:.1f} seconds" if hours * 3600 >= 1 else "less than a second"


def show_bytes(num_bytes: int) -> str:
    """Such as 3.42 GB, in decimal units."""
    size, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}" if size < 1000 else f"{size:,.0f} {unit}"
