#!/usr/bin/env bash
# Run a command as a Slurm step, one process per GPU, and wait for its end.
#
#   tools/run_dist_slurm.sh gpu my_job 8 configs/x.sh
#   GPUS_PER_NODE=4 tools/run_dist_slurm.sh gpu my_job 16 python main.py -m dn_dab_detr --use_dn ...
#
# Arguments: partition, job name, processes in all, then the command. main.py finds its place among the processes from
# what Slurm tells every one of them.
# Environment: GPUS_PER_NODE [8, at most the processes in all; CPU_ONLY=1 asks for none], CPUS_PER_TASK [5],
# SRUN_ARGS [further arguments of srun].
set -euo pipefail

if [ "$#" -lt 4 ]; then
    echo "usage: $0 PARTITION JOB_NAME PROCESSES COMMAND [ARGUMENTS]" >&2
    exit 2
fi
partition=$1
job_name=$2
processes=$3
shift 3
per_node=${GPUS_PER_NODE:-8}
if [ "$processes" -lt "$per_node" ]; then
    per_node=$processes
fi
if [ $((processes % per_node)) -ne 0 ]; then
    echo "$0: $processes processes do not fill nodes of $per_node: set GPUS_PER_NODE to a divisor" >&2
    exit 2
fi
arguments=(
    --partition="$partition"
    --job-name="$job_name"
    --nodes="$((processes / per_node))"
    --ntasks="$processes"
    --ntasks-per-node="$per_node"
    --cpus-per-task="${CPUS_PER_TASK:-5}"
    # A process that fails ends the others.
    --kill-on-bad-exit=1
)
if [ "${CPU_ONLY:-0}" != 1 ]; then
    arguments+=(--gres="gpu:$per_node")
fi
# Unquoted on purpose: several arguments in one variable.
# shellcheck disable=SC2086
exec srun "${arguments[@]}" ${SRUN_ARGS:-} "$@"
