"""Fresh weights as a function of the parameter's name: any slice, on any rank, without the rest."""

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distft.model.config import ModelConfig

_CHUNK_NUMEL = 1 << 20  # elements drawn from one generator


@dataclass(frozen=True, slots=True)
class InitialValues:
    """How a parameter's elements begin."""

    kind: Literal["normal", "ones", "zeros"]
    std: float = 0.0


def initial_values(config: ModelConfig, name: str, shape: tuple[int, ...]) -> InitialValues:
    """Norms begin at one, biases at zero, matrices normal.

    What writes into the residual stream (`o`, `down`) is scaled by 1/sqrt(2 * num_layers), so that its
    variance does not grow with depth (Radford et al. 2019, GPT-2).
    """
    if name.endswith(".bias"):
        return InitialValues("zeros")
    if len(shape) == 1:
        return InitialValues("ones")
    std = config.init_std if config.init_std is not None else config.d_model**-0.5
    if name.endswith((".o.weight", ".down.weight")):
        std /= math.sqrt(2 * config.num_layers)
    return InitialValues("normal", std)


def initial_fragment(
    name: str, shape: tuple[int, ...], start: int, stop: int, *, seed: int, config: ModelConfig
) -> Tensor:
    """Elements [start, stop) of the flattened parameter, fp32 on the CPU; the same however they are cut."""
    initial = initial_values(config, name, shape)
    if initial.kind != "normal":
        return torch.full((stop - start,), 1.0 if initial.kind == "ones" else 0.0)
    numel = math.prod(shape)
    pieces = []
    for chunk in range(start // _CHUNK_NUMEL, -(-stop // _CHUNK_NUMEL)):
        begin = chunk * _CHUNK_NUMEL
        digest = hashlib.blake2b(f"{seed}/{name}/{chunk}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
        values = torch.randn(min(_CHUNK_NUMEL, numel - begin), generator=generator) * initial.std
        pieces.append(values[max(start - begin, 0) : stop - begin])
    return torch.cat(pieces) if pieces else torch.empty(0)
