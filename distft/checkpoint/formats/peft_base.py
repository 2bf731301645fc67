"""What the adapters of a checkpoint belong to: the model below them."""

from distft.checkpoint.adapters import adapters_of
from distft.checkpoint.formats.detect import detect_format, open_source
from distft.checkpoint.formats.peft_source import PeftCheckpoint
from distft.checkpoint.steps import absolute


def base_below_adapters(path: str) -> str | None:
    """Where the weights are to which the adapters at `path` add; None: there are none at `path`.

    Raises as `open_source`.
    """
    if detect_format(path) == "peft":
        return PeftCheckpoint.open(path).base_path
    source = open_source(path, weights_only=True)
    if adapters_of(source) is None:
        return None
    base, config = source.manifest.base, source.manifest.config
    found = config.get("init_from") if base is None else base.path
    return absolute(found) if isinstance(found, str) else None
