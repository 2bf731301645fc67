"""Names of files and directories by which the format of a checkpoint is recognised, without torch."""

import re

from distft import storage

LATEST = "latest"  # DeepSpeed: names the newest directory
LATEST_UNIVERSAL = "latest_universal"  # the same, of DeepSpeed's universal format
CONFIG_FILE = "config.json"  # of a transformers model
ADAPTER_CONFIG, ADAPTER_MODEL = "adapter_config.json", "adapter_model"  # of PEFT: a file, and a file's stem
ADAPTER_FILE = f"{ADAPTER_MODEL}.safetensors"
MODEL_STATES = re.compile(r"(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<mp_rank>\d+)_model_states\.pt")
_MOST_NAMES = 1000  # of a directory in which tags are looked for


def list_tags(path: str) -> list[str]:
    """The subdirectories of `path` that have model files of DeepSpeed, in the order of their numbers."""
    tags = [
        name for name in storage.list_names(path)[:_MOST_NAMES] if has_model_states(storage.join(path, name))
    ]
    numbers = {tag: [int(digits) for digits in re.findall(r"\d+", tag)] for tag in tags}
    return sorted(tags, key=lambda tag: (numbers[tag], tag))


def has_model_states(path: str) -> bool:
    """Whether the directory `path` has model files of DeepSpeed."""
    names = storage.list_names(path) if storage.is_directory(path) else []
    return any(MODEL_STATES.fullmatch(name) for name in names)
