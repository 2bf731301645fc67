"""Names of targets, and the value that marks none; settings use them without importing torch."""

IGNORE_INDEX = -100  # a target that has no loss
NEXT_TOKEN = "next_token"  # name of the targets [B, T]: the token that follows each position
LABEL = "label"  # name of the targets [B]: the class of each row
