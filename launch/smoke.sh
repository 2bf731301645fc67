#!/usr/bin/env bash
# Checks that every launcher trains on this machine and reaches the same losses.
#
# launch/smoke.sh [plain|torchrun|deepspeed|ray]...
#
# Makes a tiny corpus from Python's library, a tokenizer and shards in a temporary directory, trains the same few
# steps under each launcher (default: all four), and prints a table. Fails if a launcher fails or losses differ.
# RANKS=2: ranks for all but plain; DEVICE=cpu or cuda; PYTHON=python.
set -euo pipefail

python=${PYTHON:-python}
ranks=${RANKS:-2}
device=${DEVICE:-cpu}
launchers=("$@")
[ $# -gt 0 ] || launchers=(plain torchrun deepspeed ray)
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export PYTHONPATH=$launch/..${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
unset RAY_ADDRESS # start a new Ray
gpus_per_worker=0
if [ "$device" = cpu ]; then export DS_ACCELERATOR=cpu; else gpus_per_worker=1; fi

quietly() { # shows the output only if the command fails
  local status=0
  "$@" >output.txt 2>&1 || status=$?
  if [ "$status" -ne 0 ]; then
    cat output.txt >&2
    echo "Failed with exit code $status: $*" >&2
  fi
  return "$status"
}

start() { # prints the launcher's command line up to the configuration
  case $1 in
    plain) echo "$python -m distft train" ;;
    torchrun) echo "$python -m torch.distributed.run --standalone --nproc-per-node $ranks -m distft train" ;;
    deepspeed) echo "$python -m deepspeed.launcher.runner --num_gpus $ranks --master_port $(free_port) $launch/deepspeed_train.py" ;;
    ray) echo "$python $launch/ray_train.py" ;;
    *) echo "Unknown launcher $1: choose plain, torchrun, deepspeed or ray." >&2 && return 2 ;;
  esac
}

free_port() {
  "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

for launcher in "${launchers[@]}"; do start "$launcher" >/dev/null; done

mkdir text
"$python" - <<'END'
import inspect, shutil, argparse, ast
for module in (argparse, ast, inspect):
    shutil.copy(module.__file__, f"text/{module.__name__}.txt")
END
quietly "$python" -m distft tokenizer train text --output tokenizer.model --vocab-size 512
quietly "$python" -m distft tokenize text --tokenizer tokenizer.model --output shards
cat >smoke.yaml <<END
run_dir: unset
device: $device
model: {d_model: 64, num_layers: 2, num_heads: 2, max_seq_len: 64}
data: {type: tokens, sources: [{path: shards/train}]}
batch: {global_batch_size: 8, micro_batch_size: 2, seq_len: 64}
engine: {type: zero, zero_stage: 1}
optim: {peak_lr: 0.003}
train: {max_steps: 10, log_every_steps: 1}
cluster: {workers: $ranks, gpus_per_worker: $gpus_per_worker}
END

for launcher in "${launchers[@]}"; do
  echo "training under $launcher"
  began=$SECONDS
  # shellcheck disable=SC2046 # split into words
  quietly $(start "$launcher") smoke.yaml run_dir="runs/$launcher"
  echo $((SECONDS - began)) >"runs/$launcher/seconds"
done

"$python" - "$device" "$ranks" "${launchers[@]}" <<'END'
import json, pathlib, sys

device, ranks, *launchers = sys.argv[1:]
limit = 1e-5 if device == "cpu" else 1e-3
curves = {}
print(f"{'launcher':<10} {'ranks':>5} {'last loss':>10} {'difference':>10} {'seconds':>7}")
for launcher in launchers:
    run = pathlib.Path("runs", launcher)
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    curves[launcher] = curve = [line["loss"] for line in lines if "loss" in line]
    first = curves[launchers[0]]
    difference = max(abs(a - b) for a, b in zip(curve, first, strict=True))
    num_ranks = 1 if launcher == "plain" else ranks
    seconds = (run / "seconds").read_text().strip()
    print(f"{launcher:<10} {num_ranks:>5} {curve[-1]:>10.6f} {difference:>10.1e} {seconds:>7}")
    if difference > limit:
        sys.exit(f"The losses under {launcher} differ from those under {launchers[0]}.")
END
