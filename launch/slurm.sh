#!/usr/bin/env bash
# A run on Slurm, with one Ray node on each machine: sbatch --nodes 4 launch/slurm.sh CONFIG [KEY=VALUE]...
#
# Call it in a directory that all nodes share and that holds launch/: relative paths start there, or in
# DISTFT_RUN_ROOT. Python and ray are those on the PATH; PYTHON names another. HEAD_ADDRESS is the first node's
# address on the network to use, for nodes that have several; HEAD_PORT the port, where the usual one is taken.
#
# Before the time limit, or when the job is preempted, the run is asked to save its state; the job is put back
# into the queue, and goes on from its last commit. Options on sbatch's command line win over those below.
#SBATCH --job-name=distft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --no-kill
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --output=distft-%j.log
#SBATCH --open-mode=append
set -euo pipefail

if [ $# -eq 0 ]; then
  echo "Name a configuration: sbatch --nodes 4 launch/slurm.sh CONFIG [KEY=VALUE]..." >&2
  exit 2
fi
cd "${SLURM_SUBMIT_DIR:-.}"
python=${PYTHON:-python}
export DISTFT_RUN_ROOT=${DISTFT_RUN_ROOT:-$PWD}
export RAY_USAGE_STATS_ENABLED=0
# Nodes start at different times; Ray's own patience is 30 s.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=${RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT:-300}
# A head that is gone stays gone, at the end of a run too: the other nodes would wait 60 s for it.
export RAY_gcs_rpc_server_reconnect_timeout_s=${RAY_gcs_rpc_server_reconnect_timeout_s:-15}

ours=$DISTFT_RUN_ROOT/.distft_job_$SLURM_JOB_ID # every node reads it, nobody else does
(umask 077 && mkdir -p "$ours")
rm -f "$ours/driver.pid" # of the job before it was put back into the queue
trap 'rm -rf "$ours"' EXIT
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
if [ "$RAY_AUTH_MODE" = token ] && [ -z "${RAY_AUTH_TOKEN:-}" ]; then
  export RAY_AUTH_TOKEN_PATH=${RAY_AUTH_TOKEN_PATH:-$ours/token}
  "$python" -m distft.cluster.tokens >/dev/null
fi

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
on_head=(--nodes=1 --ntasks=1 --nodelist="${nodes[0]}")
# By number: many systems give a machine's own name as 127.0.1.1, and then no node would be the head.
head=${HEAD_ADDRESS:-$(srun "${on_head[@]}" hostname -I | awk '{ print $1 }')}
address=$head:${HEAD_PORT:-$((20000 + SLURM_JOB_ID % 10000))}

# shellcheck disable=SC2016 # for the shell on the head
driver=(bash -c 'echo $$ >"$0" && exec env "$@"' "$ours/driver.pid"
  RAY_ADDRESS="$address" "$python" launch/ray_train.py "$@")
# A lost node ends its own task only: the run sees to the rest.
srun --nodes="${#nodes[@]}" --ntasks-per-node=1 --no-kill --kill-on-bad-exit=0 --wait=0 \
  ray symmetric-run --address "$address" --min-nodes "${#nodes[@]}" \
  --num-cpus="${SLURM_CPUS_ON_NODE:-1}" --object-store-memory=200000000 \
  -- "${driver[@]}" &
step=$!

is_asked=""
was_asked=""
trap 'is_asked=yes' TERM
while true; do
  status=0
  wait "$step" || status=$?
  [ -n "$is_asked" ] || break
  is_asked="" was_asked=yes
  # The driver alone: srun would pass the signal on to Ray itself, too.
  # shellcheck disable=SC2016
  srun --overlap "${on_head[@]}" bash -c 'kill -TERM "$(<"$0")"' "$ours/driver.pid" || true
done

if [ "$status" -eq 75 ] || { [ -n "$was_asked" ] && [ "$status" -ne 0 ]; }; then
  echo "The run was stopped, and goes on from its last commit: job $SLURM_JOB_ID is put back into the queue."
  scontrol requeue "$SLURM_JOB_ID" || echo "Slurm did not take it back: submit the same command again." >&2
fi
exit "$status"
