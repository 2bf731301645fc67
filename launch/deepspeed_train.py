"""Train under DeepSpeed's launcher: `deepspeed --num_gpus 2 launch/deepspeed_train.py CONFIG [KEY=VALUE]...`

The same as `distft train`: the launcher sets torchrun's environment, and adds an argument `--local_rank=N`
that says what LOCAL_RANK says. On a machine without a GPU, `--num_gpus 2` starts two ranks on the CPU.
"""

import sys

from distft.cli.main import main

if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    sys.exit(main(["train", *arguments]))
