"""Checks `engine.deepspeed` with DeepSpeed's own parser, before a run starts. Imports DeepSpeed: 2 s."""

import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from typing import Any

from pydantic import ValidationError

from distft.config.reasons import reason_of
from distft.engine.deepspeed_config import ZeroConfig, deepspeed_config
from distft.errors import ConfigError, suggest_name
from distft.topology import BatchPlan


def ignored_deepspeed_keys(settings: ZeroConfig, plan: BatchPlan) -> list[str]:
    """A message for each key of `engine.deepspeed` that DeepSpeed does not read, so it has no effect.

    Raises one `ConfigError` for the values that DeepSpeed refuses.
    """
    with redirect_stdout(sys.stderr):  # DeepSpeed logs there, and this process may print JSON
        from distft.engine.deepspeed_import import deepspeed

    asked = _AskedKeys(deepspeed_config(settings, plan, is_cuda=False, max_grad_norm=None))
    try:
        deepspeed.runtime.config.DeepSpeedConfig(asked)
    except ValidationError as error:
        raise ConfigError("\n".join(_messages(settings, error))) from None
    except Exception as error:  # DeepSpeed's parser asserts, and indexes what it does not find
        raise ConfigError(f"engine.deepspeed is refused by DeepSpeed: {error}.") from None
    known = sorted(asked.names)
    return [
        f"engine.deepspeed.{key} has no effect: DeepSpeed does not read it.{suggest_name(key, known)}"
        for key in settings.deepspeed
        if key not in asked.names
    ]


class _AskedKeys(dict[str, Any]):
    """A configuration that notes which keys its reader asks for."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.names: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.names.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.names.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.names.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return self  # `key in config.keys()` asks too


def _messages(settings: ZeroConfig, error: ValidationError) -> Iterator[str]:
    for detail in error.errors(include_url=False):
        names = [str(name) for name in detail["loc"]]
        # The error does not say which section was parsed: it is one that has the key.
        section = next(
            (
                name
                for name, values in settings.deepspeed.items()
                if isinstance(values, dict) and names[:1] and names[0] in values
            ),
            "",
        )
        key = ".".join(["engine.deepspeed", *([section] if section else []), *names])
        if detail["type"] == "extra_forbidden":
            yield f"{key}={detail['input']!r} is not a setting of DeepSpeed: leave it out."
        else:
            yield f"{key}={detail['input']!r}: {reason_of(detail)}."
