"""The base of every settings class."""

from pydantic import BaseModel, ConfigDict

from distft.config.yaml_text import to_yaml


class Settings(BaseModel):
    """A node of the configuration: frozen, and an unknown key is a fault.

    Fields with bounds use `Field(...)`; the comment behind a field is its description in the JSON schema.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")


def dump_yaml(settings: Settings) -> str:
    """YAML from which `parse(type(settings), parse_yaml(text))` makes an equal object."""
    return to_yaml(settings.model_dump(mode="json", by_alias=True))
