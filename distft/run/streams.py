"""Whether data streams, the parts of a mixture and the validation data fit together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from distft.data.labelled import LabelledConfig
from distft.data.streams import StreamsConfig
from distft.errors import ConfigError, ErrorCollector, suggest_name
from distft.objective.interface import Objective
from distft.objective.mixture import Mixture

if TYPE_CHECKING:
    from distft.data.feed import AnyFeed


_LEARNT = {"one": "one label a row", "several": "any number of labels a row", "number": "a number a row"}


def stream_problems(data: Any, validation: Any, objective: Any) -> Iterator[str]:
    """What is wrong with the names of streams and parts, which the settings alone tell."""
    if isinstance(objective, Mixture):
        yield from _problems_of_mixture(data, validation, list(objective.parts))
        for name in objective.parts:
            yield from _problems_of_labels(objective.part(name), _streams_of(name, data, validation))
        return
    yield from _problems_of_labels(objective, {"data": data, "validation": validation})
    is_builtin = isinstance(objective, Objective) and (
        type(objective).transform_feed is Objective.transform_feed
    )
    for setting, given in (("data", data), ("validation", validation)):
        if is_builtin and isinstance(given, StreamsConfig):
            names = ", ".join(given.streams)
            yield (
                f"{setting}.type=streams has rows of several kinds, but objective.type="
                f"{objective.type} is one for all: set objective.type=mixture, with the parts {names}"
            )


def _problems_of_mixture(data: Any, validation: Any, parts: list[str]) -> Iterator[str]:
    shown = ", ".join(parts)
    for setting, given in (("data", data), ("validation", validation)):
        if given is None:
            continue
        if not isinstance(given, StreamsConfig):
            yield (
                f"{setting}.type={getattr(given, 'type', '')} with objective.type=mixture: set "
                f"{setting}.type=streams, with the streams {shown}"
            )
            continue
        for name in given.streams:
            if name not in parts:
                hint = suggest_name(name, parts)
                yield f"{setting}.streams.{name} has no part in objective.parts, which has {shown}.{hint}"
        if setting == "data":
            for name in parts:
                if name not in given.streams:
                    hint = suggest_name(name, list(given.streams))
                    yield f"objective.parts.{name} has no stream in data.streams: add one of its name.{hint}"


def _streams_of(name: str, data: Any, validation: Any) -> dict[str, Any]:
    """The data of one stream, by setting."""
    return {
        f"{setting}.streams.{name}.data": given.streams[name].data
        for setting, given in (("data", data), ("validation", validation))
        if isinstance(given, StreamsConfig) and name in given.streams
    }


def _problems_of_labels(objective: Any, data: dict[str, Any]) -> Iterator[str]:
    """That labels are read as something else than the objective learns; `data` is by setting."""
    needed = objective.row_labels if isinstance(objective, Objective) else None
    wrong = {
        setting: given.labels
        for setting, given in data.items()
        if isinstance(given, LabelledConfig) and given.label is not None and given.labels != needed
    }
    if needed is None or not wrong:
        return
    found = " and ".join(f"{setting}.labels={kind}" for setting, kind in wrong.items())
    yield (
        f"objective.type={getattr(objective, 'type', '')} learns {_LEARNT[needed]}, and {found}: set "
        f"labels={needed} there, or another objective.type"
    )


def require_targets(objective: Objective, setting: str, data: Any, feed: AnyFeed) -> None:
    """Raise one `ConfigError` for all streams whose rows lack targets that the objective counts."""
    from distft.data.feed import StreamFeed

    if not isinstance(feed, StreamFeed) or not isinstance(objective, Mixture):
        _require_targets(objective, "objective", setting, data, feed)
        return
    errors = ErrorCollector()
    for name, stream in feed.streams.items():
        of_part = f"objective.parts.{name}.objective"
        own = data.streams[name].data if isinstance(data, StreamsConfig) else data
        with errors.collect():
            _require_targets(objective.part(name), of_part, f"{setting}.streams.{name}.data", own, stream)
    errors.raise_if_any()


def _require_targets(objective: Objective, of_objective: str, setting: str, data: Any, feed: AnyFeed) -> None:
    rows = feed.batch(0, 0)
    try:
        objective.num_targets(rows)
    except KeyError as missing:
        names = ", ".join(getattr(rows, "targets", {})) or "none"
        raise ConfigError(
            f"{setting}.type={getattr(data, 'type', '')} with {of_objective}.type="
            f"{getattr(objective, 'type', '')}: these rows have the targets {names}, and the objective "
            f"learns {missing}. Choose another of the two."
        ) from None
