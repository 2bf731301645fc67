"""Greedy soups: of several checkpoints of one model, the average of those that together measure best."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from distft.checkpoint.average import AveragedCheckpoint
from distft.checkpoint.sources import CheckpointSource
from distft.errors import ConfigError
from distft.run.ensemble import are_folds
from distft.run.pretrained import evaluate_model, open_model, ranks_of
from distft.topology import Topology
from distft.train.early_stopping import EarlyStoppingConfig

# The metric that decides, the first of these that the objective has; otherwise the loss.
_DECIDING = ("accuracy", "entity_f1", "micro_f1", "spearman")


@dataclass(frozen=True, slots=True)
class Ingredient:
    """A checkpoint, and the figures that decided about it."""

    path: str
    value: float  # its own
    with_soup: float | None  # of the soup with it; None: it is the first
    is_kept: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Soup:
    """The average of the kept checkpoints, and how each measured."""

    source: CheckpointSource  # of one checkpoint alone, if no other was kept
    summary: str
    metric: str
    value: float
    ingredients: Sequence[Ingredient]  # best first


def greedy_soup(
    paths: Sequence[str],
    metric: str | None = None,
    overrides: Sequence[str] = (),
    *,
    trust: bool = False,
    on_note: Callable[[str], None] = lambda _: None,
) -> Soup:
    """Members in the order of their metric, each kept if the average with it is no worse.

    As in Wortsman et al. 2022 (arXiv:2203.05482). All are measured on the validation data of the first, in
    this process; `overrides` may name other rows. `metric` None: accuracy or its like, else the loss.
    """
    members = [open_model(path, overrides, trust=trust) for path in paths]
    for member in members:
        for note in member.notes:
            on_note(f"{member.source.path}: {note}")
    AveragedCheckpoint([member.source for member in members])  # raises if they are not of the same model
    if are_folds(members):
        raise ConfigError(
            "The members are folds: each was trained on what another holds out. Name rows that none has seen "
            "by --set, as validation.type=labelled and validation.path=held_out.jsonl."
        )
    with ranks_of(members[0].config, Topology()) as (collectives, device):

        def measure(source: CheckpointSource) -> dict[str, float]:
            return evaluate_model(replace(members[0], source=source), collectives, device)

        measured = [measure(member.source) for member in members]
        name = metric or next((name for name in _DECIDING if name in measured[0]), "loss")
        if name not in measured[0]:
            known = ", ".join(measured[0])
            raise ConfigError(f"{name} is no metric of the validation data. These are: {known}.")
        sign = -1 if EarlyStoppingConfig(metric=name).direction == "min" else 1
        best_first = sorted(range(len(members)), key=lambda i: -sign * measured[i][name])
        kept = [members[best_first[0]].source]
        value = measured[best_first[0]][name]
        ingredients = [Ingredient(kept[0].path, value, None, is_kept=True)]
        for index in best_first[1:]:
            source = members[index].source
            together = measure(AveragedCheckpoint([*kept, source]))[name]
            is_kept = sign * together >= sign * value
            ingredients.append(Ingredient(source.path, measured[index][name], together, is_kept))
            if is_kept:
                kept, value = [*kept, source], together
    soup = kept[0] if len(kept) == 1 else AveragedCheckpoint(kept)
    summary = soup.summary if isinstance(soup, AveragedCheckpoint) else f"{soup.path} alone"
    return Soup(source=soup, summary=summary, metric=name, value=value, ingredients=ingredients)
