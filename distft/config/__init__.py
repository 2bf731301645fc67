"""Settings: YAML and dotted overrides to immutable, validated objects, and back.

`parse(RunConfig, apply_overrides(load_yaml(path), ["train.max_steps=50"]))`
"""

from distft.config.component import Component, Settings
from distft.config.overrides import apply_overrides, split_override
from distft.config.parsing import dump_yaml, parse
from distft.config.paths import PathText, expand_path
from distft.config.redaction import redact, redact_message
from distft.config.schema import json_schema
from distft.config.widths import WidthRole, Widths
from distft.config.yaml_text import load_yaml, parse_yaml

__all__ = [
    "Component",
    "PathText",
    "Settings",
    "WidthRole",
    "Widths",
    "apply_overrides",
    "dump_yaml",
    "expand_path",
    "json_schema",
    "load_yaml",
    "parse",
    "parse_yaml",
    "redact",
    "redact_message",
    "split_override",
]
