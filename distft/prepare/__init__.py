"""Turns a corpus into token shards.

`pipeline` is imported at first use: a worker process imports only `worker`, and so starts in half the time.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distft.prepare.pipeline import TokenizeConfig, TokenizeProgress, TokenizeResult, tokenize

__all__ = ["TokenizeConfig", "TokenizeProgress", "TokenizeResult", "tokenize"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from distft.prepare import pipeline

    return getattr(pipeline, name)
