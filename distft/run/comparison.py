"""A mixture with unlabelled data beside the same run on its labelled data alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft import storage
from distft.data.streams import StreamsConfig
from distft.objective.mixture import Mixture
from distft.run.config import RunConfig
from distft.tracker import METRICS_FILE, Trackers, read_lines

if TYPE_CHECKING:
    from distft.run.run_inputs import RunInputs

SUPERVISED_ALONE = "supervised_alone"  # the directory of that run, in the run's own
# The metric that decides, the first of these that a part has; otherwise the loss.
_DECIDING = ("accuracy", "micro_f1", "spearman")


def supervised_alone(inputs: "RunInputs") -> RunConfig | None:
    """The run to train first: the labelled streams only, as many rows of them in all; None: no such.

    The shares of the streams give the batch, and the number of steps where a step's rows would not be whole.
    If streams alternate, they give the number of steps alone.
    """
    config = inputs.config
    parts, data = config.objective.supervised_parts, config.data
    if parts is None or not config.compare_with_supervised:
        return None
    assert isinstance(config.objective, Mixture)
    assert isinstance(data, StreamsConfig)  # as every mixture needs
    own = {name: stream for name, stream in data.streams.items() if name in parts}
    share = sum(s.share for s in own.values()) / sum(s.share for s in data.streams.values())
    batch, steps = config.batch, inputs.total_steps
    if data.alternate:
        steps = max(round(steps * share), 1)
    else:
        rows_of_step = batch.global_batch_size * share
        size = max(round(rows_of_step), 1)
        steps = max(round(steps * rows_of_step / size), 1)
        sizes = {"global_batch_size": size, "micro_batch_size": min(batch.micro_batch_size, size)}
        batch = batch.model_copy(update=sizes)
    validation = config.validation
    if isinstance(validation, StreamsConfig):
        kept = {name: stream for name, stream in validation.streams.items() if name in parts}
        validation = validation.model_copy(update={"streams": kept})
    directory = config.checkpoint.directory
    changes: dict[str, Any] = {
        "run_dir": storage.join(config.run_dir, SUPERVISED_ALONE),
        "data": data.model_copy(update={"streams": own}),
        "validation": validation,
        "batch": batch,
        "train": config.train.model_copy(update={"max_steps": steps, "num_epochs": None}),
        "objective": Mixture(parts={name: config.objective.parts[name] for name in parts}),
    }
    if directory is not None:
        own_directory = {"directory": storage.join(directory, SUPERVISED_ALONE)}
        changes["checkpoint"] = config.checkpoint.model_copy(update=own_directory)
    return config.model_copy(update=changes)


def log_comparison(config: RunConfig, trackers: Trackers) -> None:
    """Log for each labelled part both runs' last validation metrics, and which won."""
    run_dir = Path(config.run_dir)
    ours, theirs = _last_validation(run_dir), _last_validation(run_dir / SUPERVISED_ALONE)
    for part in config.objective.supervised_parts or ():
        names = [name for name in _DECIDING if f"validation/{part}/{name}" in ours.keys() & theirs.keys()]
        metric = [*names, "loss"][0]
        key = f"validation/{part}/{metric}"
        if key not in ours or key not in theirs:
            continue
        advantage = (ours[key] - theirs[key]) * (-1 if metric == "loss" else 1)
        won = "with unlabelled data" if advantage > 0 else "supervised alone" if advantage < 0 else "neither"
        trackers.event(
            "compared_with_supervised",
            part=part,
            metric=metric,
            with_unlabelled=ours[key],
            supervised_alone=theirs[key],
            won=won,
        )


def _last_validation(run_dir: Path) -> Mapping[str, float]:
    """The last value of each validation metric of a run."""
    last: dict[str, float] = {}
    for line in read_lines(run_dir / METRICS_FILE):
        last |= {name: value for name, value in line.items() if name.startswith("validation/")}
    return last
