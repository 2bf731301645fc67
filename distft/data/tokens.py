"""Prepared token shards as training data: one source, or several with weights."""

from typing import Literal, Self

from pydantic import Field, model_validator

from distft.config import Settings
from distft.data.dataset import DataContext, check_vocabulary
from distft.data.feed import Feed
from distft.data.mixture import whole_shares
from distft.data.packing import Documents, PackedRows
from distft.data.shards import TokenShards
from distft.errors import ConfigError, DataError


class TokenSourceConfig(Settings):
    """A directory of token shards, and how much of the run it is."""

    path: str
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)  # of the run's sequences, beside the other weights


class TokensConfig(Settings):
    """Rows packed from token shards."""

    type: Literal["tokens"] = "tokens"
    sources: tuple[TokenSourceConfig, ...] = Field(min_length=1)
    documents: Documents = "separate"  # "joined": attention and positions run across the ends of documents
    shuffle: bool = True
    data_seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _weights_can_be_planned(self) -> Self:
        try:
            whole_shares([source.weight for source in self.sources])
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self

    def build(self, context: DataContext) -> Feed:
        """Endless epochs for training, each source with its weight's share."""
        weights = [source.weight for source in self.sources]
        return Feed.endless(*self.open(context), weights=weights, seed=self.data_seed, shuffle=self.shuffle)

    def build_in_order(self, context: DataContext) -> Feed:
        """Every row of every source once, whatever its weight, for an evaluation."""
        return Feed.in_order(*self.open(context))

    def open(self, context: DataContext) -> list[PackedRows]:
        """Open every source. Raises `DataError` with what is wrong with any of them."""
        opened, faults = [], []
        for source in self.sources:
            try:
                opened.append(self._open_source(source.path, context))
            except DataError as error:
                faults.append(str(error))
        if faults:
            raise DataError("\n".join(faults))
        return opened

    def _open_source(self, path: str, context: DataContext) -> PackedRows:
        shards = TokenShards.open(path)
        if shards.tokenizer_fingerprint != context.tokenizer_fingerprint:
            raise DataError(
                f"{path} was made by tokenizer {shards.tokenizer_fingerprint}, and this run's is "
                f"{context.tokenizer_fingerprint}: name the tokenizer that made the shards, or make them "
                f"anew with `distft tokenize`."
            )
        check_vocabulary(path, shards.max_token_id, context)
        return PackedRows(
            shards,
            context.seq_len,
            documents=self.documents,
            token_bytes=context.token_bytes,
            name=path,
        )
