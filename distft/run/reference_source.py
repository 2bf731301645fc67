"""The reference of a run: the checkpoint with which its objective compares the model."""

from collections.abc import Mapping
from hashlib import blake2b

from distft.checkpoint.adapters import merged
from distft.checkpoint.fingerprint import fingerprint, fingerprint_text
from distft.checkpoint.formats.detect import open_source
from distft.checkpoint.fragments import WEIGHT
from distft.checkpoint.sources import CheckpointSource, read_chunks
from distft.collectives import Collectives, all_or_none
from distft.errors import CheckpointError, ConfigError
from distft.model.config import ModelConfig
from distft.model.lora_config import is_adapter
from distft.run.config import RunConfig
from distft.run.model import require_parameters, require_same_model


def open_reference(
    config: RunConfig,
    model: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    init_from: CheckpointSource | None,
) -> CheckpointSource | None:
    """The checkpoint of `objective.reference`, else `init_from`; None for an objective without a reference.

    `shapes` are those of the run's parameters; adapters need not be in it. Raises `ConfigError` if there is
    no reference, or one of another model, and `CheckpointError` if it cannot be read.
    """
    if config.objective.reference_target is None:
        return None
    path = getattr(config.objective, "reference", None)
    source = init_from
    if path is not None:
        try:
            source = merged(open_source(path, weights_only=True))
        except CheckpointError as error:
            raise CheckpointError(f"objective.reference: {error}") from None
        require_same_model(source, model, config.allow_model_changes)
    elif config.init_from is None:
        raise ConfigError(
            f"objective.type={getattr(config.objective, 'type', '')} compares the model with a reference: "
            "set init_from to the model that is to be trained further, or objective.reference to another "
            "checkpoint of it; objective.loss=orpo needs none."
        )
    if source is not None:
        require_parameters(source, {name: s for name, s in shapes.items() if not is_adapter(name)})
    return source


def weights_fingerprint(
    source: CheckpointSource, shapes: Mapping[str, tuple[int, ...]], collectives: Collectives
) -> str:
    """Equal for checkpoints with the same weights, whatever their format. Called by all ranks together.

    A checkpoint of distft records it; the weights of another one are read, by each rank a share.
    """
    names = sorted(name for name in shapes if source.has(name, WEIGHT))
    own: dict[str, str] = {}
    with all_or_none(collectives, CheckpointError):
        for name in names[collectives.rank :: collectives.world_size]:
            record = source.manifest.parameters[name].states[WEIGHT]
            own[name] = f"{record.dtype} {record.fingerprint or _read_fingerprint(source, name)}"
    digest = blake2b(digest_size=16)
    found = {name: text for part in collectives.all_gather(own) for name, text in part.items()}
    for name in names:
        digest.update(f"{name} {found[name]}\n".encode())
    return digest.hexdigest()


def _read_fingerprint(source: CheckpointSource, name: str) -> str:
    return fingerprint_text(
        sum(fingerprint(values, start) for start, values in read_chunks(source, name, WEIGHT))
    )
