"""A checkpoint of a model in muP as one of the standard parametrization: multipliers lie in the weights."""

from collections.abc import Mapping
from math import sqrt
from typing import Any

from torch import Tensor

from distft.checkpoint.fragments import WEIGHT
from distft.checkpoint.manifest import Manifest, ParameterRecord, StateRecord
from distft.checkpoint.sources import CheckpointSource, ManifestSource
from distft.config import parse
from distft.errors import ConfigError
from distft.model.settings import AnyModelConfig
from distft.model.transformer_config import TransformerConfig

_TABLE, _LM_HEAD = "embed.weight", "lm_head.weight"
_STANDARD = {"parametrization": "standard", "mup_base_d_model": None, "mup_base_head_dim": None}


def is_mup(source: CheckpointSource) -> bool:
    """Whether the checkpoint's model is in muP."""
    model = source.manifest.config.get("model")
    return isinstance(model, Mapping) and model.get("parametrization") == "mup"


def require_standard(source: CheckpointSource, what: str) -> None:
    """Raise `ConfigError` for a model in muP, whose multipliers `what` has no place for."""
    if is_mup(source):
        raise ConfigError(
            f"{source.path} has model.parametrization=mup, and {what} has no place for its multipliers: "
            "convert it to huggingface, which has them in the weights."
        )


def folded(source: CheckpointSource) -> CheckpointSource:
    """`source`, or of a model in muP its weights as a standard model computes the same with.

    The factor of attention's scores is in the weights of the queries. A tied table divides its logits: the
    model is no longer tied, and its lm_head is the table, divided; behind BERT's transform the norm is.
    """
    if not is_mup(source):
        return source
    model = parse(AnyModelConfig, source.manifest.config["model"], where=f"{source.path}: model")
    assert isinstance(model, TransformerConfig)  # no other has a parametrization
    return _Folded(source, model)


def factors(model: TransformerConfig) -> dict[str, float]:
    """Those of weights, by name."""
    found: dict[str, float] = {}
    if model.attention_scale is not None:
        factor = model.attention_scale * sqrt(model.head_dim)
        kinds = ("q_norm.weight",) if model.qk_norm else ("q.weight", "q.bias")
        found = {f"blocks.{i}.attn.{kind}": factor for i in range(model.num_layers) for kind in kinds}
    if model.tie_embeddings and model.width_ratio != 1:
        names = ("lm_head.norm.weight", "lm_head.norm.bias") if model.lm_head_transform else (_LM_HEAD,)
        found |= dict.fromkeys(names, 1 / model.width_ratio)
    return found


class _Folded(ManifestSource):
    def __init__(self, source: CheckpointSource, model: TransformerConfig) -> None:
        self.format = source.format
        self._source = source
        self._factors = factors(model)
        super().__init__(
            source.path, _standard_manifest(source.manifest, is_untied=_LM_HEAD in self._factors)
        )

    def read(self, parameter: str, state: str, start: int, stop: int) -> Tensor:
        own = _TABLE if parameter == _LM_HEAD and not self._source.has(_LM_HEAD, WEIGHT) else parameter
        values = self._source.read(own, state, start, stop)
        factor = self._factors.get(parameter)
        return values if factor is None else (values.float() * factor).to(values.dtype)

    def find_damage(self) -> list[str]:
        return self._source.find_damage()


def _standard_manifest(manifest: Manifest, *, is_untied: bool) -> Manifest:
    """With the weights alone: other states belong to the weights as they were."""
    records = {
        name: record.model_copy(update={"states": _weight_of(record)})
        for name, record in manifest.parameters.items()
    }
    model: dict[str, Any] = {**manifest.config["model"], **_STANDARD}
    if is_untied:
        model["tie_embeddings"] = False
        records[_LM_HEAD] = records[_TABLE]
    config = {**manifest.config, "model": model}
    return manifest.model_copy(update={"parameters": records, "config": config})


def _weight_of(record: ParameterRecord) -> dict[str, StateRecord]:
    return {name: state for name, state in record.states.items() if name == WEIGHT}
