"""Tokenizers: train, import, encode and decode. The only importer of sentencepiece.

`train` is imported at first use: processes that only encode save the import of pydantic.
"""

from typing import TYPE_CHECKING, Any

from distft.tokenizer.tokenizer import Tokenizer, import_tokenizer, require_tokenizer_target

if TYPE_CHECKING:
    from distft.tokenizer.train import TokenizerTrainConfig, train_tokenizer

__all__ = [
    "Tokenizer",
    "TokenizerTrainConfig",
    "import_tokenizer",
    "require_tokenizer_target",
    "train_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from distft.tokenizer import train

    return getattr(train, name)
