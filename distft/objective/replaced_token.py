"""Replaced-token detection: a small generator fills masked tokens, and the model tells which ones it changed.

Shape letters: B rows, T positions, N = B * T, M masked positions, C = d_model, V = padded_vocab_size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from distft.data.dataset import Labels, TransformContext
from distft.data.targets import IGNORE_INDEX, MASKED_TOKEN, REPLACED_TOKEN
from distft.model.config import ModelConfig
from distft.model.heads import GeneratorHead, Heads, TokenHead
from distft.objective.interface import Model, Objective, ObjectiveContext, only_batch
from distft.objective.language_model import require_bidirectional, require_transformer
from distft.objective.masking import MaskingSettings

if TYPE_CHECKING:  # a configuration is checked without torch, which takes 2 s to import
    from torch import Tensor

    from distft.data.batch import AnyBatch, Batch
    from distft.data.feed import Transform
    from distft.objective.token_sampling import LossFn

GENERATOR, DISCRIMINATOR = "generator", "discriminator"  # heads, and the terms that they learn by


class ReplacedToken(MaskingSettings, Objective):
    """ELECTRA (Clark et al. 2020, arXiv:2003.10555): both models in one step, with one embedding.

    The generator's loss is the cross entropy of the masked tokens. A token is drawn from its predictions in
    the place of each; the discriminator's loss is the binary cross entropy, over all real tokens, of whether
    a token is another one than in the data. No gradient goes through the draw.
    """

    type: Literal["replaced_token"] = "replaced_token"
    mask_token_share: float = Field(1.0, ge=0, le=1)  # of the targets: replaced by the mask token
    random_token_share: float = Field(0.0, ge=0, le=1)  # replaced by any token; the rest are kept
    generator_size: float = Field(0.25, gt=0, le=4)  # width, heads and feed-forward, relative to the model's
    generator_layers: int = Field(2, ge=1, le=4096)
    discriminator_weight: float = Field(50.0, gt=0, allow_inf_nan=False)  # the generator's loss has weight 1

    def heads(self, label_names: Labels) -> Heads:  # noqa: ARG002
        """`generator`, blocks of its own, and `discriminator`, one number a token."""
        generator = GeneratorHead(
            num_layers=self.generator_layers, size=self.generator_size, output_share=self.mask_rate
        )
        return {GENERATOR: generator, DISCRIMINATOR: TokenHead(num_outputs=1)}

    def check_model(self, model: ModelConfig) -> None:
        require_transformer(model, self.type, "its generator has a Transformer's blocks")
        require_bidirectional(model, self.type)

    def transforms(self, context: TransformContext) -> Sequence[Transform]:
        from distft.objective.token_sampling import DiscriminatorTargets

        return (self.masker(context), DiscriminatorTargets(context.seed))

    def notes(self, context: TransformContext) -> Sequence[str]:
        return self.mask_notes(context.data)

    def term_weights(self, step: int) -> Mapping[str, float]:  # noqa: ARG002
        return {GENERATOR: 1.0, DISCRIMINATOR: self.discriminator_weight}

    def num_targets(self, batch: AnyBatch) -> Mapping[str, int]:
        counts = only_batch(batch).num_targets
        return {GENERATOR: counts[MASKED_TOKEN], DISCRIMINATOR: counts[REPLACED_TOKEN]}

    def loss_sums(self, model: Model, batch: AnyBatch, context: ObjectiveContext) -> Mapping[str, Tensor]:
        from distft.objective.cross_entropy import FusedLinearCrossEntropy
        from distft.objective.token_sampling import discriminator_loss_sum

        rows = only_batch(batch)
        loss_fn = FusedLinearCrossEntropy(context.vocab_size, compiles=context.compiles)
        generator_sum, replaced = self._generate(model, rows, loss_fn, context)
        logits = self._discriminate(model, rows, replaced)
        is_replaced = replaced != _original(rows)
        discriminator_sum = discriminator_loss_sum(logits, is_replaced, rows.targets[REPLACED_TOKEN])
        return {GENERATOR: generator_sum, DISCRIMINATOR: discriminator_sum}

    def evaluate(self, model: Model, batch: AnyBatch, context: ObjectiveContext) -> dict[str, Tensor]:
        """Sums, float64: of the generator loss, correct and targets; of the discriminator further counts."""
        import torch

        from distft.objective.cross_entropy import LossAndNumCorrect
        from distft.objective.token_sampling import discriminator_loss_sum

        rows = only_batch(batch)
        with torch.no_grad():
            loss_fn = LossAndNumCorrect(context.vocab_size)
            generator_sums, replaced = self._generate(model, rows, loss_fn, context)
            logits = self._discriminate(model, rows, replaced).double()
            is_replaced, counts = replaced != _original(rows), rows.targets[REPLACED_TOKEN] != IGNORE_INDEX
            loss_sum = discriminator_loss_sum(logits, is_replaced, rows.targets[REPLACED_TOKEN])
            is_claimed = logits > 0
            sums = [loss_sum, ((is_claimed == is_replaced) & counts).sum(), counts.sum()]
            sums += [(x & counts).sum() for x in (is_replaced, is_claimed, is_replaced & is_claimed)]
        counted = torch.tensor([rows.num_targets[MASKED_TOKEN]], device=generator_sums.device)
        return {
            GENERATOR: torch.cat([generator_sums, counted.double()]),
            DISCRIMINATOR: torch.stack([value.double() for value in sums]),
        }

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Loss as weighted; of each model loss and accuracy; precision and recall of changed tokens."""
        loss, num_correct, num_masked = sums[GENERATOR].tolist()
        loss_sum, num_right, num_tokens, num_replaced, num_claimed, num_found = sums[DISCRIMINATOR].tolist()
        generator_loss, discriminator_loss = loss / max(num_masked, 1), loss_sum / max(num_tokens, 1)
        return {
            "loss": generator_loss + self.discriminator_weight * discriminator_loss,
            f"{GENERATOR}/loss": generator_loss,
            f"{GENERATOR}/accuracy": num_correct / max(num_masked, 1),
            f"{DISCRIMINATOR}/loss": discriminator_loss,
            f"{DISCRIMINATOR}/accuracy": num_right / max(num_tokens, 1),
            f"{DISCRIMINATOR}/replaced_share": num_replaced / max(num_tokens, 1),
            f"{DISCRIMINATOR}/precision": num_found / max(num_claimed, 1),
            f"{DISCRIMINATOR}/recall": num_found / max(num_replaced, 1),
        }

    def _generate(
        self, model: Model, rows: Batch, loss_fn: LossFn, context: ObjectiveContext
    ) -> tuple[Tensor, Tensor]:
        """What `loss_fn` computes at the masked positions, and the rows with drawn tokens there, [B, T]."""
        from distft.objective.token_sampling import SampleAndLoss

        fill = SampleAndLoss(rows, loss_fn, context.vocab_size)
        losses = {GENERATOR: fill}
        sums = model(**rows.model_inputs, heads=(GENERATOR,), losses_from_hidden=losses)[GENERATOR]
        return sums, fill.filled(rows.input_ids)

    def _discriminate(self, model: Model, rows: Batch, replaced: Tensor) -> Tensor:
        """fp32 [B, T]: above 0 where the token is claimed to be a replaced one."""
        inputs = {**rows.model_inputs, "input_ids": replaced}
        return model(**inputs, heads=(DISCRIMINATOR,))[DISCRIMINATOR][..., 0].float()


def _original(rows: Batch) -> Tensor:
    labels = rows.targets[MASKED_TOKEN]
    return rows.input_ids.where(labels == IGNORE_INDEX, labels)
