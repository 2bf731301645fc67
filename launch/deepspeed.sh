#!/usr/bin/env bash
# Train on several machines without Ray: launch/deepspeed.sh HOSTFILE CONFIG [KEY=VALUE]...
#
# HOSTFILE has the form of launch/hostfile.example. Call the script on the first machine in it, in a directory that
# all machines share. All machines need the same Python and ssh without a password. NETWORK_INTERFACE (such as eth0)
# selects the private network, MASTER_ADDRESS and MASTER_PORT (29500) the address of rank 0.
#
# If a machine or a rank dies, the script starts the run again, RESTARTS (3) times. It reads HOSTFILE again each
# time, so remove broken machines from it. The run resumes from its last checkpoint, on the ranks of HOSTFILE.
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "A hostfile and a configuration are required: launch/deepspeed.sh HOSTFILE CONFIG [KEY=VALUE]..." >&2
  exit 2
fi
hostfile=$1
shift
if [ ! -r "$hostfile" ]; then
  echo "$hostfile cannot be read: write a hostfile like launch/hostfile.example." >&2
  exit 2
fi
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ -n "${NETWORK_INTERFACE:-}" ]; then
  # DeepSpeed passes few environment variables to other machines, plus those in this file. It puts them on command
  # lines, so the file must not contain secrets.
  DS_ENV_FILE=$(mktemp)
  export DS_ENV_FILE
  trap 'rm -f "$DS_ENV_FILE"' EXIT
  printf '%s\n' "NCCL_SOCKET_IFNAME=$NETWORK_INTERFACE" "GLOO_SOCKET_IFNAME=$NETWORK_INTERFACE" >"$DS_ENV_FILE"
fi

restarts=${RESTARTS:-3}
for ((attempt = 0; ; attempt++)); do
  status=0
  "${PYTHON:-python}" -m deepspeed.launcher.runner --hostfile "$hostfile" \
    ${MASTER_ADDRESS:+--master_addr "$MASTER_ADDRESS"} --master_port "${MASTER_PORT:-29500}" \
    "$launch/deepspeed_train.py" "$@" || status=$?
  case $status in
    # Done; a user error, which would repeat; stopped on request, by ^C or by SIGTERM.
    0 | 2 | 75 | 130 | 143) exit "$status" ;;
  esac
  [ "$attempt" -lt "$restarts" ] || exit "$status"
  echo "Restarting after exit code $status: the run resumes from its last checkpoint." >&2
  sleep "${RESTART_DELAY_S:-10}" # ports and devices become free
done
