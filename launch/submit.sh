#!/usr/bin/env bash
# Submit a run to a Ray cluster and follow it: launch/submit.sh CONFIG [KEY=VALUE]... calls `distft submit`.
set -euo pipefail
exec "${PYTHON:-python}" -m distft submit "$@"
