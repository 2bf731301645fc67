"""When a run saves checkpoints, and which of them it keeps."""

from pydantic import Field

from distft.config import PathText, Settings


class CheckpointConfig(Settings):
    """When a run saves checkpoints, and which of them it keeps."""

    directory: PathText | None = None  # a path or a URL that all ranks reach; null: checkpoints/ in run_dir
    every_steps: int | None = Field(default=None, ge=1)  # null: only the last step, which is always saved
    keep_last: int = Field(default=2, ge=1)  # how many of the newest checkpoints stay
    keep_every_steps: int | None = Field(default=None, ge=1)  # multiples of this are never pruned
    resume: bool = True  # continue from the newest undamaged checkpoint in the run's directory, if any
    allow_other_optimizer: bool = False  # resume with another optimizer, whose states start anew
    in_background: bool = True  # train on while a thread writes a copy in host memory, which must fit
