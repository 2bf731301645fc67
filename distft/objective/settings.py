"""The objectives that a run can minimize, chosen by `type`."""

from typing import Annotated

from distft.config import Component
from distft.objective.causal_lm import CausalLM
from distft.objective.classification import Classification
from distft.objective.contrastive import Contrastive
from distft.objective.masked_lm import MaskedLM
from distft.objective.mixture import Mixture
from distft.objective.multi_label import MultiLabel
from distft.objective.preference import Preference
from distft.objective.prefix_lm import PrefixLM
from distft.objective.regression import Regression
from distft.objective.replaced_token import ReplacedToken
from distft.objective.sentence_pairs import NextSentence, SentenceOrder
from distft.objective.span_corruption import SpanCorruption
from distft.objective.token_classification import TokenClassification

ObjectiveConfig = Annotated[
    CausalLM
    | MaskedLM
    | PrefixLM
    | SpanCorruption
    | ReplacedToken
    | NextSentence
    | SentenceOrder
    | Classification
    | MultiLabel
    | Regression
    | TokenClassification
    | Contrastive
    | Preference
    | Mixture,
    Component(),
]

__all__ = [
    "CausalLM",
    "Classification",
    "Contrastive",
    "MaskedLM",
    "Mixture",
    "MultiLabel",
    "NextSentence",
    "ObjectiveConfig",
    "Preference",
    "PrefixLM",
    "Regression",
    "ReplacedToken",
    "SentenceOrder",
    "SpanCorruption",
    "TokenClassification",
]
