"""Opens trained models of any format, and evaluates them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distft import storage
from distft.checkpoint.adapters import merged
from distft.checkpoint.damage import require_undamaged
from distft.checkpoint.formats.detect import open_source
from distft.checkpoint.fragments import WEIGHT
from distft.checkpoint.sources import CheckpointSource, notes_of, read_state
from distft.checkpoint.steps import absolute
from distft.collectives import Collectives, ProcessGroup, SingleProcess
from distft.config import apply_overrides, parse, split_override
from distft.data.dataset import Labels
from distft.data.feed import AnyFeed, Feed
from distft.data.split import SplitConfig
from distft.engine.interface import DTYPES
from distft.engine.memory import allocate
from distft.errors import ConfigError, DistftError
from distft.model.heads import Heads
from distft.model.with_heads import ModelWithHeads
from distft.objective.interface import Objective, ObjectiveContext
from distft.run.config import RunConfig
from distft.run.data_context import data_context, require_inputs_of_model, split_notes, tokenizer_notes
from distft.run.engines import choose_device
from distft.run.evaluation_overrides import (
    NO_PATH,
    check_overrides,
    empty_validation,
    keys_of,
    names_validation,
)
from distft.run.model import build_module, parameter_shapes, require_parameters, saved_label_names
from distft.run.reference import Computation, ReferenceValues, reference_identity
from distft.run.reference_source import open_reference
from distft.tokenizer import Tokenizer
from distft.tokenizer.files import SENTENCEPIECE_FILE, find_tokenizer_file
from distft.tokenizer.template_files import read_template
from distft.topology import Topology
from distft.tracker import progress
from distft.train.evaluation import evaluate

# What needs evaluations in training, and so would not fit a configuration without them.
_NOTHING_TO_TRAIN = ("evaluation.every_steps=null", "train.early_stopping=null", "phases=[]")
_SEQ_LEN = 1024  # of a model without a run, at most: longer rows take more memory
_MICRO_BATCH_SIZE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedModel:
    """A checkpoint, the configuration of its run or a substitute for one, and its tokenizer."""

    source: CheckpointSource
    config: RunConfig  # with `model` set
    own_tokenizer: Tokenizer | None  # None: the model reads images alone
    notes: tuple[str, ...]  # on the tokenizer, and on what was assumed

    @property
    def label_names(self) -> Labels:
        return saved_label_names(self.source)

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises `ConfigError` for a model that reads no texts."""
        if self.own_tokenizer is None:
            raise ConfigError(f"The model of {self.source.path} reads images, and no texts.")
        return self.own_tokenizer


def open_model(path: str, overrides: Sequence[str] = (), *, trust: bool = False) -> TrainedModel:
    """Open the model of a run, of a converted checkpoint, or of a directory of transformers.

    `overrides` change the run's configuration. `trust` imports classes outside distft that it names, which
    runs their code. Raises `ConfigError` for an override without effect.
    """
    check_overrides(overrides)
    source = open_source(path, trust=trust, weights_only=True)
    require_undamaged(source)
    notes = notes_of(source)
    source = merged(source)
    saved = source.manifest.config
    if "run_dir" not in saved:
        saved = _substitute_config(source, path, overrides)
        notes.append(
            f"{source.path} has no configuration of a run: rows have batch.seq_len="
            f"{saved['batch']['seq_len']} tokens, objective.type is {saved['objective']['type']}."
        )
    if names_validation(saved.get("validation"), keys_of(overrides)):
        saved = {**saved, "validation": empty_validation(saved["data"], overrides)}
    raw: dict[str, Any] = apply_overrides(saved, [*overrides, *_NOTHING_TO_TRAIN])
    raw["batch"]["global_batch_size"] = max(
        raw["batch"]["global_batch_size"], raw["batch"]["micro_batch_size"]
    )  # has no effect here, but would limit the other
    try:
        config: RunConfig = parse(RunConfig, raw, trust=trust)
    except ConfigError as error:
        hint = _validation_hint(source, raw, overrides)
        raise ConfigError(f"In the configuration of {source.path}:\n{error}{hint}") from None
    has_other_tokenizer = any(key == "tokenizer" for key in keys_of(overrides))
    assert config.model is not None  # of a checkpoint, or of the substitute
    model, tokenizer = config.model, None
    if model.reads_tokens:
        tokenizer = _load_tokenizer(source, config.tokenizer if has_other_tokenizer else None)
        if config.chat.template is not None and "chat.template" in keys_of(overrides):
            tokenizer = tokenizer.with_chat_template(read_template(config.chat.template))
        notes += [*tokenizer.notes, *tokenizer_notes(tokenizer, source)]
        model = model.for_vocabulary(tokenizer.vocab_size)
    objective = config.objective.resolved(model, None)  # a checkpoint of a run has all values
    return TrainedModel(
        source=source,
        config=config.model_copy(update={"model": model, "objective": objective}),
        own_tokenizer=tokenizer,
        notes=tuple(notes),
    )


def _substitute_config(source: CheckpointSource, path: str, overrides: Sequence[str]) -> dict[str, Any]:
    """A configuration for a model that has none: of a run with the same kind of head."""
    model = source.manifest.config.get("model")
    if not isinstance(model, dict):
        raise ConfigError(
            f"{path} is a {source.format} checkpoint without the model's configuration, which names "
            "and shapes do not give: name it in init_from of a configuration, train, and use that run; or "
            "convert it with `distft checkpoint convert --run-config`."
        )
    is_classifier = source.manifest.label_names is not None
    data: dict[str, Any] = {"type": "labelled", "path": NO_PATH}
    if not is_classifier:
        data = {"type": "tokens", "sources": [{"path": NO_PATH}]}
    return {
        "run_dir": source.path,
        "model": model,
        "data": data,
        "objective": source.manifest.config.get("objective")
        or ({"type": "classification"} if is_classifier else _language_model_objective(model, overrides)),
        "batch": {
            "global_batch_size": _MICRO_BATCH_SIZE,
            "micro_batch_size": _MICRO_BATCH_SIZE,
            "seq_len": min(_SEQ_LEN, int(model.get("max_seq_len", _SEQ_LEN))),
        },
        "optim": {"peak_lr": 1e-3},
        "train": {"max_steps": 1},
    }


def _language_model_objective(model: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """What fits the model; an encoder with a decoder translates prompts, or fills in spans of other rows."""
    if model.get("type") == "encoder_decoder":
        has_prompts = any(split_override(own) == ("validation.type", "=", "completion") for own in overrides)
        has_type = any(key.startswith("objective") for key in keys_of(overrides))
        if has_prompts and not has_type:
            return {"type": "prefix_lm", "prefix": "prompt"}
        return {"type": "span_corruption"}
    return {"type": "masked_lm" if model.get("attention") == "bidirectional" else "causal_lm"}


def _validation_hint(source: CheckpointSource, raw: dict[str, Any], overrides: Sequence[str]) -> str:
    """For rows of text given to a run whose validation data are token shards."""
    validation = raw.get("validation")
    if not isinstance(validation, dict) or validation.get("type") != "tokens":
        return ""
    if not any(key == "validation.path" for key in keys_of(overrides)):
        return ""
    tokenizer = _tokenizer_path(source)
    return (
        f" The model was trained on token shards and is evaluated on such: make them with `distft tokenize "
        f"{validation.get('path')} -t {tokenizer} -o shards`, and set validation.sources.0.path="
        "shards/train. For prompts and completions set validation.type=completion too."
    )


def _load_tokenizer(source: CheckpointSource, path: str | None) -> Tokenizer:
    return Tokenizer.load(_tokenizer_path(source) if path is None else path)


def _tokenizer_path(source: CheckpointSource) -> str:
    record = source.manifest.tokenizer
    name = None if record is None else record.file
    return storage.join(source.path, name or find_tokenizer_file(source.path) or SENTENCEPIECE_FILE)


def load_model(trained: TrainedModel, device: torch.device, heads: Heads | None = None) -> ModelWithHeads:
    """The whole model on `device`, in the run's `param_dtype` and in evaluation mode; sets `num_threads`.

    `heads` replace those of the run.
    """
    config, source = trained.config, trained.source
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    assert config.model is not None
    own_heads = config.objective.heads(trained.label_names) if heads is None else heads
    module = build_module(config.model, own_heads)
    shapes = {name: tuple(param.shape) for name, param in module.named_parameters()}
    require_parameters(source, shapes)
    allocate(module, device, DTYPES[config.engine.param_dtype])
    for name, param in module.named_parameters():
        read_state(source, name, WEIGHT, param.detach().view(-1), 0)
    return module.eval()


def _example_overrides(kind: str) -> str:
    return (
        "validation.type=tokens 'validation.sources=[{path: held_out}]'"
        if kind == "tokens"
        else f"validation.type={kind} validation.path=held_out.jsonl"
    )


def _ignore(note: str) -> None:
    """The default of `on_note`."""


def _with_reference(
    trained: TrainedModel,
    feed: AnyFeed,
    collectives: Collectives,
    device: torch.device,
    on_note: Callable[[str], None],
) -> AnyFeed:
    """The feed, whose rows have what the objective's reference gives them, if it has one.

    As the run has stored it, if it did for these rows; it suffices if the reference is gone.
    """
    config, model = trained.config, trained.config.model
    if config.objective.reference_target is None or not isinstance(feed, Feed):
        return feed
    assert model is not None
    shapes = parameter_shapes(model, config.objective.heads(trained.label_names))
    source, identity, problem = None, {}, ""
    try:
        path = config.init_from
        init_from = None if path is None else merged(open_source(path, weights_only=True))
        source = open_reference(config, model, shapes, init_from)
    except DistftError as error:
        problem = str(error)
    if source is not None:
        settings, tokenizer = model.model_dump(mode="json"), trained.tokenizer.fingerprint
        identity = reference_identity(source, shapes, settings, tokenizer, collectives)
    values = ReferenceValues(
        objective=config.objective,
        context=ObjectiveContext(model.vocabulary_size or 0, collectives),
        root=storage.parent(absolute(trained.source.path)),
        micro_batch_size=config.evaluation.micro_batch_size or config.batch.micro_batch_size,
        seq_len=config.batch.seq_len,
        identity=identity,
    )
    (rows,) = feed.datasets
    found = values.stored(rows, refuses_others=False)
    if values.is_complete(rows, found):
        return values.added(feed, found)
    if source is None:
        raise ConfigError(f"{problem}\nIt is needed: the run has not stored what it gives these rows.")
    on_note(f"computing what the reference, {source.path}, gives the rows")
    module = load_model(replace(trained, source=source), device)
    computation = Computation(model=module, module=module, device=device)
    return values.added(feed, values.complete(rows, found, computation, stores=False))


def evaluate_checkpoint(
    path: str,
    overrides: Sequence[str],
    topology: Topology,
    *,
    trust: bool = False,
    on_note: Callable[[str], None] = _ignore,
    on_report: Callable[[Sequence[str]], None] = lambda _: None,
) -> dict[str, float]:
    """Metrics of the objective on validation data; they do not depend on the number of ranks.

    `on_note` gets what was assumed, before the work, `on_report` lines such as a confusion matrix after it.
    """
    trained = open_model(path, overrides, trust=trust)
    for note in trained.notes:
        on_note(note)
    with ranks_of(trained.config, topology) as (collectives, device):
        return evaluate_model(
            trained,
            collectives,
            device,
            on_note=on_note,
            on_sums=lambda sums: on_report(trained.config.objective.report(sums, trained.label_names)),
        )


@contextmanager
def ranks_of(config: RunConfig, topology: Topology) -> Iterator[tuple[Collectives, torch.device]]:
    """The ranks that a command runs on, and this rank's device."""
    device = choose_device(config, topology)
    collectives: Collectives = SingleProcess()
    if topology.world_size > 1:
        collectives = ProcessGroup(topology, device, config.timeout_s)
    try:
        yield collectives, device
    finally:
        if isinstance(collectives, ProcessGroup):
            collectives.close()


def evaluate_model(
    trained: TrainedModel,
    collectives: Collectives,
    device: torch.device,
    *,
    objective: Objective | None = None,
    on_note: Callable[[str], None] = _ignore,
    on_sums: Callable[[Mapping[str, Tensor]], None] = lambda _: None,
) -> dict[str, float]:
    """As `evaluate_checkpoint`. `objective` is measured in place of the model's own, on the same rows.

    `on_sums` gets what the metrics are made of.
    """
    config = trained.config
    if config.validation is None:
        raise ConfigError(
            f"The run of {trained.source.path} has no validation data: "
            f"name some, such as {_example_overrides(config.data.type)}."
        )
    assert config.model is not None
    require_inputs_of_model(config, config.model)
    (config.objective if objective is None else objective).check_model(config.model)
    context = data_context(trained.own_tokenizer, config.model, config, trained.label_names)
    feed: AnyFeed
    if isinstance(config.validation, SplitConfig):
        train, feed = config.validation.split(config.data.build(context))
        for note in split_notes(config, train, trained.source):
            on_note(note)
    else:
        feed = config.validation.build_for_evaluation(context)
    feed = config.objective.transform_feed(feed, context, config.seed)
    feed = _with_reference(trained, feed, collectives, device, on_note)
    module = load_model(trained, device)
    if config.evaluation.max_sequences is not None:
        feed = feed.first(config.evaluation.max_sequences)
    num_sequences = feed.num_sequences
    progress_bar = progress(num_sequences, "evaluating", "rows") if collectives.rank == 0 else nullcontext()
    with progress_bar as display:
        return evaluate(
            module,
            module,
            config.objective if objective is None else objective,
            feed,
            context=ObjectiveContext(config.model.vocabulary_size or 0, collectives),
            micro_batch_size=config.evaluation.micro_batch_size or config.batch.micro_batch_size,
            seq_len=config.batch.seq_len,
            device=device,
            on_sums=on_sums,
            on_progress=None if display is None else lambda n: display.advance(n * collectives.dp_world_size),
        )
