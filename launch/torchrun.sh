#!/usr/bin/env bash
# The ranks of one node under torchrun, which starts them again up to RESTARTS times where one fails.
#   RANKS=8 launch/torchrun.sh [key=value ...]      the arguments are those of moetrain train
# RANKS (every GPU, or 1), RESTARTS (3), PYTHON (python), LOGS (runs/torchrun): where torchrun keeps its own files.
set -euo pipefail

if [[ ${1-} == -h || ${1-} == --help ]]; then
    sed -n '2,4s/^# //p' "$0"
    exit 0
fi
# --standalone takes a free port; gpu counts GPUs, and is refused where there is none
if [[ -z ${RANKS-} ]]; then
    RANKS=1
    if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then RANKS=gpu; fi
fi
exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc-per-node="$RANKS" \
    --max-restarts="${RESTARTS:-3}" --log-dir="${LOGS:-runs/torchrun}" -m moetrain train "$@"
