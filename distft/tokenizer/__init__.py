"""Tokenizers: train, import, encode and decode. The only importer of sentencepiece."""

from distft.tokenizer.tokenizer import Tokenizer, import_tokenizer
from distft.tokenizer.train import TokenizerTrainConfig, train_tokenizer

__all__ = ["Tokenizer", "TokenizerTrainConfig", "import_tokenizer", "train_tokenizer"]
