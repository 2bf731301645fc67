"""What training does with the choices of routers: it balances the experts, and reports their load."""

from collections.abc import Collection

import torch
from torch import Tensor

from distft.engine.interface import Engine
from distft.model.experts_config import ExpertsConfig
from distft.objective.interface import Objective
from distft.objective.routed import with_router_losses

_MOST_SHARES = 64  # metrics of single experts; beyond that the load of each layer is all that is reported


class ExpertLoad:
    """The tokens of each expert, of all ranks and micro-batches, and the biases that they move."""

    def __init__(self, experts: ExpertsConfig, num_layers: int, trainable: Collection[str]) -> None:
        """`trainable` are the names of the parameters that train; the bias of a frozen router stays."""
        self._experts = experts
        self._layers = experts.layers(num_layers)
        self._moves = [f"{_router(layer)}.weight" in trainable for layer in self._layers]
        self._of_step: Tensor | None = None  # [L, E], of this rank
        self._of_interval: Tensor | None = None  # [L, E], of all ranks, since metrics were read

    def routed(self, objective: Objective) -> Objective:
        """The objective with the routers' losses, whose passes are counted here."""
        return with_router_losses(objective, self._experts, self.record)

    def record(self, counts_LE: Tensor) -> None:
        """Count the tokens of a pass of this rank."""
        self._of_step = counts_LE if self._of_step is None else self._of_step + counts_LE

    def finish_step(self, engine: Engine, is_skipped: Tensor) -> None:
        """Add up the ranks, and move each selection bias towards an even load, unless the step was skipped.

        Called by all ranks together; waits for no device.
        """
        if self._of_step is None:
            shape = len(self._layers), self._experts.num_experts
            self._of_step = torch.zeros(shape, device=engine.device)
        counts_LE = engine.all_reduce_sum(self._of_step)
        self._of_step = None
        self._of_interval = counts_LE if self._of_interval is None else self._of_interval + counts_LE
        rate = self._experts.bias_update_rate
        if rate:
            is_applied = 1 - is_skipped
            moves_LE = torch.sign(counts_LE.mean(dim=1, keepdim=True) - counts_LE) * rate * is_applied
            moves = zip(self._layers, moves_LE, self._moves, strict=True)
            engine.add_to_parameters(
                {f"{_router(layer)}.selection_bias": own_E for layer, own_E, is_moved in moves if is_moved}
            )

    def metrics(self) -> dict[str, float]:
        """Since the last call: the load of the fullest expert of each layer, relative to an even one.

        Of few experts the share of each, too. Reading them waits for the device.
        """
        if self._of_interval is None:
            return {}
        counts_LE, self._of_interval = self._of_interval.double().cpu(), None
        shares_LE = counts_LE / counts_LE.sum(dim=1, keepdim=True).clamp_min(1)
        loads_L = (shares_LE.amax(dim=1) * self._experts.num_experts).tolist()
        names = [f"experts/blocks.{layer}" for layer in self._layers]
        metrics = {"experts/max_load": max(loads_L)}
        metrics |= {f"{name}/max_load": load for name, load in zip(names, loads_L, strict=True)}
        if counts_LE.numel() <= _MOST_SHARES:
            for name, shares in zip(names, shares_LE.tolist(), strict=True):
                metrics |= {f"{name}/share_{expert}": share for expert, share in enumerate(shares)}
        return metrics


def _router(layer: int) -> str:
    return f"blocks.{layer}.mlp.router"
