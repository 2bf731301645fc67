"""Reads and checks the inputs of a run before it uses a device: tokenizer, data, model, checkpoint."""

from collections.abc import Mapping
from dataclasses import replace

from distft.checkpoint.adapters import adapters_of, merged
from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.formats.detect import open_source
from distft.checkpoint.sources import CheckpointSource, notes_of
from distft.data.dataset import DataContext, Labels
from distft.data.feed import AnyFeed
from distft.data.split import SplitConfig
from distft.errors import CheckpointError, ConfigError, ErrorCollector
from distft.model.config import ModelConfig
from distft.model.heads import Heads
from distft.model.lora_config import is_adapter
from distft.objective.mixture import Mixture
from distft.optim.groups import parameter_groups
from distft.optim.patterns import select_trainable
from distft.run.config import RunConfig, seq_len_problem
from distft.run.data_context import (
    data_context,
    require_inputs_of_model,
    tokenizer_notes,
    with_chat_template,
)
from distft.run.lora import heads_of_any_labels, require_same_adapters
from distft.run.model import (
    added_block_prefixes,
    checked_module,
    head_prefixes,
    model_of,
    new_parameter_prefixes,
    prepare_for_engine,
    require_parameters,
    require_routers_learn,
    require_same_model,
    shapes_of,
)
from distft.run.paths import check_data_files, find_tokenizer, naming_settings, require_outputs
from distft.run.phases import check_phases, trainable_in_any
from distft.run.reference_source import open_reference
from distft.run.run_inputs import RunInputs, num_steps
from distft.run.streams import require_targets
from distft.tokenizer import Tokenizer

_ANY_VOCABULARY = 1 << 20  # above the ids that settings name


def read_inputs(config: RunConfig, cache_dir: str | None = None) -> RunInputs:
    """Read and check all inputs. Raises `ConfigError`, `DataError` or `CheckpointError`.

    Ranks that pass the same `cache_dir` encode labelled texts and completions once. The error lists
    every problem that was found. A check whose own inputs could not be read is skipped.
    """
    errors = ErrorCollector()
    require_outputs(config, errors)
    init_from = None
    with errors.collect():
        init_from = _open_init_from(config)
    is_init_from_missing = config.init_from is not None and init_from is None
    reads_tokens = _reads_tokens(config, init_from)
    tokenizer = None
    if config.tokenizer is not None or not is_init_from_missing:  # otherwise it may be the checkpoint's
        with errors.collect():
            tokenizer = _read_tokenizer(config, init_from, reads_tokens=reads_tokens)
    model = None
    if config.model is not None or not is_init_from_missing:
        with errors.collect():
            model = _model_config(config, init_from, tokenizer)
    fits = model is not None and _check_model(config, model, init_from, errors)
    if (tokenizer is None and reads_tokens) or not fits:
        _check_the_rest(config, model if fits else None, init_from, errors)
        errors.raise_if_any()
    assert model is not None
    context = replace(data_context(tokenizer, model, config), cache_dir=cache_dir)
    config, train, validation = _build_data(config.model_copy(update={"model": model}), context, errors)
    label_names = None if train is None else train.label_names
    with errors.collect():
        heads = placeholder_heads(config) if train is None else config.objective.heads(label_names)
        for setting, feed in (("data", train), ("validation", validation)):
            if feed is not None:
                require_targets(config.objective, setting, getattr(config, setting), feed)
        shapes = _prepared_shapes(config, model, heads, errors)
        trainable = _check_parameters(config, shapes, heads, init_from, label_names)
        require_routers_learn(model, trainable)
        reference = open_reference(config, model, shapes, init_from)
    if train is not None:
        with errors.collect():
            _check_schedule(config, train)
    errors.raise_if_any()
    assert train is not None
    inputs = RunInputs(
        config=config,
        tokenizer=tokenizer,
        model=model,
        train=train,
        validation=validation,
        label_names=label_names,
        heads=heads,
        shapes=shapes,
        trainable=trainable,
        init_from=init_from,
        reference=reference,
        notes=_notes(tokenizer, init_from),
    )
    check_phases(inputs)
    return replace(inputs, trainable=trainable_in_any(inputs)) if config.phases else inputs


def _reads_tokens(config: RunConfig, init_from: CheckpointSource | None) -> bool:
    """Whether the run's model does; also where that is not known."""
    if config.model is not None:
        return config.model.reads_tokens
    if init_from is None or "model" not in init_from.manifest.config:
        return True
    return model_of(init_from).reads_tokens


def _read_tokenizer(
    config: RunConfig, init_from: CheckpointSource | None, *, reads_tokens: bool
) -> Tokenizer | None:
    """None for a model of images alone. Raises `ConfigError` if one is set for it."""
    if reads_tokens:
        tokenizer = Tokenizer.load(find_tokenizer(config, None if init_from is None else init_from.path))
        return with_chat_template(tokenizer, config)
    if config.tokenizer is not None:
        raise ConfigError(f"tokenizer={config.tokenizer}, and the model reads images alone: leave it out.")
    return None


def _notes(tokenizer: Tokenizer | None, init_from: CheckpointSource | None) -> tuple[str, ...]:
    """On the tokenizer and the checkpoint."""
    of_tokenizer = () if tokenizer is None else (*tokenizer.notes, *tokenizer_notes(tokenizer, init_from))
    return (*of_tokenizer, *(() if init_from is None else notes_of(init_from)))


def _open_init_from(config: RunConfig) -> CheckpointSource | None:
    if config.init_from is None:
        return None
    try:
        source = open_source(config.init_from, weights_only=True)
    except CheckpointError as error:
        raise CheckpointError(f"init_from: {error}") from None
    # A damaged tokenizer file must not make the run use another tokenizer.
    damage = source.find_tokenizer_damage() if isinstance(source, Checkpoint) else []
    if damage:
        raise CheckpointError("\n".join(f"init_from: {problem}" for problem in damage))
    saved = adapters_of(source)
    if saved is None or config.lora is None:
        return merged(source)
    require_same_adapters(saved, config.lora, source.path)
    return source


def _check_model(
    config: RunConfig, model: ModelConfig, init_from: CheckpointSource | None, errors: ErrorCollector
) -> bool:
    """Whether the model reads what the data and the objective are of: what else they do could not tell."""
    with errors.collect():
        if problem := seq_len_problem(config.batch.seq_len, model):
            raise ConfigError(f"{problem}.")
    fits = False
    with errors.collect():
        require_inputs_of_model(config, model)
        fits = True
        config.objective.check_model(model)
    if init_from is not None:
        with errors.collect():
            require_same_model(init_from, model, config.allow_model_changes)
    return fits


def _check_the_rest(
    config: RunConfig, model: ModelConfig | None, init_from: CheckpointSource | None, errors: ErrorCollector
) -> None:
    """What can be checked without a tokenizer or a model."""
    check_data_files(config, errors)
    if model is not None:
        with errors.collect():
            heads = placeholder_heads(config)
            shapes = _prepared_shapes(config, model, heads, errors)
            own = config.model_copy(update={"model": model})
            _check_parameters(own, shapes, heads, init_from, None)


def _prepared_shapes(
    config: RunConfig, model: ModelConfig, heads: Heads, errors: ErrorCollector
) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter; `errors` gets what `engine` asks for and the model cannot do."""
    module = checked_module(model, heads, config.lora)
    with errors.collect():
        prepare_for_engine(module, config)
    return shapes_of(module)


def _build_data(
    config: RunConfig, context: DataContext, errors: ErrorCollector
) -> tuple[RunConfig, AnyFeed | None, AnyFeed | None]:
    """The training and the validation data; None for what is not configured or has errors.

    And `config`, which has a model, with the values of settings that depend on the training data.
    """
    train: AnyFeed | None = None
    validation: AnyFeed | None = None
    with errors.collect(), naming_settings("data", config.data):
        train = config.data.build(context)
    context = replace(context, label_names=None if train is None else train.label_names)
    with errors.collect(), naming_settings("validation", config.validation):
        if isinstance(config.validation, SplitConfig):
            if train is not None:
                train, validation = config.validation.split(train)
        elif config.validation is not None:
            validation = config.validation.build_for_evaluation(context)
    assert config.model is not None
    config = config.model_copy(update={"objective": config.objective.resolved(config.model, train)})
    return (
        config,
        _transformed(config, "data", train, context, errors),
        _transformed(config, "validation", validation, context, errors),
    )


def _transformed(
    config: RunConfig, setting: str, feed: AnyFeed | None, context: DataContext, errors: ErrorCollector
) -> AnyFeed | None:
    """The feed with the objective's inputs and targets; None if it cannot make any of these rows."""
    if feed is None:
        return None
    with errors.collect():
        try:
            return config.objective.transform_feed(feed, context, config.seed)
        except ConfigError as error:
            is_its_own = setting == "validation" and str(error) not in errors
            raise type(error)(f"{setting}: {error}" if is_its_own else str(error)) from error
    return None


def _model_config(
    config: RunConfig, init_from: CheckpointSource | None, tokenizer: Tokenizer | None
) -> ModelConfig:
    """The configured model, or that of `init_from`, with the tokenizer's vocabulary.

    Without a tokenizer the vocabulary is that of `init_from`, or any: the other sizes can still be checked.
    """
    model: ModelConfig | None = config.model
    if model is None:
        assert init_from is not None  # RunConfig requires one of the two
        if "model" not in init_from.manifest.config:
            raise ConfigError(f"{init_from.path} ({init_from.format}) has no model configuration: set model.")
        model = model_of(init_from)
    if tokenizer is not None:
        return model.for_vocabulary(tokenizer.vocab_size)
    known = model if init_from is None or "model" not in init_from.manifest.config else model_of(init_from)
    return model.for_vocabulary(model.vocabulary_size or known.vocabulary_size or _ANY_VOCABULARY)


def placeholder_heads(config: RunConfig) -> Heads:
    """Heads that the objective accepts, when the data with the label names could not be read."""
    return heads_of_any_labels(config.objective, config.data)


def _check_parameters(
    config: RunConfig,
    shapes: Mapping[str, tuple[int, ...]],
    heads: Heads,
    init_from: CheckpointSource | None,
    label_names: Labels,
) -> set[str]:
    """Names of the trainable parameters. Checks their patterns, and the shapes in `init_from`."""
    errors = ErrorCollector()
    trainable: set[str] = set()
    with errors.collect():
        trainable = select_trainable(shapes, config.trainable)
        assert config.model is not None
        widths = config.model.widths(shapes)
        parameter_groups(shapes, trainable, config.optim, {}, widths)  # only to raise its errors
    if init_from is not None:
        with errors.collect():
            new = new_parameter_prefixes(init_from, heads, label_names, config.objective)
            # New adapters begin anew.
            has_adapters = adapters_of(init_from) is not None
            inherited = {
                name: shape
                for name, shape in shapes.items()
                if not name.startswith(new) and (has_adapters or not is_adapter(name))
            }
            may_lack = (*head_prefixes(heads), *added_block_prefixes(init_from, config))
            require_parameters(init_from, inherited, may_lack=may_lack)
    errors.raise_if_any()
    return trainable


def _check_schedule(config: RunConfig, train: AnyFeed) -> None:
    total_steps = num_steps(config, train)
    errors = ErrorCollector()
    with errors.collect():
        config.optim.schedule.check(total_steps)
    if isinstance(config.objective, Mixture):
        with errors.collect():
            config.objective.check_weights(total_steps, is_fresh=config.init_from is None)
    errors.raise_if_any()
