#!/usr/bin/env bash
# Everything that the GPU check needs, on a GPU machine without a network.
#
#   bash tools/gpu_check.sh                            where packages can be downloaded: fills .wheels/
#   bash tools/gpu_check.sh --references               also computes the losses to compare with, which takes minutes
#   bash tools/gpu_check.sh --install --out DIR ...    on the GPU machine: installs them, then runs the check
#
# The GPU machine has Python 3.12 with torch 2.11, triton, transformers, numpy and most pure-Python packages.
# The wheels are the rest. Nothing is installed for good: they go to a temporary directory on PYTHONPATH.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

WHEELS=.wheels
MAX_MEGABYTES=40
# Of what DeepSpeed and distft import, the packages that are missing there. Versions: constraints.txt.
PACKAGES="annotated-types hjson pydantic pydantic-core sentencepiece typing-extensions typing-inspection xxhash
zstandard torchao"

fetch() {
  local python=${PYTHON:-.venv/bin/python} platforms=() version
  for version in 2_28 2_27 2_24 2_17; do platforms+=(--platform "manylinux_${version}_x86_64"); done
  mkdir -p "$WHEELS"
  rm -f "$WHEELS"/*.whl
  # shellcheck disable=SC2086  # one word for each package
  "$python" -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --constraint constraints.txt \
    --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none \
    "${platforms[@]}" --platform manylinux2014_x86_64 --dest "$WHEELS" $PACKAGES
  # DeepSpeed has no wheel; without its compiled operators, which distft does not use, it is pure Python.
  DS_BUILD_OPS=0 PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
    "$python" -m pip wheel -q --disable-pip-version-check --no-deps --wheel-dir "$WHEELS" deepspeed
  git describe --always --dirty > "$WHEELS/commit.txt"
  du -ch "$WHEELS"/* | sort -k 2
  if (($(du -sm "$WHEELS" | cut -f 1) > MAX_MEGABYTES)); then
    echo "$WHEELS is larger than $MAX_MEGABYTES MB: a package has grown; look at the list above." >&2
    exit 1
  fi
}

install_and_check() {
  local site
  site=$(mktemp -d)
  python3 -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir \
    --target "$site" "$WHEELS"/*.whl
  export PYTHONPATH="$site:$PWD" PYTHONUNBUFFERED=1
  exec python3 tools/gpu_check.py "$@"
}

references() {
  fetch
  "${PYTHON:-.venv/bin/python}" tools/gpu_check_references.py "$WHEELS/references"
}

case ${1:-} in
  --references) references ;;
  --install) shift; install_and_check "$@" ;;
  "") fetch ;;
  *) echo "usage: $0 [--references | --install --out DIR [options of gpu_check.py]]" >&2; exit 2 ;;
esac
