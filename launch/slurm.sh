#!/usr/bin/env bash
# A run on Slurm, with one Ray node on each machine: sbatch --nodes 4 launch/slurm.sh CONFIG [KEY=VALUE]...
#
# Call it in a directory that contains launch/ and that all nodes share. Relative paths start there, or in
# DISTFT_RUN_ROOT. It uses python and ray from the PATH; PYTHON names another python. If nodes have several networks,
# set HEAD_ADDRESS to the first node's address on the right one; set HEAD_PORT if the default port is taken.
#
# Before the time limit, or when the job is preempted, the run saves its state; then Slurm requeues the job, and the
# run resumes from its last checkpoint. Options on sbatch's command line override those below.
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
# Nodes start at different times; Ray's default is 30 s.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=${RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT:-300}
# A head that is gone does not come back. By default the other nodes would wait 60 s for it, even after the run.
export RAY_gcs_rpc_server_reconnect_timeout_s=${RAY_gcs_rpc_server_reconnect_timeout_s:-15}

job_dir=$DISTFT_RUN_ROOT/.distft_job_$SLURM_JOB_ID # only the nodes of this job read it
(umask 077 && mkdir -p "$job_dir")
rm -f "$job_dir/driver.pid" # from before the job was requeued
trap 'rm -rf "$job_dir"' EXIT
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
if [ "$RAY_AUTH_MODE" = token ] && [ -z "${RAY_AUTH_TOKEN:-}" ]; then
  export RAY_AUTH_TOKEN_PATH=${RAY_AUTH_TOKEN_PATH:-$job_dir/token}
  "$python" -m distft.cluster.tokens >/dev/null
fi

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
on_head=(--nodes=1 --ntasks=1 --nodelist="${nodes[0]}")
# Use the numeric address: many systems resolve a machine's own name to 127.0.1.1, so that no node is the head.
head=${HEAD_ADDRESS:-$(srun "${on_head[@]}" hostname -I | awk '{ print $1 }')}
address=$head:${HEAD_PORT:-$((20000 + SLURM_JOB_ID % 10000))}

# shellcheck disable=SC2016 # the shell on the head expands it
driver=(bash -c 'echo $$ >"$0" && exec env "$@"' "$job_dir/driver.pid"
  RAY_ADDRESS="$address" "$python" launch/ray_train.py "$@")
# A lost node ends only its own task; the run continues on the others.
srun --nodes="${#nodes[@]}" --ntasks-per-node=1 --no-kill --kill-on-bad-exit=0 --wait=0 \
  ray symmetric-run --address "$address" --min-nodes "${#nodes[@]}" \
  --num-cpus="${SLURM_CPUS_ON_NODE:-1}" --object-store-memory=200000000 \
  -- "${driver[@]}" &
step=$!

is_stop_requested=""
was_stop_requested=""
trap 'is_stop_requested=yes' TERM
while true; do
  status=0
  wait "$step" || status=$?
  [ -n "$is_stop_requested" ] || break
  is_stop_requested="" was_stop_requested=yes
  # Signal the driver alone: srun would pass the signal on to Ray as well.
  # shellcheck disable=SC2016
  srun --overlap "${on_head[@]}" bash -c 'kill -TERM "$(<"$0")"' "$job_dir/driver.pid" || true
done

if [ "$status" -eq 75 ] || { [ -n "$was_stop_requested" ] && [ "$status" -ne 0 ]; }; then
  echo "The run was stopped: requeueing job $SLURM_JOB_ID, which resumes from its last checkpoint."
  scontrol requeue "$SLURM_JOB_ID" || echo "Slurm did not requeue it: submit the same command again." >&2
fi
exit "$status"
