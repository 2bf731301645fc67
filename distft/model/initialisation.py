"""Initial weights as a function of seed and parameter name, so that any rank can draw any slice by itself."""

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distft.model.config import ModelConfig
from distft.model.lora_config import A, B

_CHUNK_NUMEL = 1 << 20  # elements drawn from one generator


@dataclass(frozen=True, slots=True)
class InitialValues:
    """The distribution of a parameter's initial elements."""

    kind: Literal["normal", "ones", "zeros"]
    std: float = 0.0


def initial_values(config: ModelConfig, name: str, shape: tuple[int, ...]) -> InitialValues:
    """Ones for norms, zeros for biases, a temperature's logarithm and adapters' B, normal for other matrices.

    A matrix has the standard deviation `config.initial_std(name, shape)`.
    """
    last = name.rpartition(".")[2]
    if last == A:  # the variance of PEFT's and of the reference implementation's uniform distribution
        return InitialValues("normal", (3 * shape[1]) ** -0.5)
    if last.startswith("bias") or last in {"log_temperature", "selection_bias", B}:
        return InitialValues("zeros")
    if len(shape) == 1:
        return InitialValues("ones")
    return InitialValues("normal", config.initial_std(name, shape))


def initial_fragment(
    name: str, shape: tuple[int, ...], start: int, stop: int, *, seed: int, config: ModelConfig
) -> Tensor:
    """Elements [start, stop) of the flattened parameter, fp32 on the CPU; the same however it is cut."""
    initial = initial_values(config, name, shape)
    if initial.kind != "normal":
        return torch.full((stop - start,), 1.0 if initial.kind == "ones" else 0.0)
    numel = math.prod(shape)
    slices = []
    # Each chunk has its own generator, seeded by its number, so a slice draws only the chunks it overlaps.
    for chunk in range(start // _CHUNK_NUMEL, -(-stop // _CHUNK_NUMEL)):
        chunk_start = chunk * _CHUNK_NUMEL
        digest = hashlib.blake2b(f"{seed}/{name}/{chunk}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
        values = torch.randn(min(_CHUNK_NUMEL, numel - chunk_start), generator=generator) * initial.std
        slices.append(values[max(start - chunk_start, 0) : stop - chunk_start])
    return torch.cat(slices) if slices else torch.empty(0)
