"""File names by which the format of a checkpoint is recognised, without torch."""

LATEST = "latest"  # DeepSpeed: names the newest directory
LATEST_UNIVERSAL = "latest_universal"  # the same, of DeepSpeed's universal format
CONFIG_FILE = "config.json"  # of a transformers model
