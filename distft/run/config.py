"""The configuration of a run: one YAML file for one process, a launcher or a cluster."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from distft.checkpoint.config import CheckpointConfig
from distft.checkpoint.formats.detect import open_source
from distft.config import Component, PathText, Settings, apply_overrides, load_yaml, parse, redact
from distft.data.completion import CompletionConfig
from distft.data.conversations import ConversationsConfig
from distft.data.images import ImagesConfig
from distft.data.labelled import LabelledConfig
from distft.data.pairs import PairsConfig
from distft.data.preferences import PreferencesConfig
from distft.data.split import SplitConfig, split_problem
from distft.data.streams import StreamsConfig
from distft.data.token_labels import TokenLabelsConfig
from distft.data.tokens import TokensConfig
from distft.engine.deepspeed_config import ZeroConfig
from distft.engine.settings import LocalConfig
from distft.errors import ConfigError, DistftError, suggest_name
from distft.model.config import ModelConfig
from distft.model.lora_config import LoraConfig
from distft.model.settings import AnyModelConfig, is_complete, model_setting_names
from distft.objective.settings import CausalLM, ObjectiveConfig
from distft.optim.config import OptimConfig
from distft.run.chat_config import ChatConfig
from distft.run.cluster_config import MOST_SECONDS, ClusterConfig
from distft.run.lora import default_trainable
from distft.run.phase_config import PhaseConfig, phase_problems
from distft.run.samples_config import SamplesConfig
from distft.run.streams import stream_problems
from distft.tracker import TrackerConfig
from distft.train.schedule import TrainConfig

_Data: TypeAlias = (
    TokensConfig
    | LabelledConfig
    | TokenLabelsConfig
    | CompletionConfig
    | ConversationsConfig
    | PairsConfig
    | PreferencesConfig
    | ImagesConfig
    | StreamsConfig
)
DataConfig = Annotated[_Data, Component()]
ValidationConfig = Annotated[_Data | SplitConfig, Component()]
EngineConfig = Annotated[LocalConfig | ZeroConfig, Component(default="local")]
SEARCH_SECTION = "search"  # of the configuration of a search, beside the settings of its runs


class BatchConfig(Settings):
    """Batch sizes, in sequences. The global batch does not depend on the number of ranks."""

    global_batch_size: int = Field(ge=1)  # sequences per optimizer step, over all ranks
    micro_batch_size: int = Field(ge=1)  # sequences per rank per forward, at most
    seq_len: int = Field(ge=1)  # tokens per sequence


class EvaluationConfig(Settings):
    """When the run evaluates on validation data, and on how much of it."""

    every_steps: int | None = Field(default=None, ge=1)  # in addition to the end of the run
    max_sequences: int | None = Field(default=None, ge=1)  # per evaluation, of each stream; null: all
    micro_batch_size: int | None = Field(default=None, ge=1)  # null: batch.micro_batch_size
    samples: SamplesConfig | None = None  # texts that the model generates at each evaluation; null: none


class RunConfig(Settings):
    """All settings of a run."""

    run_dir: PathText  # a directory for all output of the run; checkpoint.directory may be elsewhere
    seed: int = 0  # of initial weights and dropout; data_seed sets the order of the data
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: int | None = Field(
        default=None, ge=1, le=4096
    )  # CPU threads of each rank; null: its share of cores
    timeout_s: float = Field(default=600.0, gt=0, le=MOST_SECONDS)  # how long ranks wait for each other
    # Maximum time without a rank's heartbeat or progress.
    hang_timeout_s: float = Field(default=300.0, gt=0, le=MOST_SECONDS)
    heartbeat_s: float = Field(
        default=5.0, ge=0, le=MOST_SECONDS
    )  # between heartbeats of a rank; 0: no heartbeats
    tokenizer: PathText | None = None  # its file or directory; null: the one of the data or the checkpoint
    chat: ChatConfig = ChatConfig()  # how messages become text
    init_from: PathText | None = None  # a checkpoint of any format: the run starts at step 0 with its weights
    allow_model_changes: tuple[str, ...] = ()  # fields of model that may differ from init_from's
    model: AnyModelConfig | None = None  # null: that of init_from
    lora: LoraConfig | None = None  # adapters beside linear layers; null: none
    phases: tuple[PhaseConfig, ...] = Field((), max_length=1000)  # such as those of gradual unfreezing
    data: DataConfig
    validation: ValidationConfig | None = None  # type=split: rows of data, which do not train then
    batch: BatchConfig
    objective: ObjectiveConfig = CausalLM()
    # Patterns of parameter names, or kinds such as @biases and @last_blocks:2; "!pattern" excludes. Default:
    # all; with lora the adapters and new heads.
    trainable: tuple[str, ...] = Field(default_factory=default_trainable)
    # Train a mixture with unlabelled parts first without them, in run_dir/supervised_alone; say which won
    compare_with_supervised: bool = True
    optim: OptimConfig
    engine: EngineConfig = LocalConfig()
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    trackers: tuple[TrackerConfig, ...] = ()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        if "://" in self.run_dir:
            problems.append(
                f"run_dir={redact(self.run_dir)} must be a local directory, without file://; "
                "checkpoint.directory may be a URL"
            )
        if self.model is None and self.init_from is None:
            problems.append("model is missing: set model, or set init_from to a checkpoint")
        known = model_setting_names()
        problems += [
            f"allow_model_changes: {name!r} is not a setting of model.{suggest_name(name, known)}"
            for name in self.allow_model_changes
            if name not in known
        ]
        problems += stream_problems(self.data, self.validation, self.objective)
        if problem := split_problem(self.data, self.validation):
            problems.append(problem)
        if self.batch.micro_batch_size > self.batch.global_batch_size:
            problems.append(
                f"batch.micro_batch_size={self.batch.micro_batch_size} is more than "
                f"batch.global_batch_size={self.batch.global_batch_size}"
            )
        if self.model is not None and (problem := seq_len_problem(self.batch.seq_len, self.model)):
            problems.append(problem)
        if self.objective.needs_averaged_weights and self.optim.ema_decay is None:
            problems.append(
                "a mean teacher is the moving average of the weights: set optim.ema_decay, such as 0.99"
            )
        if (
            self.objective.supervised_parts is not None
            and self.compare_with_supervised
            and self.validation is None
        ):
            problems.append(
                "a run with unlabelled data is compared with supervised alone, which needs validation data: "
                "set validation, or compare_with_supervised=false"
            )
        evaluates = self.validation is not None and self.evaluation.every_steps is not None
        problems += phase_problems(self.phases, evaluates=evaluates)
        if self.train.early_stopping is not None and not evaluates:
            problems.append("train.early_stopping needs validation and evaluation.every_steps")
        if self.evaluation.every_steps is not None and self.validation is None:
            problems.append("evaluation.every_steps is set, but validation is not")
        if self.evaluation.samples is not None and self.validation is None:
            problems.append("evaluation.samples is set, but validation is not")
        if self.hang_timeout_s < 3 * self.heartbeat_s:
            problems.append(
                f"hang_timeout_s={self.hang_timeout_s:g} is less than three times "
                f"heartbeat_s={self.heartbeat_s:g}: a rank with one late heartbeat would count as hung"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self


def seq_len_problem(seq_len: int, model: ModelConfig) -> str | None:
    """Why rows of `seq_len` tokens are too long for the model; None if they are not."""
    if seq_len <= model.longest_row:
        return None
    if not model.reads_tokens:
        return f"batch.seq_len={seq_len} with images alone, each of which counts as one token: set it to 1"
    return f"batch.seq_len={seq_len} is more than model.max_seq_len={model.longest_row}"


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply `key=value` overrides. Raises one `ConfigError` with all problems.

    The file is the user's own, so classes outside distft that it names are imported. Next to `init_from`,
    `model` and `lora` may give single fields: the others are those of the checkpoint.
    """
    raw = apply_overrides(load_yaml(path), overrides)
    if raw.pop(SEARCH_SECTION, None) is not None:
        raise ConfigError(
            f"{path} has a section {SEARCH_SECTION}, so it describes a search: start it with "
            f"`distft tune {path}`."
        )
    return parse_run_config(raw)


def parse_run_config(raw: Mapping[str, Any]) -> RunConfig:
    """As `load_run_config`, from the content of the user's file."""
    completed, unread = _complete_from_checkpoint(dict(raw))
    try:
        config: RunConfig = parse(RunConfig, completed, trust=True)
    except ConfigError as error:
        if unread is None:
            raise
        raise ConfigError(
            f"{error}\nWhat model and lora leave out is that of init_from, which cannot be read: {unread}"
        ) from unread
    return config


def _complete_from_checkpoint(raw: dict[str, Any]) -> tuple[dict[str, Any], DistftError | None]:
    """`raw` with what `model` and `lora` leave out, and why `init_from` does not give it."""
    model, lora, init_from = raw.get("model"), raw.get("lora"), raw.get("init_from")
    is_model_open = isinstance(model, Mapping) and not is_complete(model)
    is_lora_open = isinstance(lora, Mapping) and "rank" not in lora
    if not isinstance(init_from, str) or not (is_model_open or is_lora_open):
        return raw, None
    try:
        saved = open_source(init_from, weights_only=True).manifest.config
    except DistftError as error:
        return raw, error
    completed = dict(raw)
    of_model, of_lora = saved.get("model"), saved.get("lora")
    if is_model_open and isinstance(of_model, Mapping):
        assert isinstance(model, Mapping)
        if model.get("type", of_model.get("type")) == of_model.get("type"):
            completed["model"] = {**of_model, **model}
    if is_lora_open and isinstance(of_lora, Mapping):
        assert isinstance(lora, Mapping)
        completed["lora"] = {**of_lora, **lora}
    return completed, None
