"""A few fixed sequences whose loss a checkpoint carries, and whoever loads it must find again."""

import math
from collections.abc import Sequence

import torch

from distft.checkpoint.fragments import Fragment, fingerprint
from distft.checkpoint.manifest import Manifest, ProbeRecord
from distft.collectives import Collectives, together
from distft.engine.interface import Engine, Precision
from distft.errors import CheckpointError
from distft.train.evaluation import EvaluationFeed, Evaluator

# How far two losses of the same weights may lie apart, relative to the larger of 1 and the loss. In fp32
# another order of summing, 2e-6 between engines and world sizes; in bf16 and fp16 8 and 11 bits a weight.
_TOLERANCES: dict[str, float] = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 2e-2}


class Probe:
    """The loss on the first sequences of the training data; every rank computes all of it."""

    def __init__(self, feed: EvaluationFeed, objective: Evaluator, param_dtype: Precision) -> None:
        self._feed = feed
        self._objective = objective
        self._param_dtype = param_dtype

    @torch.no_grad()
    def measure(self, engine: Engine, num_sequences: int) -> ProbeRecord:
        """The loss of what the engine holds now. Called by all ranks together."""
        batch = self._feed.batch(0, num_sequences).to(engine.device)
        was_training = engine.module.training
        engine.module.eval()
        try:
            metrics = self._objective.metrics(self._objective.evaluate(engine.model, batch))
        finally:
            engine.module.train(was_training)
        return ProbeRecord(loss=metrics["loss"], num_sequences=num_sequences, param_dtype=self._param_dtype)

    def check(self, engine: Engine, manifest: Manifest, path: str, collectives: Collectives) -> None:
        """Refuse, on all ranks together, an engine that does not reproduce the checkpoint's loss."""
        if manifest.probe is None:
            return
        found = self.measure(engine, manifest.probe.num_sequences)
        agrees = agree(manifest.probe, found)
        if all(collectives.all_gather(agrees)):
            return
        differing = differing_states(manifest, list(engine.fragments()), collectives)
        with together(collectives, CheckpointError):
            if not agrees:
                raise CheckpointError(_explain(manifest.probe, found, differing, path))


def agree(saved: ProbeRecord, found: ProbeRecord) -> bool:
    """Whether two measurements can be of the same weights, given the number formats of both."""
    if not (math.isfinite(saved.loss) and math.isfinite(found.loss)):
        return math.isfinite(saved.loss) == math.isfinite(found.loss)
    tolerance = max(_TOLERANCES[saved.param_dtype], _TOLERANCES[found.param_dtype])
    return abs(saved.loss - found.loss) <= tolerance * max(1.0, abs(saved.loss))


def differing_states(
    manifest: Manifest, fragments: Sequence[Fragment], collectives: Collectives
) -> list[str]:
    """Which states of the live engine are not those of the manifest, as `state of parameter`."""
    mine = {(f.parameter, f.state): fingerprint(f.values, f.start) for f in fragments}
    totals: dict[tuple[str, str], int] = {}
    for theirs in collectives.all_gather(mine):
        for key, part in theirs.items():
            totals[key] = (totals.get(key, 0) + part) % (1 << 64)
    return [
        f"{state} of {name}"
        for name, record in manifest.parameters.items()
        for state, saved in record.states.items()
        if (name, state) in totals and saved.fingerprint != f"{totals[name, state]:016x}"
    ]


def _explain(saved: ProbeRecord, found: ProbeRecord, differing: Sequence[str], path: str) -> str:
    shown = ", ".join(differing[:10]) + (f" and {len(differing) - 10} more" if len(differing) > 10 else "")
    cause = (
        f"These were not loaded as they were saved: {shown}."
        if differing
        else "Every weight and moment is as it was saved, so the data or the software is another: has a file "
        "of the training data changed?"
    )
    return (
        f"{path} was saved with a loss of {saved.loss:.6f} on the first {saved.num_sequences} training "
        f"sequences ({saved.param_dtype}), and now it is {found.loss:.6f} ({found.param_dtype}). {cause} "
        "Nothing was trained or saved. Choose another checkpoint, or start from its weights with init_from."
    )
