"""A chart as a Vega-Lite specification, which the page draws."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A title, and what Vega-Lite needs.

    `has_steps`: its x may be steps, tokens or hours. `is_broad`: it takes the whole width of the page.
    """

    title: str
    spec: dict[str, Any]
    has_steps: bool = False
    is_broad: bool = False
