"""The loss and the gradient of a training's first step, by an engine; and the model that it begins with."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from distft.data.feed import Feed
from distft.model.heads import Heads
from distft.model.transformer import Transformer
from distft.objective.interface import Objective, ObjectiveContext
from distft.topology import Topology
from distft.train.step import train_step
from support.engine_scenarios import VOCAB_SIZE, Scenario, Training, collectives_for, fresh_source


@dataclass(frozen=True)
class Outcome:
    loss: float
    gradient: Mapping[str, Tensor]


def first_step(
    scenario: Scenario,
    objective: Objective,
    heads: Heads,
    feed: Feed,
    topology: Topology,
    dropout_seed: int | None,
) -> Outcome:
    """What an engine computes of the feed's first global batch."""
    collectives = collectives_for(scenario, topology)
    training = Training(scenario, topology, collectives, heads=heads)
    training.engine.module.train()
    context = ObjectiveContext(VOCAB_SIZE, collectives)
    batches = [
        feed.batch(micro.start, micro.stop).for_step(dropout_seed) for micro in training._micro_batches()
    ]
    result = train_step(
        training.engine,
        objective.prepare_step(training.engine.model, batches, context),
        loss_sums=lambda model, batch: objective.loss_sums(model, batch, context),
        num_targets=objective.num_targets,
        weights=objective.term_weights(0),
        group_lr=lambda _: 1e-3,
    )
    # The first moment after one step is (1 - beta1) times the gradient.
    share = 1 - scenario.optim.betas[0]
    state = training.whole_state()
    gradient = {name: values / share for (name, kind), values in state.items() if kind == "exp_avg"}
    training.engine.close()
    return Outcome(float(result.loss), gradient)


def untrained_model(scenario: Scenario, heads: Heads) -> Transformer:
    """The model with which the step begins, in training mode."""
    model = Transformer(scenario.model, heads).train()
    named = dict(model.named_parameters())
    source = fresh_source({name: tuple(param.shape) for name, param in named.items()})
    for name, param in named.items():
        param.data.copy_(source.read(name, "weight", 0, param.numel()).view_as(param))
    return model
