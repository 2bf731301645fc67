"""The kinds of data that a run can read."""

from typing import Annotated

from distft.config import Part
from distft.data.completion import CompletionConfig
from distft.data.labelled import LabelledConfig
from distft.data.tokens import TokensConfig

DataConfig = Annotated[TokensConfig | LabelledConfig | CompletionConfig, Part()]
