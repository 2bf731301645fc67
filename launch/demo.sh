#!/usr/bin/env bash
# The demo, from text to a fine-tuned classifier: the commands that a user would type, on two CPU cores.
# Needs distft on the PATH (`make demo` installs it), no network. Writes to runs/demo.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

DEMO=runs/demo
export OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=""  # the same on every machine

step() { printf '\n\033[1m%s\033[0m\n' "$*"; }
say() { printf "\033[2m$ %s\033[0m\n" "$*" >&2; "$@"; }

began=$SECONDS
rm -rf "$DEMO"

step "1. Train a tokenizer on Python's standard library, and tokenize the library into shards"
say distft tokenizer train stdlib --vocab-size 4096 --output $DEMO/tokenizer.model
say distft tokenize stdlib --tokenizer $DEMO/tokenizer.model --output $DEMO/shards --holdout 0.02

step "2. Pretrain on two ranks with ZeRO 2, which partitions gradients and optimizer state"
say torchrun --nproc-per-node 2 -m distft train configs/demo_pretrain.yaml

step "3. Resume from a checkpoint in the middle of that run, on one rank without DeepSpeed"
mkdir -p $DEMO/one_rank/checkpoints
say cp -r $DEMO/pretrain/checkpoints/step_00000064 $DEMO/one_rank/checkpoints/
say distft train configs/demo_pretrain.yaml run_dir=$DEMO/one_rank 'engine={type: local}'

step "4. Generate text with the model"
say distft generate $DEMO/pretrain --prompt 'def close(self):' --max-new-tokens 60 | tee $DEMO/sample.txt

step "5. Fine-tune some layers to classify functions by their area of the library"
say distft task --output $DEMO/task
say torchrun --nproc-per-node 2 -m distft train configs/demo_finetune.yaml

step "6. Evaluate the classifier on held-out functions"
say distft evaluate $DEMO/finetune validation.type=labelled validation.path=$DEMO/task/test.jsonl --json \
  > $DEMO/test.json

step "7. Results"
python tools/demo_results.py $DEMO $((SECONDS - began))
