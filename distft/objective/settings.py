"""The objectives that a run can minimize, chosen by `type`."""

from typing import Annotated

from distft.config import Component
from distft.objective.causal_lm import CausalLM
from distft.objective.classification import Classification

ObjectiveConfig = Annotated[CausalLM | Classification, Component()]

__all__ = ["CausalLM", "Classification", "ObjectiveConfig"]
