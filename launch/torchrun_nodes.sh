#!/usr/bin/env bash
# This node's ranks of a job on several nodes, under torchrun. Run the same line on each node, in any order.
#   NODES=4 MEET=node01:PORT JOB=name launch/torchrun_nodes.sh [key=value ...]
# NODES: how many, or the fewest and the most, 2:4: nodes may then come and go, and layout.dp=-1 takes what there is.
# MEET: one of the nodes and a port that is free there; all nodes reach it. JOB: a name that all nodes give, and no
# other job. RANKS (every GPU, or 1), RESTARTS (3), PYTHON (python), LOGS (runs/torchrun).
# The network: NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME (docs/cluster.md).
set -euo pipefail

if [[ ${1-} == -h || ${1-} == --help ]]; then
    sed -n '2,7s/^# //p' "$0"
    exit 0
fi
: "${NODES:?how many nodes, for example NODES=4 or NODES=2:4}"
: "${MEET:?where they meet, for example MEET=node01:29500}"
: "${JOB:?a name of the job, the same on all nodes}"
if [[ -z ${RANKS-} ]]; then
    RANKS=1
    if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then RANKS=gpu; fi
fi
# without it, torch 2.13 gives a node that comes later an address that nobody tells it
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}
exec "${PYTHON:-python}" -m torch.distributed.run --nnodes="$NODES" --nproc-per-node="$RANKS" \
    --max-restarts="${RESTARTS:-3}" --rdzv-backend=c10d --rdzv-endpoint="$MEET" --rdzv-id="$JOB" \
    --log-dir="${LOGS:-runs/torchrun}" -m moetrain train "$@"
