"""Remarks on settings that no one can mean, or that have no effect: told, and not refused."""

from collections.abc import Iterator

import torch

from distft.data.tokens import TokensConfig
from distft.engine.deepspeed_config import ZeroConfig
from distft.engine.quantized_weights import quantizable_weights
from distft.errors import ConfigError
from distft.objective.mixture import Mixture
from distft.optim.patterns import is_moved_by_rule, matching_names
from distft.optim.sgd import SgdConfig
from distft.run.config import RunConfig
from distft.run.model import build_module
from distft.run.phases import each_phase
from distft.run.run_inputs import RunInputs
from distft.run.training_module import cost_of_attention_dropout, require_kernels
from distft.topology import BatchPlan

_MOST_EPOCHS = 1000
_MOST_LR = 1.0  # an update of Adam changes a weight by about this much; weights are about 0.02


def remarks(inputs: RunInputs, plan: BatchPlan, *, has_gpu: bool) -> list[str]:
    """A line for each setting of the run that is wrong to all appearances. `has_gpu`: of this machine."""
    config = inputs.config
    return [
        *_on_optimizer(config, inputs),
        *_on_length(config, inputs),
        *_on_windows(config, inputs),
        *_on_weights(config, inputs),
        *_on_evaluation(config),
        *_on_start(config, inputs),
        *_on_cluster(config, plan),
        *_on_engine(config, plan),
        *_on_frozen_bits(config, inputs),
        *_on_machine(config, inputs, has_gpu=has_gpu),
    ]


def _on_optimizer(config: RunConfig, inputs: RunInputs) -> Iterator[str]:
    optim = config.optim
    if optim.peak_lr > _MOST_LR and not isinstance(optim, SgdConfig):
        yield (
            f"optim.peak_lr={optim.peak_lr:g}: one update changes every weight by about that much, and the "
            "weights are about 0.02 large; usual values are 1e-5 to 1e-2."
        )
    elif optim.peak_lr * optim.weight_decay >= 1:
        yield (
            f"optim.peak_lr={optim.peak_lr:g} times optim.weight_decay={optim.weight_decay:g} is 1 or more: "
            "each update would reverse the weights."
        )
    for setting, pattern in optim.patterns():
        if not any(name in inputs.trainable for name in matching_names(pattern, list(inputs.shapes))):
            yield f"optim.{setting}.{pattern!r} has no effect: all parameters that it matches are frozen."
    for setting, data in (("data", config.data), ("validation", config.validation)):
        given: set[str] = getattr(data, "model_fields_set", set())
        if "data_seed" in given and (setting == "validation" or getattr(data, "shuffle", True) is False):
            reason = (
                "shuffle is false" if setting == "data" else "an evaluation uses every row once, in order"
            )
            yield f"{setting}.data_seed has no effect: {reason}."
    if isinstance(config.validation, TokensConfig):
        weighted = [source for source in config.validation.sources if "weight" in source.model_fields_set]
        if weighted:
            yield "validation.sources: weight has no effect: an evaluation uses every row once."


def _on_length(config: RunConfig, inputs: RunInputs) -> Iterator[str]:
    total = inputs.total_steps
    if inputs.num_epochs > _MOST_EPOCHS:
        yield (
            f"train: {total:,} steps use each of the {inputs.train.num_sequences:,} rows "
            f"{inputs.num_epochs:,.0f} times: check train.max_steps, and whether data is the whole of it."
        )
    for key, every, consequence in (
        ("train.log_every_steps", config.train.log_every_steps, "only the last step is logged"),
        ("checkpoint.every_steps", config.checkpoint.every_steps, "only the last step is saved"),
        ("evaluation.every_steps", config.evaluation.every_steps, "it evaluates only at the end"),
    ):
        is_given = key != "train.log_every_steps" or "log_every_steps" in config.train.model_fields_set
        if every is not None and every > total and is_given:
            yield f"{key}={every:,} is more than the {total:,} steps of the run: {consequence}."
    checkpoint = config.checkpoint
    if checkpoint.keep_every_steps is not None:
        every = checkpoint.every_steps
        if every is None or (checkpoint.keep_every_steps % every and every % checkpoint.keep_every_steps):
            saved = "only the last step is saved" if every is None else f"every {every:,} steps"
            yield (
                f"checkpoint.keep_every_steps={checkpoint.keep_every_steps:,} keeps multiples of it that are "
                f"saved, and checkpoint.every_steps saves {saved}: make one a multiple of the other."
            )


def _on_windows(config: RunConfig, inputs: RunInputs) -> Iterator[str]:
    reach, seq_len = inputs.model.attention_reach, config.batch.seq_len
    if reach is not None and reach >= seq_len - 1 and config.init_from is None:
        yield (
            f"sliding_window of the model has no effect on this run: it reaches {reach:,} tokens, and rows "
            f"have batch.seq_len={seq_len:,}. Lower it, or leave it out."
        )


def _on_weights(config: RunConfig, inputs: RunInputs) -> Iterator[str]:
    parts = config.objective.parts if isinstance(config.objective, Mixture) else {}
    for name, part in parts.items():
        points = part.weight if isinstance(part.weight, tuple) else ()
        beyond = [f"{step:,}" for step, _ in points if step >= inputs.total_steps]
        if beyond:
            yield (
                f"objective.parts.{name}.weight has points at steps {', '.join(beyond)}, which the run of "
                f"{inputs.total_steps:,} steps, from 0, does not reach."
            )


def _on_evaluation(config: RunConfig) -> Iterator[str]:
    if config.validation is not None:
        return
    for name in ("max_sequences", "micro_batch_size"):
        if getattr(config.evaluation, name) is not None:
            yield f"evaluation.{name} has no effect: there is no validation data."


def _on_start(config: RunConfig, inputs: RunInputs) -> Iterator[str]:
    if config.init_from is None:
        if config.allow_model_changes:
            yield "allow_model_changes has no effect: init_from is not set."
        if any(name not in inputs.trainable and not is_moved_by_rule(name) for name in inputs.shapes):
            yield "trainable leaves parameters frozen at random values: init_from is not set."


def _on_cluster(config: RunConfig, plan: BatchPlan) -> Iterator[str]:
    cluster, num_ranks = config.cluster, plan.dp_world_size
    if "workers" in cluster.model_fields_set and num_ranks > 1:
        least, most = cluster.min_workers, cluster.max_workers
        if not least <= num_ranks <= most:
            workers = f"{least}" if least == most else f"{least} to {most}"
            yield (
                f"cluster.workers starts {workers} ranks, and this check is for {num_ranks}: "
                f"check with --world-size {min(max(num_ranks, least), most)}, or change cluster.workers."
            )


def _on_machine(config: RunConfig, inputs: RunInputs, *, has_gpu: bool) -> Iterator[str]:
    """What this machine cannot do, which may not be the one that the run is for."""
    if config.device == "cuda" and not has_gpu:
        yield "device=cuda: this machine has no GPU that torch finds, so the run cannot start here."
    if config.device == "cuda" or (config.device == "auto" and has_gpu):
        costs = [cost_of_attention_dropout(phase.model) for phase in each_phase(inputs)]
        yield from dict.fromkeys(cost for cost in costs if cost is not None)
    if config.device == "cpu" or not has_gpu:
        try:
            require_kernels(inputs.model, torch.device("cpu"))
        except ConfigError as error:
            yield f"This machine cannot run it: {error}"
        if config.engine.allow_tf32:
            yield "engine.allow_tf32 has no effect on a CPU."


def _on_frozen_bits(config: RunConfig, inputs: RunInputs) -> Iterator[str]:
    bits = config.engine.frozen_bits
    if bits is None:
        return
    names = quantizable_weights(build_module(inputs.model, inputs.heads, config.lora)).keys()
    if all(names <= phase.trainable for phase in each_phase(inputs)):
        yield f"engine.frozen_bits={bits} has no effect: no matrix of a block is frozen."


def _on_engine(config: RunConfig, plan: BatchPlan) -> Iterator[str]:
    engine = config.engine
    if engine.fp8 == "none" and "fp8_min_features" in engine.model_fields_set:
        yield "engine.fp8_min_features has no effect: engine.fp8 is none."
    if isinstance(engine, ZeroConfig) and engine.deepspeed:
        from distft.engine.deepspeed_check import ignored_deepspeed_keys

        yield from ignored_deepspeed_keys(engine, plan)
