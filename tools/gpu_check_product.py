"""Runs of distft for `gpu_check.py`, built by the product's own functions from a `RunConfig`."""

import gc
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import torch
from gpu_check_device import Device
from torch import Tensor

from distft.checkpoint.fragments import WEIGHT
from distft.checkpoint.manifest import Manifest, Progress
from distft.collectives import Collectives, ProcessGroup, SingleProcess
from distft.config import parse
from distft.data.batch import AnyBatch
from distft.data.corpus import JsonlCorpus, StdlibCorpus
from distft.data.device_copy import batch_copier
from distft.data.feed import Prefetcher
from distft.data.shard_layout import MANIFEST
from distft.model.transformer_config import TransformerConfig
from distft.prepare import TokenizeConfig, tokenize
from distft.run.check import check_run
from distft.run.config import RunConfig
from distft.run.engines import build_engine, choose_device
from distft.run.training_module import build_objective_context
from distft.tokenizer import TokenizerTrainConfig, train_tokenizer
from distft.topology import MicroBatch, Topology
from distft.train.step import StepResult, train_step

_DOCUMENT_CHARACTERS = (200, 900, 4000)  # in turn; at 3 to 4 characters a token, from 60 to 1,200 tokens
_FP16_LOSS_SCALE = 1024.0  # fixed, so that no step is skipped and the losses can be compared


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """Token shards and their tokenizer."""

    shards: str
    tokenizer: str

    @classmethod
    def make(cls, directory: Path, *, num_bytes: int, vocab_size: int) -> "Data":
        """Python's standard library in documents of different lengths; what exists already is used again."""
        tokenizer, shards = directory / "tokenizer.model", directory / "shards"
        if not (shards / "train" / MANIFEST).exists():
            directory.mkdir(parents=True, exist_ok=True)
            documents = _documents(num_bytes)
            train_tokenizer(documents, TokenizerTrainConfig(vocab_size=vocab_size), tokenizer)
            text = directory / "documents.jsonl"
            text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
            tokenize(
                TokenizeConfig(
                    corpus=JsonlCorpus(paths=(str(text),)),
                    tokenizer=str(tokenizer),
                    output=str(shards),
                    num_workers=1,
                )
            )
        return cls(shards=str(shards / "train"), tokenizer=str(tokenizer))


def _documents(num_bytes: int) -> list[str]:
    """About `num_bytes` of the library's source files, cut into pieces of different lengths."""
    pieces: list[str] = []
    missing = num_bytes
    for file in StdlibCorpus().files():
        text = Path(file.url).read_text(encoding="utf-8", errors="replace")
        while text and missing > 0:
            length = _DOCUMENT_CHARACTERS[len(pieces) % len(_DOCUMENT_CHARACTERS)]
            pieces.append(text[:length])
            text = text[length:]
            missing -= length
    return pieces


def run_config(
    tokens: Data,
    run_dir: Path,
    device: str,
    *,
    model: TransformerConfig | Mapping[str, Any],
    batch: tuple[int, int, int],
    engine: Mapping[str, Any],
    packed: bool = False,
    max_steps: int = 20,
    **sections: Any,
) -> RunConfig:
    """The configuration of a run. `batch` is global batch, micro-batch and tokens per row.

    `packed`: rows of several documents that do not see each other. `sections` replace others of `RunConfig`.
    """
    sizes = model.model_dump() if isinstance(model, TransformerConfig) else dict(model)
    global_batch_size, micro_batch_size, seq_len = batch
    raw: dict[str, Any] = {
        "run_dir": str(run_dir),
        "device": device,
        "tokenizer": tokens.tokenizer,
        "model": sizes,
        "data": {
            "type": "tokens",
            "sources": [{"path": tokens.shards}],
            "documents": "separate" if packed else "joined",
        },
        "batch": {
            "global_batch_size": global_batch_size,
            "micro_batch_size": micro_batch_size,
            "seq_len": seq_len,
        },
        "optim": {"peak_lr": 1e-3, "schedule": {"type": "cosine", "warmup_steps": 2}},
        "engine": dict(engine),
        "train": {"max_steps": max_steps, "log_every_steps": 1},
        **sections,
    }
    config: RunConfig = parse(RunConfig, raw)
    return config


class QuickWeights:
    """A checkpoint of any model, whose weights are cut from one random block: 1.3e9 of them take a second.

    The product's initialisation draws each weight once, 10 s for as many on one core. Speed does not depend
    on the values.
    """

    path, format = "quick weights", "distft"

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = dict(shapes)
        self._block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02
        self.manifest = Manifest(
            run_id="", progress=Progress(), config={}, written_by={}, parameters={}, files=[]
        )

    def has(self, parameter: str, state: str) -> bool:
        return state == WEIGHT and parameter in self._shapes

    def shape(self, parameter: str) -> tuple[int, ...] | None:
        return self._shapes.get(parameter)

    def read(self, parameter: str, state: str, start: int, stop: int) -> Tensor:  # noqa: ARG002
        if len(self._shapes[parameter]) == 1:
            return torch.ones(stop - start)
        repeats = -(-(stop - start) // len(self._block))
        return self._block.repeat(repeats)[: stop - start]

    def dtype(self, parameter: str, state: str) -> torch.dtype:  # noqa: ARG002
        return torch.float32

    def updates(self, parameter: str) -> int:  # noqa: ARG002
        return 0

    def find_damage(self) -> list[str]:
        return []


@dataclass
class Session:
    """What the cases of one worker process share."""

    device: Device
    work_dir: Path
    dry: bool

    @cached_property
    def data(self) -> Data:
        num_bytes, vocab_size = (150_000, 512) if self.dry else (8_000_000, 4096)
        return Data.make(self.work_dir / "data", num_bytes=num_bytes, vocab_size=vocab_size)

    @cached_property
    def process_group(self) -> Collectives:
        """One group for all ZeRO engines of this process: DeepSpeed keeps the first it meets."""
        return ProcessGroup(Topology(), self.device.torch_device, 60)

    def collectives(self, config: RunConfig) -> Collectives:
        uses_group = config.engine.type == "zero"
        return self.process_group if uses_group else SingleProcess()


class Training:
    """An engine and its data, stepped as the training loop does it. Use it as a context."""

    def __init__(
        self,
        config: RunConfig,
        collectives: Collectives,
        *,
        topology: Topology | None = None,
        quick_weights: bool = False,
    ) -> None:
        topology = topology or Topology()
        self.plan, self.inputs = check_run(config, topology)
        if quick_weights:
            self.inputs = replace(self.inputs, init_from=QuickWeights(self.inputs.shapes))
        self.config = self.inputs.config
        self.device = choose_device(config, topology)
        self.engine = build_engine(self.inputs, None, self.plan, collectives, self.device)
        if config.engine.param_dtype == "fp16":
            self.engine.set_loss_scale(torch.tensor(_FP16_LOSS_SCALE, device=self.device))
        self.engine.module.train()
        self._context = build_objective_context(self.inputs, self.plan, collectives, self.device)
        self._rank = collectives.dp_rank
        self._num_steps = 0
        self.num_attention_pairs = 0  # of the last step
        self._batches = Prefetcher(
            self.inputs.train,
            self._micro_batches(),
            prepare=self._prepare,
            copier=batch_copier(self.device),
        )

    def _micro_batches(self) -> Iterator[MicroBatch]:
        for step in count():
            yield from self.plan.micro_batches(step, self._rank)

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, *error: object) -> None:
        self._batches.close()
        self.engine.close()
        del self.engine
        gc.collect()

    def step(self) -> StepResult:
        """One optimizer step; nothing of its result is read."""
        objective, total = self.config.objective, self.config.train.max_steps or 1
        step = min(self._num_steps, total - 1)
        lr = self.config.optim.lr(step, total)
        batches = [next(self._batches) for _ in self.plan.micro_batches(self._num_steps, self._rank)]
        self.num_attention_pairs = sum(work[1] for batch in batches for work in batch.work.values())
        result = train_step(
            self.engine,
            batches,
            loss_sums=lambda model, batch: objective.loss_sums(model, batch, self._context),
            num_targets=objective.num_targets,
            weights=objective.term_weights(step),
            group_lr=lambda group: lr * group.lr_scale,
        )
        self._num_steps += 1
        return result

    def _prepare(self, batch: AnyBatch) -> AnyBatch:
        """In the prefetching thread, as the training loop does it."""
        model = self.inputs.model
        return batch.for_step(self.config.seed if model.has_dropout else None, model.attention_reach)

    def losses(self, num_steps: int) -> list[float]:
        return [float(self.step().loss) for _ in range(num_steps)]
