#!/usr/bin/env bash
# A run on several machines without Ray: launch/deepspeed.sh HOSTFILE CONFIG [KEY=VALUE]...
#
# HOSTFILE is as launch/hostfile.example. Call it on the first machine of it, in a directory that all machines
# share; each needs the same Python, and ssh without a password. NETWORK_INTERFACE (eth0) names the private
# network, MASTER_ADDRESS and MASTER_PORT (29500) where ranks meet.
#
# Where a machine or a rank dies, the run is started again, on the machines of HOSTFILE as it is then: take
# out what is broken. It goes on from its last commit, with as many ranks as there are. RESTARTS=3 times.
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "Name a hostfile and a configuration: launch/deepspeed.sh HOSTFILE CONFIG [KEY=VALUE]..." >&2
  exit 2
fi
hostfile=$1
shift
if [ ! -r "$hostfile" ]; then
  echo "$hostfile cannot be read: write one like launch/hostfile.example." >&2
  exit 2
fi
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ -n "${NETWORK_INTERFACE:-}" ]; then
  # DeepSpeed gives other machines little of the environment, and what this file says. No secrets: it puts
  # them on command lines.
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
    # Done; a mistake, which stays one; stopped as asked, by a signal or by ^C.
    0 | 2 | 75 | 130 | 143) exit "$status" ;;
  esac
  [ "$attempt" -lt "$restarts" ] || exit "$status"
  echo "Started again after exit code $status: the run goes on from its last commit." >&2
  sleep "${RESTART_DELAY_S:-10}" # until ports and devices are free
done
