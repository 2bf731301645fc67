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
        trained = self._with_few_logits(
            heads, passes, lambda own: training_flops(self.model, self.seq_len, own, self.trainable)
        )
        forward = self._with_few_logits(
            heads, passes, lambda own: forward_flops(self.model, self.seq_len, own)
        )
        return _times(trained, passes.trained) + _times(forward, passes.forward_only)

    def recomputed(self, passes: Passes) -> Flops:
        """What full activation checkpointing adds to that, of a Transformer."""
        assert isinstance(self.model, TransformerConfig)
        return _times(recomputed_flops(self.model, self.trainable), passes.trained)

    def _with_few_logits(self, heads: Heads, passes: Passes, count: Callable[[Heads], Flops]) -> Flops:
        """`count(heads)`, but a language model's head on the share of positions that have logits."""
        whole = count(heads)
        if passes.logits_share == 1:
            return whole
        others = {name: head for name, head in heads.items() if not isinstance(head, LanguageModelHead)}
        return _times(whole, passes.logits_share) + _times(count(others), 1 - passes.logits_share)


def _times(flops: Flops, factor: float) -> Flops:
    return Flops(flops.per_token * factor, flops.per_pair * factor)
