"""Train under DeepSpeed's launcher: `deepspeed --num_gpus 2 launch/deepspeed_train.py CONFIG [KEY=VALUE]...`

Calls `distft train`. The launcher sets the same environment variables as torchrun; its extra argument
`--local_rank=N` repeats LOCAL_RANK and is dropped. Without GPUs, `--num_gpus 2` starts two ranks on the CPU.
"""

import sys

from distft.cli.main import main

if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    sys.exit(main(["train", *arguments]))
