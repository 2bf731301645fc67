"""The optimizers that a configuration may choose from. Parsed without torch."""

from typing import Annotated

from distft.config import Component
from distft.optim.adamw import AdamWConfig
from distft.optim.lion import LionConfig
from distft.optim.muon import MuonConfig
from distft.optim.sgd import SgdConfig

OptimConfig = Annotated[AdamWConfig | LionConfig | SgdConfig | MuonConfig, Component(default="adamw")]
