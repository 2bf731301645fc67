"""What a step computes: the model's FLOPs, as often as the objective runs it."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from distft.model.config import ModelConfig
from distft.model.counts import Flops, forward_flops, recomputed_flops, training_flops
from distft.model.heads import Heads, LanguageModelHead
from distft.model.transformer_config import TransformerConfig
from distft.objective.interface import Passes


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFlops:
    """Counts FLOPs per token and pair of a batch, whose rows have `seq_len` tokens."""

    model: ModelConfig
    seq_len: int
    trainable: Collection[str]

    def of(self, heads: Heads, passes: Passes) -> Flops:
        """Of all passes with and without a gradient."""
        # Without logits the decoder of an encoder has one position: where it begins.
        has_logits = any(isinstance(head, LanguageModelHead) for head in heads.values())
        model = self.model.with_target_share(passes.logits_share if has_logits else 1 / self.seq_len)
        trained = self._with_few_logits(
            heads, passes, lambda own: training_flops(model, self.seq_len, own, self.trainable)
        )
        forward = self._with_few_logits(heads, passes, lambda own: forward_flops(model, self.seq_len, own))
        return trained * passes.trained + forward * passes.forward_only

    def recomputed(self, passes: Passes) -> Flops:
        """What full activation checkpointing adds to that, of a Transformer."""
        assert isinstance(self.model, TransformerConfig)
        return recomputed_flops(self.model, self.trainable) * passes.trained

    def _with_few_logits(self, heads: Heads, passes: Passes, count: Callable[[Heads], Flops]) -> Flops:
        """`count(heads)`, but a language model's head on the share of positions that have logits."""
        whole = count(heads)
        if passes.logits_share == 1:
            return whole
        others = {name: head for name, head in heads.items() if not isinstance(head, LanguageModelHead)}
        return whole * passes.logits_share + count(others) * (1 - passes.logits_share)
