"""Small trainings for tests of engines and checkpoints, on a single process or as one of several ranks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.fragments import Fragment
from distft.checkpoint.manifest import Progress
from distft.checkpoint.snapshot import CheckpointSnapshot, ParameterInfo, RunMetadata
from distft.checkpoint.sources import InitialSource, StateSource
from distft.checkpoint.store import CheckpointStore
from distft.collectives import Collectives, ProcessGroup, SingleProcess
from distft.config import parse
from distft.data.batch import Batch
from distft.data.targets import NEXT_TOKEN
from distft.engine.interface import Engine
from distft.engine.local import LocalEngine
from distft.engine.quantized_weights import quantizable_weights
from distft.engine.settings import ActivationCheckpointing, LocalConfig
from distft.keyed_random import row_keys
from distft.model.config import ModelConfig
from distft.model.heads import LANGUAGE_MODEL, Heads
from distft.model.lora import add_adapters
from distft.model.lora_config import LoraConfig
from distft.model.transformer_config import TransformerConfig
from distft.optim.config import OptimConfig
from distft.optim.groups import ParameterGroup, parameter_groups
from distft.optim.patterns import select_trainable
from distft.optim.settings import OptimizerSettings
from distft.topology import BatchPlan, Topology
from distft.train.step import train_step

CPU = torch.device("cpu")
VOCAB_SIZE, SEQ_LEN, GLOBAL_BATCH_SIZE = 53, 12, 8

# By default stage 3 keeps weights of so small a model gathered; these settings free them after every block.
FREEING: Mapping[str, Any] = {
    "deepspeed": {
        "zero_optimization": {
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
        }
    }
}


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One training. Sizes are odd on purpose: parameters lie across ranks, and partitions need padding."""

    stage: int | None = None  # None: the local engine
    precision: str = "fp32"
    trainable: tuple[str, ...] = ("*",)
    tie_embeddings: bool = True
    activation_checkpointing: ActivationCheckpointing = "none"
    micro_batch_size: int = 2
    global_batch_size: int = GLOBAL_BATCH_SIZE
    attention: Literal["causal", "bidirectional"] = "causal"
    dropout: float = 0.0
    max_grad_norm: float | None = 0.5
    compile: bool = False
    other_model: ModelConfig | None = None  # in place of a Transformer
    lora: LoraConfig | None = None
    frozen_bits: int | None = None
    zero: Mapping[str, Any] = field(default_factory=dict)  # further settings of ZeroConfig
    optimizer: Mapping[str, Any] = field(default_factory=dict)  # settings of `optim` in place of these

    @property
    def model(self) -> ModelConfig:
        if self.other_model is not None:
            return self.other_model
        return TransformerConfig(
            vocab_size=VOCAB_SIZE,
            max_seq_len=SEQ_LEN,
            d_model=18,
            num_layers=2,
            num_heads=3,
            num_kv_heads=1,
            d_ff=29,
            tie_embeddings=self.tie_embeddings,
            dropout=self.dropout,
            attention=self.attention,
        )

    @property
    def optim(self) -> OptimizerSettings:
        usual = {
            "peak_lr": 3e-3,
            "max_grad_norm": self.max_grad_norm,
            "lr_scales": {"*blocks.1.*": 0.5},
            "ema_decay": 0.9,
        }
        optim: OptimizerSettings = parse(OptimConfig, {**usual, **self.optimizer})
        return optim


PARTLY = Scenario(micro_batch_size=8, trainable=("blocks.1.*", "norm.weight"))


def collectives_for(scenario: Scenario, topology: Topology) -> Collectives:
    return SingleProcess() if scenario.stage is None else ProcessGroup(topology, CPU, 60)


def fresh_source(shapes: Mapping[str, tuple[int, ...]]) -> StateSource:
    """Weights that depend on the parameter's name alone."""

    def fragment(name: str, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(stop - start)
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        return (torch.randn(prod(shape), generator=generator) * 0.1)[start:stop]

    return InitialSource(dict(shapes), fragment)


class Training:
    """An engine with the scenario's model, and its training data."""

    def __init__(
        self,
        scenario: Scenario,
        topology: Topology,
        collectives: Collectives,
        checkpoint: Checkpoint | None = None,
        *,
        heads: Heads = LANGUAGE_MODEL,
    ) -> None:
        self.scenario = scenario
        self.collectives = collectives
        with torch.device("meta"):
            module = scenario.model.build(heads)
            if scenario.lora is not None:
                add_adapters(module, scenario.lora)
        module.set_activation_checkpointing(scenario.activation_checkpointing)
        if scenario.compile:
            module.compile_blocks()
        self.shapes = {name: tuple(param.shape) for name, param in module.named_parameters()}
        self.trainable = select_trainable(self.shapes, scenario.trainable)
        self.quantizable = set(quantizable_weights(module))
        for name, param in module.named_parameters():
            param.requires_grad_(name in self.trainable)
        source = fresh_source(self.shapes) if checkpoint is None else checkpoint
        updates = {name: source.updates(name) for name in self.shapes}
        widths = scenario.model.widths(self.shapes)
        groups = parameter_groups(self.shapes, self.trainable, scenario.optim, updates, widths)
        self.plan = BatchPlan(
            global_batch_size=scenario.global_batch_size,
            micro_batch_size=scenario.micro_batch_size,
            seq_len=SEQ_LEN,
            dp_world_size=1 if scenario.stage is None else topology.world_size,
        )
        self.step = 0 if checkpoint is None else checkpoint.step
        self.before_update: Callable[[], None] = lambda: None
        self.engine = self._build_engine(module, groups)
        self.engine.load_fragments(source)
        generator = torch.Generator().manual_seed(1)
        self.rows = torch.randint(0, VOCAB_SIZE, (50 * GLOBAL_BATCH_SIZE, SEQ_LEN + 1), generator=generator)

    def _build_engine(self, module: nn.Module, groups: list[ParameterGroup]) -> Engine:
        scenario = self.scenario
        shared = {"param_dtype": scenario.precision, "frozen_bits": scenario.frozen_bits}
        if scenario.stage is None:
            settings = LocalConfig.model_validate(shared)
            return LocalEngine(module, groups, settings=settings, optim=scenario.optim, device=CPU)
        from distft.engine.deepspeed_config import ZeroConfig
        from distft.engine.zero import ZeroEngine

        zero = ZeroConfig.model_validate(
            {
                **shared,
                "zero_stage": scenario.stage,
                "activation_checkpointing": scenario.activation_checkpointing,
                **scenario.zero,
            }
        )
        return ZeroEngine(
            module,
            groups,
            settings=zero,
            optim=scenario.optim,
            plan=self.plan,
            collectives=self.collectives,
            device=CPU,
        )

    def run(self, to_step: int, *, poison_step: int | None = None) -> list[float]:
        """Train up to step `to_step`; return the losses. At `poison_step` loss and gradients are infinite."""
        losses = []
        while self.step < to_step:
            self.run_step(self.batches(), float("inf") if self.step == poison_step else 1.0)
            losses.append(float(self.last.loss))
        return losses

    def batches(self) -> list[Batch]:
        """This rank's micro-batches of the next step."""
        return [self._batch(micro.start, micro.stop) for micro in self._micro_batches()]

    def run_step(self, batches: list[Batch], factor: float = 1.0) -> None:
        """One step, whose result is in `last`; reads nothing of it."""
        lr = 3e-3 * (1 - self.step / 100)
        self.last = train_step(
            self.engine,
            batches,
            loss_sums=lambda model, batch: {NEXT_TOKEN: summed_loss(model, batch) * factor},
            num_targets=lambda batch: batch.num_targets,
            weights={NEXT_TOKEN: 1.0},
            group_lr=lambda group: lr * group.lr_scale,
            before_update=self.before_update,
        )
        self.step += 1

    def _micro_batches(self) -> list[Any]:
        return self.plan.micro_batches(self.step, self.collectives.rank)

    def _batch(self, start: int, stop: int) -> Batch:
        rows = self.rows[start:stop] if stop > start else self.rows[:1]
        labels = rows[:, 1:].clone()
        # Some rows have one target less, so that micro-batches differ in their number of targets.
        labels[:, 0] = torch.where(rows[:, 0] % 3 == 0, -100, labels[:, 0])
        if stop == start:
            labels[:] = -100
        numbers = torch.arange(start, max(stop, start + 1))
        second_starts = rows[:, :1] % SEQ_LEN  # rows are pairs for a model that has segments
        is_second = torch.arange(SEQ_LEN) >= second_starts
        has_source = self.scenario.model.is_encoder_decoder
        lengths = SEQ_LEN - rows[:, 0] % 3
        if has_source:
            labels[torch.arange(SEQ_LEN) >= lengths[:, None]] = -100
        return Batch(
            input_ids=rows[:, :-1],
            segment_ids=is_second.long() if self.scenario.model.has_segments else None,
            is_prefix=~is_second if has_source else None,
            lengths=lengths if has_source else None,
            dropout_keys=row_keys(3, numbers),
            targets={NEXT_TOKEN: labels},
            num_targets={NEXT_TOKEN: int((labels != -100).sum())},
        )

    def take_snapshot(self) -> CheckpointSnapshot:
        updates = self.engine.updates()
        return CheckpointSnapshot(
            progress=Progress(step=self.step),
            fragments=list(self.engine.fragments()),
            parameters={
                name: ParameterInfo(shape, name in self.trainable, updates.get(name, 0))
                for name, shape in self.shapes.items()
            },
            metadata=RunMetadata(
                run_id="test",
                config={"model": self.scenario.model.model_dump(mode="json")},
                written_by={},
            ),
            attachments={},
        )

    def save(self, root: str) -> str:
        return CheckpointStore(root, self.collectives).save(self.take_snapshot())

    def whole_state(self) -> dict[tuple[str, str], Tensor]:
        """Every state of every parameter, gathered from all ranks; each element must come exactly once."""
        mine = [(f.parameter, f.state, f.start, _copy(f)) for f in self.engine.fragments()]
        whole: dict[tuple[str, str], Tensor] = {}
        for name, state, start, values in chain.from_iterable(self.collectives.all_gather(mine)):
            flat = whole.setdefault((name, state), torch.full((prod(self.shapes[name]),), torch.nan))
            target = flat[start : start + values.numel()]
            assert target.isnan().all(), f"{state} of {name} has an element twice"
            target.copy_(values)
        assert not any(flat.isnan().any() for flat in whole.values()), "some element is missing"
        return whole


def _copy(fragment: Fragment) -> Tensor:
    return fragment.values.detach().float().clone()


def summed_loss(model: Any, batch: Batch) -> Tensor:
    logits = model(**batch.model_inputs)["lm_head"]
    return cross_entropy(
        logits.flatten(0, 1).float(), batch.targets[NEXT_TOKEN].flatten(), reduction="sum", ignore_index=-100
    )


def run_alone(scenario: Scenario, to_step: int, **options: Any) -> Training:
    training = Training(scenario, Topology(), SingleProcess())
    training.losses = training.run(to_step, **options)  # type: ignore[attr-defined]
    return training


def train_all(
    topology: Topology, scenarios: list[Scenario], num_steps: int, kind: type[Training] = Training
) -> list[tuple[list[float], dict[tuple[str, str], Tensor]]]:
    """Losses of `num_steps` steps and the whole state behind them, by scenario. All ranks call it."""
    results = []
    for scenario in scenarios:
        training = kind(scenario, topology, collectives_for(scenario, topology))
        results.append((training.run(num_steps), training.whole_state()))
        training.engine.close()
    return results
