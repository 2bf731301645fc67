"""What a run minimizes, by `type`."""

from typing import Annotated

from distft.config import Part
from distft.objective.causal_lm import CausalLM
from distft.objective.classification import Classification

ObjectiveConfig = Annotated[CausalLM | Classification, Part()]

__all__ = ["CausalLM", "Classification", "ObjectiveConfig"]
