"""Models of images train the same on every engine and number of ranks: classes, and images with texts."""

from typing import Any

import pytest
import torch
from support.engine_scenarios import (
    FREEING,
    GLOBAL_BATCH_SIZE,
    SEQ_LEN,
    VOCAB_SIZE,
    Scenario,
    Training,
    train_all,
)
from support.rank_pool import run_ranks

from distft.collectives import Collectives, SingleProcess
from distft.config import parse
from distft.data.batch import Batch
from distft.keyed_random import row_keys
from distft.model.config import ModelConfig
from distft.model.settings import AnyModelConfig
from distft.objective.classification import Classification
from distft.objective.contrastive import Contrastive
from distft.objective.interface import ObjectiveContext
from distft.objective.views import as_columns
from distft.topology import Topology
from distft.train.step import train_step

NUM_STEPS = 5
NAMES = ("a", "b", "c")
IMAGES = {"image_size": 6, "num_channels": 3, "dropout": 0.2}
# Without a bias of k: no loss depends on it, so its gradient is rounding, and AdamW makes a step of that.
VIT = {
    **IMAGES,
    "type": "vit",
    "patch_size": 2,
    "d_model": 18,
    "num_layers": 2,
    "num_heads": 3,
    "d_ff": 29,
    "attention_bias": False,
}
CNN = {**IMAGES, "type": "image_cnn", "num_filters": [5, 7]}
TEXT = {"vocab_size": VOCAB_SIZE, "max_seq_len": SEQ_LEN, "d_model": 12, "num_layers": 1, "num_heads": 2}
CLIP = {"type": "clip", "image": VIT, "text": {**TEXT, "dropout": 0.2}, "d_embedding": 11}
MODELS: list[dict[str, Any]] = [VIT, CNN, CLIP]


class ImageTraining(Training):
    """Of a model of images, by the objective that fits it."""

    def __init__(self, scenario: Scenario, topology: Topology, collectives: Collectives) -> None:
        model = scenario.model
        self.objective = (
            Contrastive(symmetric=True, temperature=0.2, learns_temperature=True)
            if model.reads_tokens
            else Classification().resolved(model, None)
        )
        super().__init__(scenario, topology, collectives, heads=self.objective.heads(NAMES))
        self.context = ObjectiveContext(VOCAB_SIZE, collectives)
        shape = (len(self.rows), *(model.image_shape or ()))
        generator = torch.Generator().manual_seed(2)
        self.images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    def run_step(self, batches: list[Batch], factor: float = 1.0) -> None:
        lr = 3e-3 * (1 - self.step / 100) * factor
        self.last = train_step(
            self.engine,
            self.objective.prepare_step(self.engine.model, batches, self.context),
            loss_sums=lambda model, batch: self.objective.loss_sums(model, batch, self.context),
            num_targets=self.objective.num_targets,
            weights=self.objective.term_weights(self.step),
            group_lr=lambda group: lr * group.lr_scale,
        )
        self.step += 1

    def _batch(self, start: int, stop: int) -> Batch:
        numbers = torch.arange(start, max(stop, start + 1))
        is_captioned = self.scenario.model.reads_tokens
        ids = self.rows[numbers]
        batch = Batch(
            input_ids=ids[:, :-1] if is_captioned else torch.zeros(len(ids), 1, dtype=torch.int64),
            lengths=1 + ids[:, 0] % SEQ_LEN if is_captioned else None,
            images=self.images[numbers],
            is_captioned=is_captioned,
            dropout_keys=row_keys(3, numbers),
            targets={"label": ids[:, 1] % len(NAMES)},
            num_targets={"label": len(ids)},
        )
        if stop <= start:
            batch = batch.without_targets()
        return as_columns(batch) if is_captioned else batch


def _model(raw: dict[str, Any]) -> ModelConfig:
    model: ModelConfig = parse(AnyModelConfig, raw)
    return model


def _scenarios(stages: list[int]) -> list[Scenario]:
    return [
        Scenario(stage=stage, other_model=_model(raw), zero=FREEING if stage == 3 else {})
        for raw in MODELS
        for stage in stages
    ]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("world_size", "stages"), [(1, [2]), (2, [0, 1, 3]), (4, [2, 3])], ids=["1", "2", "4"]
)
def test_zero_computes_what_the_local_engine_computes(world_size: int, stages: list[int]) -> None:
    scenarios = _scenarios(stages)
    by_rank = run_ranks(train_all, world_size, scenarios, NUM_STEPS, ImageTraining, timeout_s=240)
    for number, scenario in enumerate(scenarios):
        # In one micro-batch: of several, contrastive losses are those of the whole batch too.
        alone = ImageTraining(
            Scenario(other_model=scenario.model, micro_batch_size=GLOBAL_BATCH_SIZE),
            Topology(),
            SingleProcess(),
        )
        expected_losses, expected = alone.run(NUM_STEPS), alone.whole_state()
        assert len(set(expected_losses)) == NUM_STEPS
        for results in by_rank:
            losses, state = results[number]
            assert losses == pytest.approx(expected_losses, abs=1e-6), scenario
            assert state.keys() == expected.keys()
            for key, values in state.items():
                torch.testing.assert_close(
                    values, expected[key], atol=2e-5, rtol=1e-4, msg=f"{scenario} {key}"
                )
