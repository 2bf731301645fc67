"""Evaluates a trained checkpoint, and generates text with it."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from distft import storage
from distft.checkpoint.committed import Checkpoint, find_checkpoint
from distft.checkpoint.damage import require_undamaged
from distft.checkpoint.formats.detect import detect_format
from distft.checkpoint.fragments import WEIGHT
from distft.checkpoint.sources import read_state
from distft.collectives import Collectives, ProcessGroup, SingleProcess
from distft.config import apply_overrides, parse
from distft.data.feed import Feed
from distft.engine.interface import DTYPES
from distft.engine.memory import allocate
from distft.errors import ConfigError
from distft.model.generation import generate
from distft.model.transformer import Transformer
from distft.objective.interface import ObjectiveContext
from distft.run.config import RunConfig
from distft.run.engines import choose_device
from distft.run.inputs import data_context
from distft.run.model import build_module, require_parameters
from distft.run.paths import TOKENIZER_FILE
from distft.tokenizer import Tokenizer
from distft.topology import Topology
from distft.tracker import progress
from distft.train.evaluation import evaluate


def open_checkpoint(path: str, overrides: Sequence[str] = ()) -> tuple[Checkpoint, RunConfig, Tokenizer]:
    """A distft checkpoint, the configuration of its run with `overrides` applied, and its tokenizer."""
    found_format = detect_format(path)
    if found_format != Checkpoint.format:
        raise ConfigError(
            f"{path} is a {found_format} checkpoint, but evaluate and generate read only distft's own runs: "
            "name it in init_from of a configuration, train, and use that run."
        )
    checkpoint = find_checkpoint(path)
    if "run_dir" not in checkpoint.manifest.config:
        raise ConfigError(
            f"{checkpoint.path} was converted from another format and has no configuration of a run: "
            "name it in init_from of a configuration, train, and use that run."
        )
    require_undamaged(checkpoint)
    # evaluation.every_steps has no effect here, but would require validation data.
    overrides = [*overrides, "evaluation.every_steps=null"]
    raw: dict[str, Any] = apply_overrides(checkpoint.manifest.config, overrides)
    try:
        config: RunConfig = parse(RunConfig, raw)
    except ConfigError as error:
        raise ConfigError(f"In the configuration of {checkpoint.path}:\n{error}") from None
    tokenizer = Tokenizer.load(storage.join(checkpoint.path, TOKENIZER_FILE))
    return checkpoint, config, tokenizer


def load_model(checkpoint: Checkpoint, config: RunConfig, device: torch.device) -> Transformer:
    """The whole model on `device`, in the run's `param_dtype` and in evaluation mode."""
    assert config.model is not None  # checkpoints contain the resolved configuration
    label_names = checkpoint.manifest.label_names
    heads = config.objective.heads(None if label_names is None else tuple(label_names))
    module = build_module(config.model, heads)
    shapes = {name: tuple(param.shape) for name, param in module.named_parameters()}
    require_parameters(checkpoint, shapes)
    allocate(module, device, DTYPES[config.engine.param_dtype])
    for name, param in module.named_parameters():
        read_state(checkpoint, name, WEIGHT, param.detach().view(-1), 0)
    return module.eval()


def _example_overrides(kind: str) -> str:
    return (
        "validation.type=tokens 'validation.sources=[{path: held_out}]'"
        if kind == "tokens"
        else f"validation.type={kind} validation.path=held_out.jsonl"
    )


def evaluate_checkpoint(path: str, overrides: Sequence[str], topology: Topology) -> dict[str, float]:
    """Metrics of the run's objective on its validation data; they do not depend on the number of ranks."""
    checkpoint, config, tokenizer = open_checkpoint(path, overrides)
    if config.validation is None:
        raise ConfigError(
            f"The run of {checkpoint.path} has no validation data: "
            f"name some, such as {_example_overrides(config.data.type)}."
        )
    assert config.model is not None
    names = checkpoint.manifest.label_names
    context = data_context(tokenizer, config.model, config.batch.seq_len)
    context = replace(context, label_names=None if names is None else tuple(names))
    feed: Feed = config.validation.build_for_evaluation(context)
    device = choose_device(config, topology)
    collectives: Collectives = SingleProcess()
    if topology.world_size > 1:
        collectives = ProcessGroup(topology, device, config.timeout_s)
    module = load_model(checkpoint, config, device)
    progress_bar = progress(feed.num_sequences, "evaluating", "rows") if topology.is_main else nullcontext()
    try:
        with progress_bar as display:
            return evaluate(
                module,
                module,
                config.objective,
                feed,
                context=ObjectiveContext(config.model.vocab_size or 0, collectives),
                micro_batch_size=config.evaluation.micro_batch_size or config.batch.micro_batch_size,
                seq_len=config.batch.seq_len,
                device=device,
                max_sequences=config.evaluation.max_sequences,
                on_progress=None
                if display is None
                else lambda n: display.advance(n * collectives.dp_world_size),
            )
    finally:
        if isinstance(collectives, ProcessGroup):
            collectives.close()


def generate_text(
    path: str,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> list[str]:
    """Each prompt, continued by the checkpoint's language model."""
    checkpoint, config, tokenizer = open_checkpoint(path)
    device = choose_device(config, Topology())
    module = load_model(checkpoint, config, device)
    if "lm_head" not in module.heads:
        raise ConfigError(f"{checkpoint.path} is a classifier, which cannot generate text.")
    encoded = [_prompt_ids(prompt, tokenizer) for prompt in prompts]
    continuations = generate(
        module,
        encoded,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        eos_id=tokenizer.eos_id,
        generator=torch.Generator(device).manual_seed(seed),
    )
    return [
        prompt + tokenizer.decode([token for token in ids if token < tokenizer.vocab_size])
        for prompt, ids in zip(prompts, continuations, strict=True)
    ]


def _prompt_ids(prompt: str, tokenizer: Tokenizer) -> list[int]:
    """The prompt's ids after the id that starts a document: in training, the end of the previous one."""
    start = tokenizer.eos_id if tokenizer.eos_id is not None else tokenizer.bos_id
    ids = tokenizer.encode(prompt)
    if start is None and not ids:
        raise ConfigError(
            "The prompt is empty, and this tokenizer has no id that starts a text: set --prompt."
        )
    return ids if start is None else [start, *ids]
