"""Checks a run without using a device, and describes it."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from distft.data.streams import StreamsConfig
from distft.engine.deepspeed_config import ZeroConfig
from distft.engine.settings import LocalConfig
from distft.errors import ConfigError, DistftError, ErrorCollector
from distft.objective.mixture import Mixture
from distft.run.config import RunConfig
from distft.run.paths import check_paths
from distft.topology import BatchPlan, Topology

if TYPE_CHECKING:
    from distft.run.plan import RunNeeds
    from distft.run.run_inputs import RunInputs


def check_run(
    config: RunConfig, topology: Topology, cache_dir: str | None = None
) -> "tuple[BatchPlan, RunInputs]":
    """The run's batch plan and inputs. Raises one error with every problem that was found.

    Ranks that pass the same `cache_dir` encode labelled texts and completions once.
    """
    check_before_torch(config, topology)
    from distft.run.inputs import read_inputs
    from distft.run.samples import check_samples

    errors = ErrorCollector()
    with errors.collect():
        check_engine(config, topology)
    with errors.collect():
        plan = BatchPlan(dp_world_size=topology.axes.data, **config.batch.model_dump())
        _check_deepspeed(config, plan)
    with errors.collect():
        inputs = read_inputs(config, cache_dir)
    errors.raise_if_any()
    check_samples(inputs)
    return plan, inputs


def check_supervised_alone(
    inputs: "RunInputs", topology: Topology, cache_dir: str | None = None
) -> "tuple[BatchPlan, RunInputs] | None":
    """Batch plan and inputs of the run to train first. Raises the errors of `check_run`."""
    from distft.run.comparison import supervised_alone

    config = supervised_alone(inputs)
    if config is None:
        return None
    try:
        return check_run(config, topology, cache_dir)
    except DistftError as error:
        raise type(error)(
            "The run of supervised alone, which comes first (compare_with_supervised=false leaves it out), "
            f"cannot be: {error}"
        ) from error


def check_before_torch(config: RunConfig, topology: Topology) -> None:
    """Raise for wrong paths now, before torch is imported, which takes 2 s.

    Without wrong paths it raises nothing: `check_run` finds more, and raises all of it together.
    """
    errors = ErrorCollector()
    with errors.collect():
        check_engine(config, topology)
    with errors.collect():
        BatchPlan(dp_world_size=topology.axes.data, **config.batch.model_dump())
    with errors.collect():
        check_paths(config)
        return
    errors.raise_if_any()


def check_engine(config: RunConfig, topology: Topology) -> None:
    """Raise `ConfigError` if the engine cannot run on these ranks or is not installed."""
    if isinstance(config.engine, LocalConfig) and topology.world_size > 1:
        raise ConfigError(
            f"engine.type=local is one process, but {topology.world_size} ranks are to run: set "
            "engine.type=zero (zero_stage=0 for plain data parallelism), or start one rank "
            "(for `distft config check`: --world-size 1)."
        )
    if isinstance(config.engine, LocalConfig):
        return
    if find_spec("deepspeed") is None:
        raise ConfigError(
            "engine.type=zero needs deepspeed, which is not installed: install it, or set engine.type=local."
        )


def _check_deepspeed(config: RunConfig, plan: BatchPlan) -> None:
    """Raise `ConfigError` for values in `engine.deepspeed` that DeepSpeed refuses."""
    if (
        isinstance(config.engine, ZeroConfig)
        and config.engine.deepspeed
        and find_spec("deepspeed") is not None
    ):
        from distft.engine.deepspeed_check import ignored_deepspeed_keys

        ignored_deepspeed_keys(config.engine, plan)


def _describe_mixture(config: RunConfig) -> Iterator[str]:
    """The streams' shares and the objective's parts, if there are any."""
    if isinstance(config.data, StreamsConfig):
        shares = {name: stream.share for name, stream in config.data.streams.items()}
        of_what = "steps" if config.data.alternate else "sequences"
        shown = ", ".join(f"{name} {share / sum(shares.values()):.1%}" for name, share in shares.items())
        yield f"streams     of all {of_what}: {shown}"
    if isinstance(config.objective, Mixture):
        yield from (f"objective   {line}" for line in config.objective.describe())


def _describe_passes(inputs: "RunInputs") -> Iterator[str]:
    """How often a step runs the model on the rows of a sequence, where that is not once."""
    for name, (num_rows, passes) in inputs.passes.items():
        if num_rows > 1 or passes.forward_only:
            stream = f"{name}: " if name else ""
            yield (
                f"passes      {stream}a sequence takes {num_rows * passes.trained:g} with a gradient and "
                f"{num_rows * passes.forward_only:g} without"
            )


@dataclass(frozen=True, slots=True)
class CheckedRun:
    """A run that may start: its description, and what is odd about it."""

    lines: list[str]
    remarks: list[str]
    needs: "RunNeeds"


def describe_run(
    config: RunConfig, world_size: int, expected: "tuple[float, float] | None" = None
) -> CheckedRun:
    """Describe the run on `world_size` ranks. Raises the errors of `check_run`.

    `expected` of the machine: the share of its peak that the run reaches, and that peak in TFLOP/s a rank.
    Without it, the time is not estimated.
    """
    plan, inputs = check_run(config, Topology(world_size=world_size))
    import torch

    from distft.run.phases import describe_phases
    from distft.run.plan import Speed, describe_needs, run_needs
    from distft.run.remarks import remarks

    speed = None if expected is None else Speed(mfu=expected[0], peak_tflops=expected[1])
    needs = run_needs(inputs, plan, speed)
    ranks = f"{world_size:,} rank{'s' * (world_size > 1)}"
    num_micro = plan.gradient_accumulation_steps
    largest = min(plan.micro_batch_size, -(-plan.global_batch_size // world_size))
    tokenizer = inputs.tokenizer
    lines = [
        f"model       {needs.num_parameters:,} parameters, {needs.num_trainable:,} of them trainable"
        + (f", {needs.num_active:,} active for a token" if inputs.model.num_idle_parameters else ""),
        *(
            []
            if tokenizer is None
            else [f"tokenizer   {tokenizer.vocab_size:,} pieces, fingerprint {tokenizer.fingerprint}"]
        ),
        *(f"note        {note}" for note in inputs.notes),
        *(f"data        {line}" for line in inputs.train.summary.splitlines()),
        *_describe_mixture(config),
    ]
    if (alone := check_supervised_alone(inputs, Topology(world_size=world_size))) is not None:
        lines.append(
            f"first       {alone[1].total_steps:,} steps of {alone[0].global_batch_size} rows of the "
            f"labelled data alone, to compare with, in {alone[1].config.run_dir}"
        )
    if inputs.validation is not None:
        lines += [f"validation  {line}" for line in inputs.validation.summary.splitlines()]
    lines += [
        f"batch       {plan.global_batch_size} sequences of {plan.seq_len} tokens a step; on {ranks} "
        f"{num_micro} micro-batch{'es' * (num_micro > 1)} of at most {largest}",
        *_describe_passes(inputs),
        *(f"phase {number:<6}{line}" for number, line in enumerate(describe_phases(inputs), 1)),
        *describe_needs(needs, config, speed),
    ]
    return CheckedRun(lines, remarks(inputs, plan, has_gpu=torch.cuda.is_available()), needs)
