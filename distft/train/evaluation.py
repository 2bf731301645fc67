"""Metrics on validation data; they do not depend on the number of ranks."""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from distft.data.batch import AnyBatch
from distft.objective.interface import Model, Objective, ObjectiveContext
from distft.topology import BatchPlan, split_among_ranks


class EvaluationFeed(Protocol):
    """A finite data set in a fixed order."""

    num_sequences: int

    def first(self, num_sequences: int) -> "EvaluationFeed":
        """At most that many of its sequences, of each stream if there are several."""

    def batch(self, start: int, stop: int) -> AnyBatch:
        """Sequences [start, stop); an empty range gives a batch without targets."""


@torch.no_grad()
def evaluate(
    model: Model,
    module: nn.Module,
    objective: Objective,
    feed: EvaluationFeed,
    *,
    context: ObjectiveContext,
    micro_batch_size: int,
    seq_len: int,
    device: torch.device,
    max_sequences: int | None = None,
    on_progress: Callable[[int], None] | None = None,
    on_sums: Callable[[Mapping[str, Tensor]], None] = lambda _: None,
) -> dict[str, float]:
    """Metrics over the rows of `feed`, each counted once; the same on every rank.

    Of every stream at most the first `max_sequences` count. `on_sums` gets what the metrics are made of.

    Each rank takes a contiguous share. All ranks run the same number of batches, since a stage-3 forward is a
    collective: if the sequences do not divide evenly, some batches are empty and add zeros to the sums.
    """
    collectives = context.collectives
    if max_sequences is not None:
        feed = feed.first(max_sequences)
    num_sequences = feed.num_sequences
    plan = BatchPlan(
        global_batch_size=max(num_sequences, collectives.dp_world_size),
        micro_batch_size=min(micro_batch_size, max(num_sequences, 1)),
        seq_len=seq_len,
        dp_world_size=collectives.dp_world_size,
    )
    was_training = module.training
    module.eval()
    sums: dict[str, Tensor] = {}
    rows: dict[str, list[Tensor]] = {}
    try:
        for micro_batch in split_among_ranks(0, num_sequences, plan, collectives.dp_rank):
            batch = feed.batch(micro_batch.start, micro_batch.stop).to(device)
            for name, value in objective.evaluate(model, batch, context).items():
                if name in objective.per_row:
                    rows.setdefault(name, []).append(value)
                    continue
                sums[name] = sums[name] + value if name in sums else value
            if on_progress is not None:
                on_progress(len(micro_batch))
    finally:
        module.train(was_training)
    totals = {name: collectives.all_reduce_sum(value) for name, value in sums.items()}
    # Each rank has a contiguous share, so the ranks' rows one after another are in the data's order.
    in_order = {name: collectives.differentiable_gather(torch.cat(parts)) for name, parts in rows.items()}
    on_sums(totals | in_order)
    return objective.metrics(totals | in_order)
