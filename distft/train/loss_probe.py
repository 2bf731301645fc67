"""A loss on a few fixed sequences, saved with a checkpoint and reproduced when it is loaded."""

import math
from collections.abc import Sequence

import torch

from distft.checkpoint.fingerprint import fragment_digests, merge_digests
from distft.checkpoint.fragments import Fragment
from distft.checkpoint.manifest import Manifest, ProbeRecord
from distft.collectives import Collectives, SingleProcess, all_or_none
from distft.engine.interface import Engine
from distft.engine.settings import EngineSettings
from distft.errors import CheckpointError
from distft.objective.interface import Objective, ObjectiveContext
from distft.train.evaluation import EvaluationFeed

# How far two losses of the same weights may differ, relative to the larger of 1 and the loss. In fp32 the
# order of summation differs: 2e-6 between engines and world sizes. bf16 and fp16 have 8 and 11 bits a weight.
_TOLERANCES: dict[str, float] = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 2e-2}


class LossProbe:
    """The loss on the first sequences of the training data; every rank computes all of it."""

    def __init__(
        self,
        feed: EvaluationFeed,
        objective: Objective,
        precision: EngineSettings,
        *,
        vocab_size: int,
    ) -> None:
        self._feed = feed
        self._objective = objective
        # Every rank computes the loss of all sequences; sums over ranks would count them repeatedly.
        self._context = ObjectiveContext(vocab_size, SingleProcess())
        self._precision = precision

    @torch.no_grad()
    def measure(self, engine: Engine, num_sequences: int) -> ProbeRecord:
        """The loss of the engine's current weights. Called by all ranks together."""
        batch = self._feed.batch(0, num_sequences).to(engine.device)
        was_training = engine.module.training
        engine.module.eval()
        try:
            sums = self._objective.evaluate(engine.model, batch, self._context)
            metrics = self._objective.metrics(sums)
        finally:
            engine.module.train(was_training)
        return ProbeRecord(
            loss=metrics["loss"],
            num_sequences=num_sequences,
            param_dtype=self._precision.param_dtype,
            frozen_bits=self._precision.frozen_bits,
        )

    def check(self, engine: Engine, manifest: Manifest, path: str, collectives: Collectives) -> None:
        """Raise `CheckpointError` on all ranks if the engine does not reproduce the checkpoint's loss.

        Frozen weights of other bits have another loss, of which nothing can be said.
        """
        if manifest.probe is None or manifest.probe.frozen_bits != self._precision.frozen_bits:
            return
        measured = self.measure(engine, manifest.probe.num_sequences)
        is_reproduced = losses_agree(manifest.probe, measured)
        if all(collectives.all_gather(is_reproduced)):
            return
        differing = differing_states(manifest, list(engine.fragments()), collectives)
        with all_or_none(collectives, CheckpointError):
            if not is_reproduced:
                raise CheckpointError(_describe_mismatch(manifest.probe, measured, differing, path))


def losses_agree(saved: ProbeRecord, measured: ProbeRecord) -> bool:
    """Whether both may be losses of the same weights, within the tolerance of the less precise dtype."""
    if not (math.isfinite(saved.loss) and math.isfinite(measured.loss)):
        return math.isfinite(saved.loss) == math.isfinite(measured.loss)
    tolerance = max(_TOLERANCES[saved.param_dtype], _TOLERANCES[measured.param_dtype])
    return abs(saved.loss - measured.loss) <= tolerance * max(1.0, abs(saved.loss))


def differing_states(
    manifest: Manifest, fragments: Sequence[Fragment], collectives: Collectives
) -> list[str]:
    """The engine's states whose fingerprint is not the manifest's, as `state of parameter`."""
    loaded = merge_digests(collectives.all_gather(fragment_digests(fragments)))
    return [
        f"{state} of {name}"
        for name, record in manifest.parameters.items()
        for state, saved in record.states.items()
        if state in loaded.get(name, {}) and saved.fingerprint != loaded[name][state].fingerprint
    ]


def _describe_mismatch(saved: ProbeRecord, measured: ProbeRecord, differing: Sequence[str], path: str) -> str:
    shown = ", ".join(differing[:10]) + (f" and {len(differing) - 10} more" if len(differing) > 10 else "")
    cause = (
        f"These states were loaded with other values than saved: {shown}."
        if differing
        else "All weights and moments were loaded as saved, so the data or the software differs: has a file "
        "of the training data changed?"
    )
    return (
        f"{path} was saved with a loss of {saved.loss:.6f} on the first {saved.num_sequences} training "
        f"sequences ({saved.param_dtype}), but the loss is now {measured.loss:.6f} ({measured.param_dtype}). "
        f"{cause} "
        "Nothing was trained or saved. Choose another checkpoint, or start from its weights with init_from."
    )
