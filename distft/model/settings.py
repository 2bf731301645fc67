"""The models that a run can train, chosen by `type`; without one it is a Transformer."""

from collections.abc import Mapping
from typing import Annotated, Any

from distft.config import Component
from distft.config.component import members_by_type
from distft.model.encoder_decoder_config import EncoderDecoderConfig
from distft.model.image_configs import ConvolutionalImageConfig, VisionTransformerConfig
from distft.model.image_text_config import ImageTextConfig
from distft.model.older_configs import ConvolutionalConfig, DeepAveragingConfig, RecurrentConfig
from distft.model.transformer_config import TransformerConfig

_DEFAULT_TYPE = "transformer"
_BuiltIn = (
    TransformerConfig
    | DeepAveragingConfig
    | ConvolutionalConfig
    | RecurrentConfig
    | EncoderDecoderConfig
    | VisionTransformerConfig
    | ConvolutionalImageConfig
    | ImageTextConfig
)
AnyModelConfig = Annotated[_BuiltIn, Component(default=_DEFAULT_TYPE)]


def model_setting_names() -> list[str]:
    """Names of the settings of all types of model."""
    return list(
        dict.fromkeys(name for own in members_by_type(_BuiltIn).values() for name in own.model_fields)
    )


def is_complete(model: Mapping[str, Any]) -> bool:
    """Whether `model` has all settings of its type that have no default."""
    own = members_by_type(_BuiltIn).get(model.get("type", _DEFAULT_TYPE))
    if own is None:
        return True  # of a class outside distft, or of none
    return all(name in model for name, info in own.model_fields.items() if info.is_required())
