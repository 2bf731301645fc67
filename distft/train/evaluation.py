"""Held-out metrics, equal whatever the number of ranks."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distft.collectives import Collectives
from distft.data.batch import Batch
from distft.topology import BatchPlan, share


class EvaluationFeed(Protocol):
    """A finite data set in a fixed order."""

    num_sequences: int

    def batch(self, start: int, stop: int) -> Batch:
        """Sequences [start, stop); an empty range gives a batch with nothing that counts."""


class Evaluator(Protocol):
    """An objective, as far as evaluation cares."""

    def evaluate(self, model: Callable[..., Any], batch: Batch) -> dict[str, Tensor]:
        """Sums over the batch that add up over batches and ranks."""

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """What the sums over a whole data set mean."""


@torch.no_grad()
def evaluate(
    model: Callable[..., Any],
    module: nn.Module,
    objective: Evaluator,
    feed: EvaluationFeed,
    *,
    micro_batch_size: int,
    seq_len: int,
    collectives: Collectives,
    device: torch.device,
    max_sequences: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Metrics over the first `max_sequences` of `feed`, each counted once, on every rank the same.

    Ranks take contiguous shares; where they do not divide, a rank runs an empty batch to keep step (a
    stage-3 forward is a collective), which adds zeros to the sums.
    """
    num_sequences = feed.num_sequences if max_sequences is None else min(feed.num_sequences, max_sequences)
    plan = BatchPlan(
        global_batch_size=max(num_sequences, collectives.world_size),
        micro_batch_size=min(micro_batch_size, max(num_sequences, 1)),
        seq_len=seq_len,
        dp_world_size=collectives.world_size,
    )
    was_training = module.training
    module.eval()
    sums: dict[str, Tensor] = {}
    try:
        for part in share(0, num_sequences, plan, collectives.rank):
            found = objective.evaluate(model, feed.batch(part.start, part.stop).to(device))
            for name, value in found.items():
                sums[name] = sums[name] + value if name in sums else value
            if on_progress is not None:
                on_progress(len(part))
    finally:
        module.train(was_training)
    return objective.metrics({name: collectives.all_reduce_sum(value) for name, value in sums.items()})
