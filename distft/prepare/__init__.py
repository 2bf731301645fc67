"""From a corpus to token shards. Imports no torch: its workers start quickly and stay small."""

from distft.prepare.tokenize import TokenizeConfig, TokenizeProgress, TokenizeResult, tokenize

__all__ = ["TokenizeConfig", "TokenizeProgress", "TokenizeResult", "tokenize"]
