"""One YAML file describes a run; the same file runs in one process, under a launcher, or on a cluster."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from distft.checkpoint.store import CheckpointConfig
from distft.config import Part, Settings, apply_overrides, load_yaml, parse
from distft.data.settings import DataConfig
from distft.engine.deepspeed_config import ZeroConfig
from distft.engine.local import LocalConfig
from distft.errors import ConfigError
from distft.model.config import ModelConfig
from distft.objective.settings import CausalLM, ObjectiveConfig
from distft.optim.adamw import AdamWConfig
from distft.run.cluster import ClusterConfig
from distft.tracker import TrackerConfig
from distft.train.loop import TrainConfig

EngineConfig = Annotated[LocalConfig | ZeroConfig, Part()]


class BatchConfig(Settings):
    """The batch, in sequences: what a step sees whatever the number of ranks, and what fits in memory."""

    global_batch_size: int = Field(ge=1)  # sequences per optimizer step, over all ranks
    micro_batch_size: int = Field(ge=1)  # sequences per rank per forward, at most
    seq_len: int = Field(ge=1)  # tokens per sequence


class EvaluationConfig(Settings):
    """When held-out data is looked at, and how much of it."""

    every_steps: int | None = Field(default=None, ge=1)  # besides the end of the run
    max_sequences: int | None = Field(default=None, ge=1)  # of each evaluation; None: all
    micro_batch_size: int | None = Field(default=None, ge=1)  # None: the training one


class RunConfig(Settings):
    """A whole run."""

    run_dir: str  # a directory for everything of the run; checkpoint.directory may lie elsewhere
    seed: int = 0  # of initial weights and dropout; the order of data has data_seed
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: int | None = Field(default=None, ge=1)  # of each rank's CPU work; None: torch's choice
    timeout_s: float = Field(default=600.0, gt=0)  # how long ranks wait for each other
    hang_timeout_s: float = Field(default=300.0, gt=0)  # silence or standstill that makes a rank a hung one
    heartbeat_s: float = Field(default=5.0, ge=0)  # between signs of life of each rank; 0: none are given
    tokenizer: str | None = None  # a .model file; None: the one beside the data or the checkpoint
    init_from: str | None = None  # a checkpoint, of any format, whose weights the run starts from, at step 0
    model: ModelConfig | None = None  # None: that of init_from
    trainable: tuple[str, ...] = ("*",)  # patterns over parameter names; "!pattern" takes away
    data: DataConfig
    validation: DataConfig | None = None
    batch: BatchConfig
    objective: ObjectiveConfig = CausalLM()
    optim: AdamWConfig
    engine: EngineConfig = LocalConfig()
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    trackers: tuple[TrackerConfig, ...] = ()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        faults = []
        if self.model is None and self.init_from is None:
            faults.append("model is missing: describe one, or name a checkpoint in init_from")
        if self.batch.micro_batch_size > self.batch.global_batch_size:
            faults.append(
                f"batch.micro_batch_size={self.batch.micro_batch_size} is more than "
                f"batch.global_batch_size={self.batch.global_batch_size}"
            )
        if self.model is not None and self.batch.seq_len > self.model.max_seq_len:
            faults.append(
                f"batch.seq_len={self.batch.seq_len} is more than model.max_seq_len={self.model.max_seq_len}"
            )
        if self.evaluation.every_steps is not None and self.validation is None:
            faults.append("evaluation.every_steps is set, but there is no validation data")
        if self.hang_timeout_s < 3 * self.heartbeat_s:
            faults.append(
                f"hang_timeout_s={self.hang_timeout_s:g} is less than three times "
                f"heartbeat_s={self.heartbeat_s:g}: a rank that is only late would be taken for a hung one"
            )
        if faults:
            raise ValueError("; ".join(faults))
        return self


# What a resumed run may not change, since it would be another run: what the model sees, and when.
_FIXED_ON_RESUME = (
    ("batch", "global_batch_size"),
    ("batch", "seq_len"),
    ("data",),
    ("objective",),
    ("model",),
    ("seed",),
    ("trainable",),
)


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply `key=value` overrides, check everything; all faults in one `ConfigError`."""
    raw = apply_overrides(load_yaml(path), overrides)
    config: RunConfig = parse(RunConfig, raw)
    return config


def check_resumable(saved: Mapping[str, Any], config: RunConfig) -> None:
    """Refuse to go on from a checkpoint under a configuration that means another run."""
    now = config.model_dump(mode="json")
    changed = []
    for keys in _FIXED_ON_RESUME:
        changed += _changes(".".join(keys), _dig(saved, keys), _dig(now, keys))
    if changed:
        changed.append(
            f"{config.run_dir} holds checkpoints of another run. Put the old values back, choose another "
            "run_dir, or start from its weights alone with init_from."
        )
        raise ConfigError("\n".join(changed))


def _changes(key: str, before: Any, after: Any) -> list[str]:
    """What is another value now, by dotted key."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        names = dict.fromkeys([*before, *after])
        return [line for n in names for line in _changes(f"{key}.{n}", before.get(n), after.get(n))]
    return [] if before == after else [f"{key} was {before!r} and is now {after!r}."]


def _dig(raw: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        raw = raw.get(key) if isinstance(raw, Mapping) else None
    return raw
