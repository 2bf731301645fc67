"""What the checkpoints of a run with adapters refer to: the weights of the model that it began with."""

import os

from distft import storage
from distft.checkpoint.fragments import WEIGHT
from distft.checkpoint.manifest import BaseRecord
from distft.checkpoint.steps import absolute, step_name
from distft.run.model import new_parameter_prefixes
from distft.run.run_inputs import RunInputs


def base_of(inputs: RunInputs, root: str) -> BaseRecord | None:
    """The base of a new run's checkpoints below `root`, with all that it has; None: they hold everything.

    A base at a URL is copied once: a checkpoint's file names no URL to be opened.
    """
    lora, source = inputs.config.lora, inputs.init_from
    if lora is None or lora.copies_base or source is None or storage.is_url(source.path):
        return None
    path = absolute(source.path)
    new = new_parameter_prefixes(source, inputs.heads, inputs.label_names, inputs.config.objective)
    names = [n for n in inputs.shapes if source.has(n, WEIGHT) and not n.startswith(new)]
    relative = None
    if not storage.is_url(root):
        relative = os.path.relpath(path, storage.join(absolute(root), step_name(0)))
    return BaseRecord(path=path, relative=relative, parameters=tuple(names))
