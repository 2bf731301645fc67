"""Ensembles of classifiers: measured on validation data beside each of their members."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from distft.checkpoint.steps import absolute
from distft.collectives import Collectives
from distft.data.batch import AnyBatch
from distft.data.dataset import ClassNames
from distft.data.split import SplitConfig
from distft.errors import ConfigError
from distft.objective.classification import Classification
from distft.objective.interface import Model, ObjectiveContext, only_batch
from distft.run.combination import COMBINE, Combine, best_weights, combined
from distft.run.data_context import require_inputs_of_model
from distft.run.pretrained import TrainedModel, evaluate_model, open_model, ranks_of
from distft.topology import Topology

OUT_OF_FOLD = "out of fold"
_ROWS = "rows"  # an output of `_Outputs`


@dataclass(frozen=True, kw_only=True, slots=True)
class EnsembleReport:
    """Metrics by member and by ensemble."""

    members: Sequence[tuple[str, Mapping[str, float]]]  # a member's checkpoint and its metrics
    ensembles: Mapping[str, Mapping[str, float]]  # by `Combine`, or of folds `OUT_OF_FOLD`
    weights: Sequence[float] | None  # of the members; None: not found
    notes: Sequence[str]


@dataclass(frozen=True, slots=True)
class _Outputs:
    """What a member gives the rows, with the labels in the first member's order."""

    log_p: Tensor  # float64 [N, K], logarithms of probabilities
    labels: Tensor  # int64 [N]


class _RowOutputs(Classification):
    """Measures nothing: gives each row's logarithms of probabilities, and behind them its label."""

    @property
    def per_row(self) -> frozenset[str]:
        return frozenset({_ROWS})

    def evaluate(self, model: Model, batch: AnyBatch, context: ObjectiveContext) -> dict[str, Tensor]:  # noqa: ARG002
        logits, labels = self.counted_outputs(model, only_batch(batch))
        return {_ROWS: torch.cat([logits.double().log_softmax(dim=1), labels[:, None].double()], dim=1)}

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:  # noqa: ARG002
        return {}


def open_members(
    paths: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    trust: bool = False,
    on_note: Callable[[str], None] = lambda _: None,
) -> list[TrainedModel]:
    """The models of an ensemble.

    Raises one `ConfigError` for all that are no classifiers of the same labels, or whose objective or data
    do not fit their model.
    """
    members = [open_model(path, overrides, trust=trust) for path in paths]
    for member in members:
        for note in member.notes:
            on_note(f"{member.source.path}: {note}" if len(members) > 1 else note)
    named = [absolute(member.source.path) for member in members]
    problems = [
        f"{members[named.index(path)].source.path} is named {named.count(path)} times, so that it would "
        "count as often: name each member once."
        for path in dict.fromkeys(named)
        if named.count(path) > 1
    ]
    for member in members:
        objective: Any = member.config.objective
        if not isinstance(objective, Classification):
            problems.append(
                f"{member.source.path} was trained with objective.type={getattr(objective, 'type', '')}, and "
                "an ensemble is of classifiers: objective.type=classification."
            )
        elif set(_names(member)) != set(_names(members[0])):
            problems.append(
                f"{member.source.path} has other labels than {members[0].source.path}: "
                f"{_shown(set(_names(member)) - set(_names(members[0])), 'has')}"
                f"{_shown(set(_names(members[0])) - set(_names(member)), 'lacks')}. "
                "The members of an ensemble need the same."
            )
        problems += [f"{member.source.path}: {problem}" for problem in _misfits(member)]
    if problems:
        raise ConfigError("\n".join(problems))
    return members


def _misfits(member: TrainedModel) -> Iterator[str]:
    """What overrides ask of the member's model and it cannot do."""
    config, model = member.config, member.config.model
    assert model is not None
    for check in (partial(require_inputs_of_model, config), config.objective.check_model):
        try:
            check(model)
        except ConfigError as error:
            yield str(error)


def _names(member: TrainedModel) -> ClassNames:
    return member.label_names if isinstance(member.label_names, tuple) else ()


def _shown(names: set[str], verb: str) -> str:
    return f" it {verb} {', '.join(map(repr, sorted(names)[:5]))}{', ...' * (len(names) > 5)}" * bool(names)


def label_order(member: TrainedModel, first: TrainedModel) -> list[int]:
    """Where the labels of `first`, one after another, are among those of `member`."""
    own = _names(member)
    return [own.index(name) for name in _names(first)]


def are_folds(members: Sequence[TrainedModel]) -> bool:
    """Whether the members hold out different folds of one split.

    Raises `ConfigError` if what one of them holds out may have trained another.
    """
    splits = [member.config.validation for member in members]
    if not any(isinstance(split, SplitConfig) for split in splits):
        return False
    in_any_order = {"shuffle", "data_seed"}
    data = [member.config.data.model_dump(mode="json", exclude=in_any_order) for member in members]
    if all(own == data[0] for own in data) and all(_is_own_split(member) for member in members):
        if all(split == splits[0] for split in splits):
            return False
        known = [split for split in splits if isinstance(split, SplitConfig) and split.num_folds is not None]
        kinds = {(split.num_folds, split.split_seed) for split in known}
        if len(known) == len(splits) and len(kinds) == 1 and len({s.fold for s in known}) == len(known):
            return True
    raise ConfigError(
        "The members hold out different rows of their data, so rows that validate one may have trained "
        "another: name rows that none has seen, as validation.type=labelled validation.path=held_out.jsonl."
    )


def _is_own_split(member: TrainedModel) -> bool:
    """Whether the member was trained without what its split holds out; an override may have changed that."""
    split = member.config.validation
    saved = member.source.manifest.config.get("validation")
    return isinstance(split, SplitConfig) and saved == split.model_dump(mode="json")


def evaluate_ensemble(
    paths: Sequence[str],
    overrides: Sequence[str],
    topology: Topology,
    *,
    trust: bool = False,
    on_note: Callable[[str], None] = lambda _: None,
) -> EnsembleReport:
    """Each member, and their mean, vote and weighted mean, on validation data; on any number of ranks.

    The weights are found on the members' own validation data. Members that hold out folds of one split are
    measured on their folds, and together out of fold: each row by the member that it did not train.
    """
    members = open_members(paths, overrides, trust=trust, on_note=on_note)
    objective = cast("Classification", members[0].config.objective)
    is_folds = are_folds(members)
    with ranks_of(members[0].config, topology) as (collectives, device):
        outputs = _outputs(members, collectives, device)
        of_members = [(m.source.path, _metrics(objective, o)) for m, o in zip(members, outputs, strict=True)]
        if is_folds:
            joined = _Outputs(torch.cat([o.log_p for o in outputs]), torch.cat([o.labels for o in outputs]))
            return EnsembleReport(
                members=of_members,
                ensembles={OUT_OF_FOLD: _metrics(objective, joined)},
                weights=None,
                notes=[f"each member is measured on its own fold: {len(joined.labels):,} rows in all"],
            )
        _require_same_rows(members, outputs)
        names_rows = any(key.startswith("validation") for key in overrides)
        weights, note = None, "the weights were found on these rows, so their figure is too good"
        if not names_rows:
            weights = _weights(outputs)
        else:
            kept = [key for key in overrides if not key.startswith("validation")]
            weights, note = find_weights(paths, kept, collectives, device, trust=trust)
    log_p_MNK, labels_N = torch.stack([o.log_p for o in outputs]), outputs[0].labels
    ensembles = {
        how: _metrics(objective, _Outputs(combined(log_p_MNK, cast("Combine", how), weights or ()), labels_N))
        for how in COMBINE
        if how != "weights" or weights is not None
    }
    del ensembles["vote"]["loss"]  # votes are no probabilities
    return EnsembleReport(members=of_members, ensembles=ensembles, weights=weights, notes=[note])


def find_weights(
    paths: Sequence[str],
    overrides: Sequence[str],
    collectives: Collectives,
    device: torch.device,
    *,
    trust: bool = False,
) -> tuple[list[float] | None, str]:
    """The members' weights on their own validation data, and where they were found; None: and why not."""
    members = open_members(paths, overrides, trust=trust)
    if any(member.config.validation is None for member in members):
        return None, "no weights were sought: not all members have validation data of their own"
    try:
        if are_folds(members):
            return None, "no weights were sought: each fold's rows are new to one member alone"
        outputs = _outputs(members, collectives, device)
        _require_same_rows(members, outputs)
    except ConfigError as error:
        return None, f"no weights were sought on the members' own validation data: {error}"
    return _weights(outputs), "the weights were found on the members' own validation data"


def _weights(outputs: Sequence[_Outputs]) -> list[float]:
    of_labels = [o.log_p.gather(1, o.labels[:, None])[:, 0] for o in outputs]
    return best_weights(torch.stack(of_labels))


def _outputs(
    members: Sequence[TrainedModel], collectives: Collectives, device: torch.device
) -> list[_Outputs]:
    """One model is in memory at a time."""
    found = []
    for member in members:
        of_member: dict[str, Tensor] = {}
        objective = _RowOutputs.model_validate(member.config.objective.model_dump())
        evaluate_model(member, collectives, device, objective=objective, on_sums=of_member.update)
        rows, order = of_member[_ROWS].cpu(), label_order(member, members[0])
        new_ids = torch.empty(len(order), dtype=torch.int64)
        new_ids[order] = torch.arange(len(order))
        found.append(_Outputs(rows[:, :-1][:, order], new_ids[rows[:, -1].long()]))
    return found


def _require_same_rows(members: Sequence[TrainedModel], outputs: Sequence[_Outputs]) -> None:
    for member, own in zip(members[1:], outputs[1:], strict=True):
        if not torch.equal(own.labels, outputs[0].labels):
            raise ConfigError(
                f"{member.source.path} was measured on other rows than {members[0].source.path}: name the "
                "same for all, as validation.type=labelled validation.path=held_out.jsonl."
            )


def _metrics(objective: Classification, outputs: _Outputs) -> dict[str, float]:
    return objective.metrics(objective.sums(outputs.log_p, outputs.labels))
