"""Which format a checkpoint is in, by the files that are there."""

from distft import storage
from distft.checkpoint.committed import committed_steps, find_checkpoint, steps_beside
from distft.checkpoint.formats.deepspeed_files import LATEST, LATEST_UNIVERSAL
from distft.checkpoint.formats.deepspeed_source import DeepSpeedCheckpoint
from distft.checkpoint.formats.huggingface_files import CONFIG_FILE
from distft.checkpoint.formats.huggingface_source import HuggingFaceCheckpoint
from distft.checkpoint.formats.universal import UniversalCheckpoint
from distft.checkpoint.manifest import MANIFEST
from distft.checkpoint.sources import CheckpointSource
from distft.errors import CheckpointError


def open_source(path: str, *, trust: bool = False) -> CheckpointSource:
    """The checkpoint at `path`, in whatever format; reads headers, no state.

    `trust` lets classes in DeepSpeed's pickles be imported that are not known to be harmless. Raises
    `CheckpointError` where there is no checkpoint, or a damaged one.
    """
    names = set(storage.list_names(path))
    if not names:
        raise CheckpointError(f"{path} does not exist, or is empty.{steps_beside(path)}")
    if MANIFEST in names or committed_steps(path) or committed_steps(storage.join(path, "checkpoints")):
        return find_checkpoint(path)
    if LATEST_UNIVERSAL in names or "zero" in names:
        return UniversalCheckpoint.open(path, trust=trust)
    if LATEST in names or any(name.endswith("_model_states.pt") for name in names):
        return DeepSpeedCheckpoint.open(path, trust=trust)
    if CONFIG_FILE in names:
        return HuggingFaceCheckpoint.open(path)
    raise CheckpointError(
        f"{path} is no checkpoint that is known here. Of ours it has {MANIFEST}, or step_*/; of DeepSpeed "
        f"{LATEST} or *_model_states.pt; of its universal format {LATEST_UNIVERSAL}; of transformers "
        f"{CONFIG_FILE}. It holds {', '.join(sorted(names)[:10])}."
    )
