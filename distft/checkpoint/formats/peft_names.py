"""Names and settings of PEFT's LoRA adapters, and the tensors of transformers that they are beside."""

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from distft.checkpoint.formats.huggingface_config import Architecture
from distft.checkpoint.formats.huggingface_tensors import TensorMap
from distft.errors import CheckpointError
from distft.model.lora_config import MAGNITUDE, A, B

PREFIX = "base_model.model."  # of every name
A_SUFFIX, B_SUFFIX, MAGNITUDE_SUFFIX = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
SUFFIXES = {A: A_SUFFIX, B: B_SUFFIX, MAGNITUDE: MAGNITUDE_SUFFIX}
_REGULAR_EXPRESSION = set("\\^$*+?{}[]()|")  # in a pattern, which may be one in PEFT
# Settings that change what the tensors mean, and the values that distft knows them by.
_NEUTRAL: dict[str, Any] = {
    "bias": ("none",),
    "lora_bias": (False, None),
    "trainable_token_indices": (None,),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None,),
}


class AdapterKeys(BaseModel):
    """The keys of adapter_config.json that distft reads."""

    peft_type: str
    base_model_name_or_path: str | None = None
    r: int = Field(ge=1, le=1 << 16)
    lora_alpha: float = Field(gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, int] = Field(default={}, max_length=100_000)
    alpha_pattern: dict[str, float] = Field(default={}, max_length=100_000)

    def scale(self, alpha: float, rank: int) -> float:
        """The factor of a layer's B A."""
        return alpha / (rank**0.5 if self.use_rslora else rank)


def parse_adapter_config(raw: dict[str, Any], where: str) -> AdapterKeys:
    """Raises `CheckpointError` with everything that distft does not support."""
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(f"{where}: peft_type={raw.get('peft_type')!r} is not supported: only LORA is.")
    problems = [
        f"{where}: {name}={raw[name]!r} is not supported."
        for name, known in _NEUTRAL.items()
        if name in raw and raw[name] not in known
    ]
    try:
        keys = AdapterKeys.model_validate(raw)
    except ValidationError as error:
        problems += [
            f"{where}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False)
        ]
        raise CheckpointError("\n".join(problems)) from None
    patterns = [pattern for pattern in keys.alpha_pattern if _REGULAR_EXPRESSION & set(pattern)]
    if patterns:
        problems.append(
            f"{where}: alpha_pattern has the regular expression {patterns[0][:60]!r}, which is not "
            "supported: write the names of the layers, whole or from a dot on."
        )
    if problems:
        raise CheckpointError("\n".join(problems))
    return keys


@dataclass(frozen=True, slots=True)
class AdaptedTensor:
    """A weight of transformers, with the parameters of distft whose rows it joins and their first rows."""

    module: str  # name of the layer, without `.weight`
    rows: dict[str, tuple[int, int]]  # parameter -> [first, last) of the layer's outputs
    num_inputs: int
    num_outputs: int


def linear_tensors(tensor_map: TensorMap, prefix: str = "") -> dict[str, AdaptedTensor]:
    """Every matrix that could have an adapter, by its name of transformers without `prefix`."""
    found: dict[str, AdaptedTensor] = {}
    for parameter, location in tensor_map.parameters.items():
        if location.experts or len(location.shape) != 2 or not location.tensor.name.endswith(".weight"):
            continue
        module = location.tensor.name.removesuffix(".weight").removeprefix(prefix)
        num_outputs = location.tensor.numel // location.shape[1]
        tensor = found.setdefault(module, AdaptedTensor(module, {}, location.shape[1], num_outputs))
        tensor.rows[parameter] = location.first_row, location.first_row + location.shape[0]
    return found


def has_transposed_layers(architecture: Architecture) -> bool:
    """Whether the linear layers are transformers' `Conv1D`."""
    return architecture == "gpt2"
