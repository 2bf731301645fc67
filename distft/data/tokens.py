"""Token shards as training data: one source or a weighted mixture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from distft.config import PathText, Settings
from distft.data.dataset import DataContext, DocumentMode, check_vocabulary
from distft.data.shares import integer_shares
from distft.errors import ConfigError, DataError

if TYPE_CHECKING:
    from distft.data.feed import Feed
    from distft.data.packing import PackedRows


class TokenSourceConfig(Settings):
    """A directory of token shards and its weight in the mixture."""

    path: PathText  # local, or a URL: then each row is fetched when it is needed
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)  # share of sequences, relative to the other weights


class TokensConfig(Settings):
    """Rows packed from token shards."""

    type: Literal["tokens"] = "tokens"
    sources: tuple[TokenSourceConfig, ...] = Field(min_length=1)
    documents: DocumentMode = "separate"  # "joined": attention and positions cross document boundaries
    shuffle: bool = True
    data_seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        try:
            integer_shares([source.weight for source in self.sources])
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self

    def build(self, context: DataContext) -> Feed:
        """Infinite epochs for training, sources mixed by weight."""
        from distft.data.feed import Feed

        rows = self.open(context)
        return Feed.for_training(
            *rows,
            weights=[source.weight for source in self.sources],
            seed=self.data_seed,
            shuffle=self.shuffle,
            document_start=rows[0].document_start(context.bos_id, context.eos_id),
        )

    def build_for_evaluation(self, context: DataContext) -> Feed:
        """Every row of every source once, regardless of the weights."""
        from distft.data.feed import Feed

        return Feed.for_evaluation(*self.open(context))

    def open(self, context: DataContext) -> list[PackedRows]:
        """Open every source. Raises one `DataError` with the problems of all of them."""
        opened, problems = [], []
        for source in self.sources:
            try:
                opened.append(self._open_source(source.path, context))
            except DataError as error:
                problems.append(str(error))
        if problems:
            raise DataError("\n".join(problems))
        return opened

    def _open_source(self, path: str, context: DataContext) -> PackedRows:
        from distft.data.packing import PackedRows
        from distft.data.shards import MAX_MAPS, TokenShards

        shards = TokenShards.open(path, max_maps=max(1, MAX_MAPS // len(self.sources)))
        if shards.tokenizer_fingerprint != context.tokenizer_fingerprint:
            raise DataError(
                f"{path} was made with tokenizer {shards.tokenizer_fingerprint}, but this run uses "
                f"{context.tokenizer_fingerprint}: name the tokenizer that made the shards, or make them "
                f"again with `distft tokenize`."
            )
        check_vocabulary(path, shards.max_token_id, context)
        return PackedRows(
            shards,
            context.seq_len,
            documents=self.documents,
            token_bytes=context.token_bytes,
            name=path,
        )
