"""Phases of a run, such as those of gradual unfreezing: each trains its own parameters at its own rates.

A phase ends with a commit, and the next one starts from it as a resumed run does. So weights, moments and
update counts go on by name, at any world size and stage.
"""

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from distft.config import parse
from distft.errors import ConfigError, ErrorCollector
from distft.optim.patterns import block_of, select_trainable
from distft.run.phase_config import PhaseConfig
from distft.train.schedule import steps_of_epochs

if TYPE_CHECKING:
    from distft.run.config import RunConfig
    from distft.run.run_inputs import RunInputs


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseSpan:
    """Steps [start, stop) of the run that one phase trains with one set of parameters."""

    index: int  # of the phase, from 0
    phase_start: int
    phase_stop: int  # the latest; a phase that stalls ends earlier
    start: int
    stop: int
    draw: int = 0  # how often the phase has drawn its random blocks before


def _num_steps(inputs: "RunInputs", phase: PhaseConfig) -> int | None:
    """Its length in optimizer steps; None: not limited."""
    if phase.epochs is None:
        return phase.steps
    return steps_of_epochs(phase.epochs, inputs.train.num_sequences, inputs.config.batch.global_batch_size)


def span_at(inputs: "RunInputs", phase_starts: Sequence[int], step: int) -> PhaseSpan:
    """The span that trains the step after `step`. `phase_starts` of the phases so far; empty: the first."""
    phases, total_steps = inputs.config.phases, inputs.total_steps
    starts = phase_starts or (0,)
    index = min(len(starts), max(len(phases), 1)) - 1
    start, stop = starts[index], total_steps
    if not phases:
        return PhaseSpan(index=0, phase_start=0, phase_stop=stop, start=0, stop=stop)
    length = _num_steps(inputs, phases[index])
    if length is not None:
        stop = min(start + length, total_steps)
    blocks = phases[index].random_blocks
    if blocks is None:
        return PhaseSpan(index=index, phase_start=start, phase_stop=stop, start=start, stop=stop)
    draw = (step - start) // blocks.every_steps
    first = start + draw * blocks.every_steps
    return PhaseSpan(
        index=index,
        phase_start=start,
        phase_stop=stop,
        start=first,
        stop=min(first + blocks.every_steps, stop),
        draw=draw,
    )


def inputs_of_span(inputs: "RunInputs", span: PhaseSpan) -> "RunInputs":
    """The run's inputs with the settings of one phase, and its trainable parameters."""
    if not inputs.config.phases:
        return inputs
    phase = inputs.config.phases[span.index]
    config = config_of_phase(inputs.config, span.index)
    trainable = _selected(inputs, config, span.index)
    if phase.random_blocks is not None:
        trainable = _with_random_blocks(
            trainable, phase.random_blocks.num_blocks, (config.seed, span.index, span.draw)
        )
    assert config.model is not None
    return replace(inputs, config=config, model=config.model, trainable=trainable)


def trainable_in_any(inputs: "RunInputs") -> set[str]:
    """The parameters that some phase trains."""
    indices = range(len(inputs.config.phases))
    return set().union(*(_selected(inputs, config_of_phase(inputs.config, i), i) for i in indices))


def _selected(inputs: "RunInputs", config: "RunConfig", index: int) -> set[str]:
    with _before_each_line(f"phases.{index}."):
        return select_trainable(inputs.shapes, config.trainable)


@contextmanager
def _before_each_line(prefix: str) -> Iterator[None]:
    """Put `prefix` before each problem that a `ConfigError` lists."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError("\n".join(f"{prefix}{line}" for line in str(error).splitlines())) from None


def config_of_phase(config: "RunConfig", index: int) -> "RunConfig":
    """The run's configuration with the settings of one phase. Raises `ConfigError` for wrong ones."""
    phase, where = config.phases[index], f"phases.{index}"
    errors = ErrorCollector()
    changes: dict[str, Any] = {}
    if phase.trainable is not None:
        changes["trainable"] = phase.trainable
    if phase.optim:
        with errors.collect():
            merged = {**config.optim.model_dump(mode="json"), **phase.optim}
            changes["optim"] = parse(type(config.optim), merged, where=f"{where}.optim")
    if phase.dropout is not None and config.model is not None:
        changes["model"] = config.model.model_copy(update={"dropout": phase.dropout})
    if phase.label_smoothing is not None:
        if "label_smoothing" in type(config.objective).model_fields:
            smoothed = {"label_smoothing": phase.label_smoothing}
            changes["objective"] = config.objective.model_copy(update=smoothed)
        else:
            with errors.collect():
                raise ConfigError(
                    f"{where}.label_smoothing: objective.type={getattr(config.objective, 'type', '')} has no "
                    "label_smoothing: leave it out."
                )
    errors.raise_if_any()
    return config.model_copy(update=changes)


def lr_at(config: "RunConfig", span: PhaseSpan, total_steps: int, step: int) -> float:
    """The learning rate of a step of `span`, whose settings are `config`, before a group's scale.

    A phase that has a schedule of its own runs it over its own steps.
    """
    phases = config.phases
    if phases and "schedule" in phases[span.index].optim:
        return config.optim.lr(step - span.phase_start, span.phase_stop - span.phase_start)
    return config.optim.lr(step, total_steps)


def check_phases(inputs: "RunInputs") -> None:
    """Raise one `ConfigError` with everything that is wrong with the phases of a run."""
    errors = ErrorCollector()
    phases, end = inputs.config.phases, 0
    before: RunInputs | None = None
    for index, phase in enumerate(phases):
        span = PhaseSpan(index=index, phase_start=end, phase_stop=end, start=end, stop=end)
        own = None
        with errors.collect():
            own = inputs_of_span(inputs, span)
        if own is not None and before is not None and _is_same(before, own) and not phase.random_blocks:
            with errors.collect():
                raise ConfigError(
                    f"phases.{index} trains the same parameters with the same settings as the phase before: "
                    "leave it out, or set its trainable or optim."
                )
        before = own
        length = _num_steps(inputs, phase)
        if own is not None:
            with errors.collect():
                _check_phase(inputs, own, index, length)
        end += length or 1
        if end > inputs.total_steps:
            with errors.collect():
                start = end - (length or 1)
                problem = "has no room: it begins" if start >= inputs.total_steps else "is too long: it ends"
                raise ConfigError(
                    f"phases.{index} {problem} at step {start if start >= inputs.total_steps else end:,} of "
                    f"{inputs.total_steps:,}. Shorten the phases, or train longer."
                )
            break
    errors.raise_if_any()


def each_phase(inputs: "RunInputs") -> list["RunInputs"]:
    """The inputs of each phase from its first step on; of a run without phases, of the run."""
    return [inputs_of_span(inputs, span) for span in _latest_spans(inputs)]


def _latest_spans(inputs: "RunInputs") -> list[PhaseSpan]:
    """Each phase as a whole, if none stalls."""
    spans, start = [], 0
    for index, phase in enumerate(inputs.config.phases or (PhaseConfig(),)):
        length, stop = _num_steps(inputs, phase), inputs.total_steps
        if length is not None:
            stop = min(start + length, stop)
        spans.append(PhaseSpan(index=index, phase_start=start, phase_stop=stop, start=start, stop=stop))
        start = stop
    return spans


def run_flops(inputs: "RunInputs") -> float:
    """FLOPs of the whole run, if every row holds one document and no phase stalls."""
    if not inputs.config.phases:
        return inputs.run_flops
    spans = _latest_spans(inputs)
    of_phases = [inputs_of_span(inputs, span).run_flops * (span.stop - span.start) for span in spans]
    return sum(of_phases) / inputs.total_steps


def describe_phases(inputs: "RunInputs") -> list[str]:
    """A line for each phase: its steps and how much it trains."""
    if not inputs.config.phases:
        return []
    lines = []
    for phase, span in zip(inputs.config.phases, _latest_spans(inputs), strict=True):
        own = inputs_of_span(inputs, span)
        numel = sum(math.prod(inputs.shapes[name]) for name in own.trainable)
        until = "" if phase.until_stalled is None else f", or until {phase.until_stalled.metric} stalls"
        if span.start == span.stop:
            until = ", unless the phase before stalls earlier"
        lines.append(f"steps {span.start:,} to {span.stop:,}{until}: {numel:,} trainable parameters")
    return lines


def _is_same(one: "RunInputs", other: "RunInputs") -> bool:
    same_patterns = {"trainable": other.config.trainable}  # others may select the same parameters
    return one.trainable == other.trainable and one.config.model_copy(update=same_patterns) == other.config


def _check_phase(inputs: "RunInputs", own: "RunInputs", index: int, length: int | None) -> None:
    from distft.optim.groups import parameter_groups

    phase, where = inputs.config.phases[index], f"phases.{index}"
    with _before_each_line(f"{where}: "):
        widths = inputs.model.widths(inputs.shapes)
        parameter_groups(inputs.shapes, own.trainable, own.config.optim, {}, widths)
        if "schedule" in phase.optim and length is not None:
            own.config.optim.schedule.check(length)
    if phase.random_blocks is None:
        return
    known = _blocks(_selected(inputs, own.config, index))
    if len(known) < phase.random_blocks.num_blocks:
        raise ConfigError(
            f"{where}.random_blocks.num_blocks={phase.random_blocks.num_blocks} is more than the "
            f"{len(known)} blocks with trainable parameters."
        )


def _with_random_blocks(trainable: set[str], num_blocks: int, key: tuple[int, ...]) -> set[str]:
    """Without the blocks that are not drawn; the draw is a function of `key`."""
    blocks = sorted(_blocks(trainable))
    drawn = set(random.Random(repr(key)).sample(blocks, min(num_blocks, len(blocks))))
    return {name for name in trainable if (block := block_of(name)) is None or block in drawn}


def _blocks(names: Iterable[str]) -> set[str]:
    """The blocks that these parameters are of."""
    return {block for name in names if (block := block_of(name)) is not None}
