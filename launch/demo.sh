#!/usr/bin/env bash
# The main job on the embedded default, as the commands that a user would type: text to a fine-tuned classifier.
# Needs distft on the PATH (`make demo` sees to that), two cores and no network. Everything goes to runs/demo.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

DEMO=runs/demo
export OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=""  # the same demo everywhere

step() { printf '\n\033[1m%s\033[0m\n' "$*"; }
say() { printf "\033[2m$ %s\033[0m\n" "$*" >&2; "$@"; }

began=$SECONDS
rm -rf "$DEMO"

step "1. A vocabulary of Python's own standard library, and the library as token shards"
say distft tokenizer train stdlib --vocab-size 4096 --output $DEMO/tokenizer.model
say distft tokenize stdlib --tokenizer $DEMO/tokenizer.model --output $DEMO/shards --holdout 0.02

step "2. Pretraining on two ranks, their gradients and optimizer state divided by ZeRO 2"
say torchrun --nproc-per-node 2 -m distft train configs/demo_pretrain.yaml

step "3. The middle of that run again, from its checkpoint of two ranks, on one rank without DeepSpeed"
mkdir -p $DEMO/one_rank/checkpoints
say cp -r $DEMO/pretrain/checkpoints/step_00000064 $DEMO/one_rank/checkpoints/
say distft train configs/demo_pretrain.yaml run_dir=$DEMO/one_rank 'engine={type: local}'

step "4. A sample of what it writes"
say distft generate $DEMO/pretrain --prompt 'def close(self):' --max-new-tokens 60 | tee $DEMO/sample.txt

step "5. Which area of the library is a function from? A part of the model learns to tell"
say distft task --output $DEMO/task
say torchrun --nproc-per-node 2 -m distft train configs/demo_finetune.yaml

step "6. The classifier on functions that it has never had a label of"
say distft evaluate $DEMO/finetune validation.type=labelled validation.path=$DEMO/task/test.jsonl --json \
  > $DEMO/test.json

step "7. Results"
python tools/demo_results.py $DEMO $((SECONDS - began))
