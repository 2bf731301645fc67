"""Settings of several data streams in one run, each of a kind of its own, such as labelled and unlabelled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from distft.config import Component, Settings
from distft.data.completion import CompletionConfig
from distft.data.conversations import ConversationsConfig
from distft.data.dataset import DataContext
from distft.data.images import ImagesConfig
from distft.data.labelled import LabelledConfig
from distft.data.pairs import PairsConfig
from distft.data.shares import integer_shares
from distft.data.token_labels import TokenLabelsConfig
from distft.data.tokens import TokensConfig
from distft.errors import ConfigError, ErrorCollector

if TYPE_CHECKING:
    from distft.data.feed import Feed, StreamFeed

StreamDataConfig = Annotated[
    TokensConfig
    | LabelledConfig
    | TokenLabelsConfig
    | CompletionConfig
    | ConversationsConfig
    | PairsConfig
    | ImagesConfig,
    Component(),
]
StreamName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=40)]


class StreamConfig(Settings):
    """One stream: its data, and its share of the run's sequences."""

    data: StreamDataConfig
    share: float = Field(
        1.0, gt=0, allow_inf_nan=False
    )  # relative to the other shares; no effect in validation


class StreamsConfig(Settings):
    """Several streams, by name; `objective.type=mixture` has a part for each."""

    type: Literal["streams"] = "streams"
    streams: dict[StreamName, StreamConfig] = Field(min_length=1)
    alternate: bool = False  # each optimizer step takes all its sequences from one stream

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        try:
            integer_shares([stream.share for stream in self.streams.values()])
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self

    def build(self, context: DataContext) -> StreamFeed:
        """Infinite epochs of every stream, interleaved by their shares."""
        from distft.data.feed import StreamFeed
        from distft.data.mixture import Interleaving

        block_size = context.global_batch_size if self.alternate else 1
        shares = [stream.share for stream in self.streams.values()]
        feeds = self._build_each(context, for_evaluation=False)
        if not self.alternate:
            total = sum(shares)
            feeds = {
                name: feed.with_step_share(share / total)
                for (name, feed), share in zip(feeds.items(), shares, strict=True)
            }
        return StreamFeed(
            feeds,
            Interleaving(shares, block_size=block_size),
            steps_of=block_size if self.alternate else None,
        )

    def build_for_evaluation(self, context: DataContext) -> StreamFeed:
        """Every row of every stream once, one stream after another."""
        from distft.data.feed import StreamFeed
        from distft.data.mixture import SequentialSampler

        feeds = self._build_each(context, for_evaluation=True)
        return StreamFeed(feeds, SequentialSampler([feed.num_sequences for feed in feeds.values()]))

    def _build_each(self, context: DataContext, *, for_evaluation: bool) -> dict[str, Feed]:
        """Raises one `DataError` with the problems of all streams."""
        names = context.label_names if isinstance(context.label_names, Mapping) else {}
        feeds, errors = {}, ErrorCollector()
        for name, stream in self.streams.items():
            own = replace(context, label_names=names.get(name))
            with errors.collect():
                data = stream.data
                feeds[name] = data.build_for_evaluation(own) if for_evaluation else data.build(own)
        errors.raise_if_any()
        return feeds
