#!/usr/bin/env bash
# Submit a run to a Ray cluster and follow it: launch/submit.sh CONFIG [KEY=VALUE]...
#
# As `ray job submit --working-dir . -- python launch/ray_train.py CONFIG ...`, but it waits for a head that
# has just started, gives the run's own exit code, and lets relative paths start here where the cluster is
# this machine. RAY_ADDRESS is the dashboard's http address; DISTFT_RUN_ROOT a directory that all nodes have.
set -euo pipefail
exec "${PYTHON:-python}" -m distft.cluster.submit "$@"
