#!/usr/bin/env bash
# A sweep on this machine, one run after the other, and the page that compares its runs.
#   launch/sweep.sh NAME [key=a,b ...]      e.g. launch/sweep.sh rates optim.lr=1e-3,3e-3 seed=1,2 train.steps=200
# The runs are in runs/NAME/; the same line goes on with a sweep that was ended. PYTHON (python); the page needs the
# extra report.
set -euo pipefail

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
    sed -n '2,5s/^# //p' "$0"
    [[ $# -gt 0 ]]
    exit
fi
name=$1
shift
if [[ $name == -* || $name == *=* ]]; then
    echo "sweep.sh: '$name' is not a name: launch/sweep.sh NAME key=a,b ..." >&2
    exit 2
fi
folder=runs
for word in "$@"; do
    if [[ $word == run.dir=* ]]; then folder=${word#run.dir=}; fi
done
"${PYTHON:-python}" -m moetrain train -m run.name="$name" "$@"
"${PYTHON:-python}" -m moetrain report "$folder/$name"
