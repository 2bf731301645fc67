"""Tokenizers: train, import, encode and decode. The only importer of sentencepiece and tokenizers.

Everything is imported at first use: names of files are needed without NumPy, and processes that only encode
save the import of pydantic.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distft.tokenizer.interface import Tokenizer
    from distft.tokenizer.loading import import_tokenizer, require_tokenizer_target
    from distft.tokenizer.train import TokenizerTrainConfig, train_tokenizer

_MODULES = {
    "Tokenizer": "interface",
    "TokenizerTrainConfig": "train",
    "import_tokenizer": "loading",
    "require_tokenizer_target": "loading",
    "train_tokenizer": "train",
}
__all__ = [
    "Tokenizer",
    "TokenizerTrainConfig",
    "import_tokenizer",
    "require_tokenizer_target",
    "train_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
