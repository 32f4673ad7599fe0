#!/usr/bin/env bash
# Start a command once per GPU of this host, as one of NNODES hosts.
#
#   GPUS_PER_NODE=8 tools/run_dist_launch.sh 8 python main.py -m dn_dab_detr --use_dn ...
#   MASTER_ADDR=host0 NODE_RANK=1 GPUS_PER_NODE=8 tools/run_dist_launch.sh 16 configs/x.sh
#
# Arguments: processes in all, then the command: a python script with its options, or an executable.
# Environment: GPUS_PER_NODE [8, at most the processes in all], MASTER_ADDR [127.0.0.1], MASTER_PORT [29500],
# NODE_RANK [0]. Every process gets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
set -euo pipefail

if [ "$#" -lt 2 ]; then
    echo "usage: $0 PROCESSES COMMAND [ARGUMENTS]" >&2
    exit 2
fi
processes=$1
shift
per_node=${GPUS_PER_NODE:-8}
if [ "$processes" -lt "$per_node" ]; then
    per_node=$processes
fi
if [ $((processes % per_node)) -ne 0 ]; then
    echo "$0: $processes processes do not fill nodes of $per_node: set GPUS_PER_NODE to a divisor" >&2
    exit 2
fi
launcher=(
    python -m torch.distributed.run
    --nnodes "$((processes / per_node))"
    --nproc_per_node "$per_node"
    --node_rank "${NODE_RANK:-0}"
    --master_addr "${MASTER_ADDR:-127.0.0.1}"
    --master_port "${MASTER_PORT:-29500}"
)
if [ "$1" = python ] || [ "$1" = python3 ]; then
    shift
    exec "${launcher[@]}" "$@"
elif [[ "$1" == *.py ]]; then
    exec "${launcher[@]}" "$@"
else
    exec "${launcher[@]}" --no_python "$@"
fi
