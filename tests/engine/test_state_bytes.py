"""The predicted bytes of states are those that engines allocate."""

from collections.abc import Iterable
from functools import partial
from itertools import chain
from typing import Any

import pytest
import torch
from support.engine_scenarios import VOCAB_SIZE, Scenario, Training, collectives_for
from support.rank_pool import run_ranks
from torch import Tensor

from distft.engine.deepspeed_config import ZeroConfig
from distft.engine.quantized_weights import quantizable_weights
from distft.engine.settings import EngineSettings, LocalConfig
from distft.engine.state_bytes import StateBytes, state_bytes
from distft.optim.groups import parameter_groups
from distft.optim.kernels import FlatOptimizer
from distft.topology import Topology

FROZEN = ("blocks.1.*", "norm.weight")  # trainable; the rest is frozen


def _storage_bytes(tensors: Iterable[Tensor | None]) -> int:
    storages = {}
    for tensor in tensors:
        if tensor is not None:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _gradients(training: Training) -> list[Tensor | None]:
    """All tensors in which the engine has gradients at this moment."""
    params = list(training.engine.module.parameters())
    found = [*(p.grad for p in params), *(getattr(p, "grad_accum", None) for p in params)]
    engine: Any = getattr(training.engine, "_engine", None)
    if engine is None:
        return [*found, *(m.grad for m in training.engine._masters.values())]  # type: ignore[attr-defined]
    optimizer = engine.optimizer
    inner = optimizer if isinstance(optimizer, FlatOptimizer) else optimizer.optimizer
    found += [p.grad for group in inner.param_groups for p in group["params"]]
    found += getattr(optimizer, "fp32_groups_gradients_flat", [])  # stage 1 in bf16
    found.append(getattr(optimizer, "grad_partitions_flat_buffer", None))  # stage 3
    for gradients in getattr(optimizer, "averaged_gradients", {}).values():
        found += gradients or []
    return found


def _measure(topology: Topology, scenarios: list[Scenario]) -> list[tuple[StateBytes, StateBytes]]:
    """By scenario: what was predicted, and what is allocated."""
    results = []
    for scenario in scenarios:
        training = Training(scenario, topology, collectives_for(scenario, topology))
        engine = training.engine
        peak = 0

        def note_gradients(*others: Tensor, training: Training = training) -> None:
            nonlocal peak
            peak = max(peak, _storage_bytes([*_gradients(training), *others]))

        def noted_flatten(tensors: list[Tensor], wrapper: Any, flatten: Any) -> Tensor:
            flat: Tensor = flatten(tensors)
            if flat.numel() == wrapper.partition_size[0]:  # otherwise it is a bucket to reduce
                note_gradients(flat)  # beside what it was copied from
            return flat

        training.before_update = note_gradients
        hook = engine.module.register_forward_pre_hook(lambda *_: note_gradients())  # between micro-batches
        training.run(1)
        wrapper = getattr(getattr(engine, "_engine", None), "optimizer", None)
        if scenario.stage in {1, 2} and hasattr(wrapper, "averaged_gradients"):
            wrapper.flatten = partial(noted_flatten, wrapper=wrapper, flatten=wrapper.flatten)
        _kernel(engine).register_step_pre_hook(lambda *_: note_gradients())  # after copies for the update
        training.run(2)
        hook.remove()
        params = list(engine.module.parameters())
        weights = _storage_bytes(
            [*(p.data for p in params), *(getattr(p, "ds_tensor", None) for p in params), *_codes(engine)]
        )
        zero = getattr(engine, "_engine", None)
        kernel = _kernel(engine)
        states = [
            values for state in kernel.state.values() for name, values in state.items() if name != "step"
        ]
        own = {p.untyped_storage().data_ptr() for p in params}
        masters = [p for p in kernel.state if p.untyped_storage().data_ptr() not in own]
        averages = [fragment.values for fragment in engine._average.fragments()]  # type: ignore[attr-defined]
        buffers = _reduction_buffers(zero)
        settings: EngineSettings
        shared = {"param_dtype": scenario.precision, "frozen_bits": scenario.frozen_bits}
        if scenario.stage is None:
            settings = LocalConfig.model_validate(shared)
        else:
            settings = ZeroConfig.model_validate({**shared, "zero_stage": scenario.stage, **scenario.zero})
        groups = parameter_groups(training.shapes, training.trainable, scenario.optim, {})
        predicted = state_bytes(
            training.shapes,
            groups,
            settings,
            scenario.optim,
            topology.world_size,
            quantizable=training.quantizable,
        )
        optimizer = _storage_bytes([*states, *masters, *averages])
        allocated = StateBytes(weights=weights, gradients=peak, optimizer=optimizer, buffers=buffers)
        results.append((predicted, allocated))
        engine.close()
    return results


def _codes(engine: Any) -> list[Tensor]:
    matrices = [layer.quantized for layer in quantizable_weights(engine.module).values()]
    return [tensor for m in matrices if m is not None for tensor in (m._codes, m._scales)]


def _kernel(engine: Any) -> torch.optim.Optimizer:
    found: torch.optim.Optimizer = engine._optimizer.kernel
    return found


def _reduction_buffers(engine: Any) -> int:
    """What DeepSpeed keeps between steps to reduce gradients in."""
    buckets = getattr(getattr(engine, "optimizer", None), "ipg_buckets", {})
    held = [getattr(bucket, "buffer", None) for bucket in buckets.values()]
    return _storage_bytes(chain.from_iterable(one if isinstance(one, list) else [one] for one in held))


@pytest.mark.ranks
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_predicted_states_are_allocated(precision: str, num_ranks: int) -> None:
    scenarios = [
        Scenario(stage=stage, precision=precision, trainable=trainable)
        for stage in (None, 0, 1, 2, 3)
        for trainable in (("*",), FROZEN)
        if stage is not None or num_ranks == 1
    ]
    scenarios += [
        Scenario(stage=stage, precision=precision, optimizer={"type": kind})
        for stage, kind in ((0, "lion"), (1, "muon"), (2, "muon"), (3, "lion"), (3, "muon"))
    ]
    by_rank = run_ranks(_measure, num_ranks, scenarios)
    for scenario, *ranks in zip(scenarios, *by_rank, strict=True):
        predicted, found = ranks[0][0], [allocated for _, allocated in ranks]
        assert {one.weights for one in found} == {predicted.weights}, scenario
        assert max(one.optimizer for one in found) == predicted.optimizer, scenario
        most = max(one.gradients for one in found)
        if scenario.stage in {1, 2} and precision == "fp32" and num_ranks > 1:
            largest = 4 * VOCAB_SIZE * scenario.model.d_model  # it may lie on two ranks
            assert predicted.gradients <= most <= predicted.gradients + largest, scenario
        else:
            assert most == predicted.gradients, scenario
        assert {one.buffers for one in found} == {predicted.buffers}, scenario
