"""The objectives that a run can minimize, chosen by `type`."""

from typing import Annotated

from distft.config import Component
from distft.objective.causal_lm import CausalLM
from distft.objective.classification import Classification
from distft.objective.mixture import Mixture

ObjectiveConfig = Annotated[CausalLM | Classification | Mixture, Component()]

__all__ = ["CausalLM", "Classification", "Mixture", "ObjectiveConfig"]
