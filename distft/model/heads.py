"""Heads of a model: what each computes from the last hidden states, or beside them."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from distft.errors import ConfigError
from distft.model.config import Pooling
from distft.model.transformer_config import TransformerConfig

# A layer with this activation; with one, the classifier has biases. gelu_norm: without a bias of the layer,
# and with a norm behind it, as ModernBERT.
HiddenLayer: TypeAlias = Literal["none", "tanh", "relu", "gelu_norm"]
CLASSIFIER_NORM_EPS = 1e-5  # of that norm
HeadName: TypeAlias = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=40)]


@dataclass(frozen=True, slots=True)
class LanguageModelHead:
    """Logits over the vocabulary at every position."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassificationHead:
    """Logits over the classes, once per row."""

    num_labels: int
    pooling: Pooling = "last"
    hidden: HiddenLayer = "none"  # between the pooled vector and the logits, as wide as that vector


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenHead:
    """`num_outputs` numbers at every position."""

    num_outputs: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingHead:
    """One vector per row, and with a learned temperature one parameter: the logarithm of its change, [1].

    The vector is divided by the square root of the temperature, so that products of two are similarities
    divided by the temperature. That makes the temperature a part of the model like any other.
    """

    pooling: Pooling = "mean"
    normalize: bool = True  # to length 1, before the temperature
    temperature: float = 1.0
    learns_temperature: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratorHead:
    """Logits over the vocabulary from small blocks of its own, beside the model's: ELECTRA's generator.

    They read the model's embeddings, projected to their width, and the output's weight is the embedding.
    """

    num_layers: int
    size: float  # its width, heads and feed-forward, relative to the model's
    output_share: float = 1.0  # of the positions whose logits are computed; for counts of FLOPs alone

    def config(self, model: TransformerConfig) -> TransformerConfig:
        """The sizes of its blocks. Heads stay as wide as the model's, so both share rotary angles."""
        num_heads = max(round(model.num_heads * self.size), 1)
        sizes = {
            "num_layers": self.num_layers,
            "d_model": max(round(model.d_model * self.size), 1),
            "num_heads": num_heads,
            "num_kv_heads": gcd(num_heads, model.num_kv_heads),
            "d_ff": max(round(model.d_ff * self.size), 1),
            "experts": None,
        }
        return model.model_copy(update=sizes)


def require_mup_head(head: "Head") -> None:
    """Raise `ConfigError` for a head whose outputs would grow with the width under `parametrization: mup`."""
    if isinstance(head, GeneratorHead):
        raise ConfigError(
            "model.parametrization=mup: there is no rule for a generator beside the model. Set "
            "model.parametrization=standard, or another objective than replaced_token."
        )
    if isinstance(head, EmbeddingHead) and not head.normalize:
        raise ConfigError(
            "model.parametrization=mup: products of embeddings grow with the width unless their length is 1. "
            "Set objective.normalize=true, or model.parametrization=standard."
        )


Head: TypeAlias = LanguageModelHead | ClassificationHead | TokenHead | EmbeddingHead | GeneratorHead
Heads: TypeAlias = Mapping[str, Head]  # by the name of the head's module
LANGUAGE_MODEL: Heads = {"lm_head": LanguageModelHead()}
