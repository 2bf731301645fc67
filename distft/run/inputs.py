"""Everything that a run reads before it touches a device: tokenizer, data, the model's shape, what learns."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from distft import storage
from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.formats.detect import open_source
from distft.checkpoint.sources import CheckpointSource, FirstOf, InitialSource, StateSource, WeightsOnly
from distft.config.keys import nearest
from distft.data.dataset import DataContext
from distft.data.feed import Feed
from distft.data.settings import DataConfig
from distft.data.tokens import TokensConfig
from distft.errors import CheckpointError, ConfigError, DataError, Mistakes
from distft.model.config import ModelConfig
from distft.model.head import Head
from distft.model.initialisation import initial_fragment
from distft.model.transformer import Transformer
from distft.optim.groups import ParameterGroup, parameter_groups
from distft.optim.trainable import select_trainable
from distft.run.config import RunConfig
from distft.tokenizer import Tokenizer

TOKENIZER_FILE = "tokenizer.model"
_ANY_TWO_LABELS = ("a", "b")  # stand in for those of data that could not be read, to check the rest
_HEAD_PREFIXES = ("classifier.", "lm_head.")  # what an `init_from` may lack: a new task has a new head


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What was read, checked against each other; no memory for weights yet."""

    config: RunConfig  # with the model filled in
    tokenizer: Tokenizer
    model: ModelConfig
    train: Feed
    validation: Feed | None
    label_names: tuple[str, ...] | None
    head: Head
    shapes: dict[str, tuple[int, ...]]
    trainable: set[str]
    init_from: CheckpointSource | None


def read_inputs(config: RunConfig) -> Inputs:
    """Read and check; raises `ConfigError`, `DataError` or `CheckpointError` before any device is used.

    One error has every mistake that can be seen: a step whose input failed is left out.
    """
    mistakes = Mistakes()
    with mistakes.gather():
        check_writable(config.run_dir)
    init_from = None
    with mistakes.gather():
        init_from = _checkpoint_to_start_from(config)
    tokenizer = None
    is_start_lost = config.init_from is not None and init_from is None
    if config.tokenizer is not None or not is_start_lost:  # else it might be the checkpoint's
        with mistakes.gather():
            tokenizer = Tokenizer.load(tokenizer_path(config.tokenizer, config.data, init_from))
    if tokenizer is None or is_start_lost:
        mistakes.raise_if_any()
    assert tokenizer is not None
    shape = _model_shape(config, init_from, tokenizer)
    with mistakes.gather():
        _check_seq_len(config, shape)
    context = data_context(tokenizer, shape, config.batch.seq_len)
    train = None
    with mistakes.gather():
        train = config.data.build(context)
    label_names = None if train is None else train.label_names
    validation = None
    with mistakes.gather():
        if config.validation is not None:
            validation = config.validation.build_in_order(replace(context, label_names=label_names))
    with mistakes.gather():
        head = _some_head(config) if train is None else config.objective.head(label_names)
        shapes = parameter_shapes(shape, head)
        trainable = _check_parameters(config, shapes, init_from, label_names)
    if train is not None:
        with mistakes.gather():
            _check_schedule(config, train)
    mistakes.raise_if_any()
    assert train is not None
    return Inputs(
        config=config.model_copy(update={"model": shape}),
        tokenizer=tokenizer,
        model=shape,
        train=train,
        validation=validation,
        label_names=label_names,
        head=head,
        shapes=shapes,
        trainable=trainable,
        init_from=init_from,
    )


def _some_head(config: RunConfig) -> Head:
    """One that the objective takes, where the data that would decide it is not there."""
    try:
        return config.objective.head(None)
    except ConfigError:
        return config.objective.head(_ANY_TWO_LABELS)


def _model_shape(config: RunConfig, init_from: CheckpointSource | None, tokenizer: Tokenizer) -> ModelConfig:
    shape = config.model
    if shape is None:
        assert init_from is not None  # or the configuration would not have passed
        if "model" not in init_from.manifest.config:
            raise ConfigError(
                f"{init_from.path} ({init_from.format}) does not say what its model is like: set model."
            )
        shape = ModelConfig.model_validate(init_from.manifest.config["model"])
    return shape.for_vocabulary(tokenizer.vocab_size)


def _check_seq_len(config: RunConfig, shape: ModelConfig) -> None:
    if config.batch.seq_len > shape.max_seq_len:
        raise ConfigError(
            f"batch.seq_len={config.batch.seq_len} is more than model.max_seq_len={shape.max_seq_len}."
        )


def _check_parameters(
    config: RunConfig,
    shapes: Mapping[str, tuple[int, ...]],
    init_from: CheckpointSource | None,
    label_names: tuple[str, ...] | None,
) -> set[str]:
    """What learns; refuses patterns that match nothing, and weights that do not fit."""
    mistakes = Mistakes()
    trainable: set[str] = set()
    with mistakes.gather():
        trainable = select_trainable(shapes, config.trainable)
        parameter_groups(shapes, trainable, config.optim, {})  # for its complaints
    if init_from is not None:
        with mistakes.gather():
            inherited = {
                n: s for n, s in shapes.items() if not n.startswith(new_head(init_from, label_names))
            }
            check_fits(init_from, inherited, may_lack=_HEAD_PREFIXES)
    mistakes.raise_if_any()
    return trainable


def _check_schedule(config: RunConfig, train: Feed) -> None:
    config.optim.schedule.check(
        config.train.total_steps(
            num_sequences=train.num_sequences, global_batch_size=config.batch.global_batch_size
        )
    )


def check_writable(run_dir: str) -> None:
    """Refuse a run_dir that cannot be made or written to; makes nothing yet."""
    path = Path(run_dir).absolute()
    above = next(parent for parent in (path, *path.parents) if parent.exists())
    if not above.is_dir():
        raise ConfigError(
            f"run_dir={run_dir} cannot be a directory: {above} is a file. Choose another run_dir."
        )
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(f"run_dir={run_dir} cannot be written: {above} does not allow it. Choose another.")


def _checkpoint_to_start_from(config: RunConfig) -> CheckpointSource | None:
    if config.init_from is None:
        return None
    try:
        source = open_source(config.init_from)
    except CheckpointError as error:
        raise CheckpointError(f"init_from: {error}") from None
    faults = source.tokenizer_faults() if isinstance(source, Checkpoint) else []
    if faults:  # or another tokenizer would serve, or none be found
        raise CheckpointError("\n".join(f"init_from: {fault}" for fault in faults))
    return source


def data_context(
    tokenizer: Tokenizer, model: ModelConfig, seq_len: int, label_names: tuple[str, ...] | None = None
) -> DataContext:
    """What data has to know of the run."""
    return DataContext(
        seq_len=seq_len,
        vocab_size=model.padded_vocab_size,
        encode=tokenizer.encode,
        tokenizer_fingerprint=tokenizer.fingerprint,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        token_bytes=tokenizer.token_bytes(),
        label_names=label_names,
    )


def tokenizer_path(given: str | None, data: DataConfig, init_from: CheckpointSource | None) -> str:
    """The run's tokenizer: the one that is named, that of the checkpoint, or the one beside the shards."""
    if given is not None:
        return given
    candidates = []
    if init_from is not None:
        candidates.append(storage.join(init_from.path, TOKENIZER_FILE))
    if isinstance(data, TokensConfig):
        shards = data.sources[0].path
        if not storage.exists(shards):
            raise DataError(
                f"data.sources.0.path={shards} does not exist: name a directory that `distft tokenize` made, "
                "such as its output's train/."
            )
        candidates += [storage.join(shards, TOKENIZER_FILE), storage.join(shards, "..", TOKENIZER_FILE)]
    for candidate in candidates:
        if storage.exists(candidate):
            return candidate
    looked = f" (looked for {', '.join(candidates)})" if candidates else ""
    raise ConfigError(f"tokenizer is not set, and none was found{looked}: name a .model file in tokenizer.")


def build_module(model: ModelConfig, head: Head, *, activation_checkpointing: bool = False) -> Transformer:
    """The model on the meta device: shapes and names, no memory."""
    with torch.device("meta"):
        module = Transformer(model, head)
    module.activation_checkpointing = activation_checkpointing
    return module


def parameter_shapes(model: ModelConfig, head: Head) -> dict[str, tuple[int, ...]]:
    """Every parameter's shape by name, tied ones once."""
    return {name: tuple(param.shape) for name, param in build_module(model, head).named_parameters()}


def check_fits(
    source: CheckpointSource, shapes: Mapping[str, tuple[int, ...]], *, may_lack: tuple[str, ...] = ()
) -> None:
    """Refuse a checkpoint that lacks a parameter of the model, or has it in another shape; all at once."""
    faults = []
    for name, shape in shapes.items():
        found = source.shape(name)
        if found is None and not name.startswith(may_lack):
            faults.append(f"{name} is not in it. {nearest(name, list(source.manifest.parameters))}")
        elif found is not None and found != shape:
            faults.append(f"{name} is {list(found)} there and {list(shape)} in this model.")
    if faults:
        shown = "\n".join(faults[:20]) + (f"\nand {len(faults) - 20} more" if len(faults) > 20 else "")
        raise ConfigError(f"The checkpoint {source.path} does not fit model:\n{shown}")


def state_source(inputs: Inputs, resumed: Checkpoint | None) -> StateSource:
    """Where each parameter's state comes from: the run's own checkpoint, or `init_from`, or fresh."""
    if resumed is not None:
        check_fits(resumed, inputs.shapes)
        return resumed
    seed, model = inputs.config.seed, inputs.model
    fresh = InitialSource(
        inputs.shapes,
        lambda name, shape, start, stop: initial_fragment(name, shape, start, stop, seed=seed, config=model),
    )
    if inputs.init_from is None:
        return fresh
    without = new_head(inputs.init_from, inputs.label_names)
    return FirstOf([WeightsOnly(inputs.init_from, without=without), fresh])


def new_head(init_from: CheckpointSource, label_names: tuple[str, ...] | None) -> tuple[str, ...]:
    """Prefixes of what is not taken from `init_from`: a classifier's head, where the classes are others."""
    before = init_from.manifest.label_names
    is_same = before is not None and label_names is not None and tuple(before) == label_names
    return () if is_same else ("classifier.",)


def groups_for(inputs: Inputs, source: StateSource) -> list[ParameterGroup]:
    """What the optimizer treats alike, with the past that each parameter has in `source`."""
    updates = {name: source.updates(name) for name in inputs.trainable}
    return parameter_groups(inputs.shapes, inputs.trainable, inputs.config.optim, updates)
