#!/usr/bin/env bash
# A small model on real text, on this machine, from nothing: installs once into .venv, then trains or goes on.
#   launch/quickstart.sh [key=value ...]      e.g. launch/quickstart.sh train.steps=50 optim.warmup=10 run.name=mine
# PYTHON=... is an interpreter that has moetrain already: nothing is installed.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ ${1-} == -h || ${1-} == --help ]]; then
    sed -n '2,4s/^# //p' "$0"
    exit 0
fi
if [[ -z ${PYTHON-} ]]; then
    make --no-print-directory -C "$root" install
    PYTHON=$root/.venv/bin/python
fi
exec "$PYTHON" -m moetrain train experiment=quickstart "$@"
