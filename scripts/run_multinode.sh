#!/usr/bin/env bash
# Several nodes: the same command on each, with its own NODE_RANK.
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 RUN_ID=two bash scripts/run_multinode.sh [RECIPE] [KNOB=value ...]
# GPUS_PER_NODE (8) and MASTER_PORT (29500) have defaults. DRY_RUN=1 prints what it would run. Rank 0 holds the outputs.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
take_arguments baseline_8xh100 "$@"
NNODES=${NNODES:-} NODE_RANK=${NODE_RANK:-} GPUS_PER_NODE=${GPUS_PER_NODE:-8} MASTER_PORT=${MASTER_PORT:-29500}
[[ $NNODES =~ ^[1-9][0-9]*$ ]] || fail "NNODES must be the number of nodes, got '$NNODES'"
[[ $GPUS_PER_NODE =~ ^[1-9][0-9]*$ ]] || fail "GPUS_PER_NODE must be a whole number above 0, got '$GPUS_PER_NODE'"
[[ $NODE_RANK =~ ^(0|[1-9][0-9]*)$ && $NODE_RANK -lt $NNODES ]] ||
    fail "NODE_RANK must be 0 to $((NNODES - 1)), another on each of NNODES=$NNODES nodes, got '$NODE_RANK'"
[[ $MASTER_PORT =~ ^[1-9][0-9]*$ && $MASTER_PORT -lt 65536 ]] || fail "MASTER_PORT must be 1 to 65535, got '$MASTER_PORT'"
[[ -n ${MASTER_ADDR:-} && ! $MASTER_ADDR =~ [[:space:]] ]] ||
    fail "MASTER_ADDR must be the address of the node of rank 0, got '${MASTER_ADDR:-}'"
[ -n "${RUN_ID:-}" ] || fail "RUN_ID must be set, alike on every node"
default RUN_ID "$RUN_ID"
world=$((NNODES * GPUS_PER_NODE))
if [ "$world" -gt 8 ] && [ "${MICRO_BATCH_TOKENS:-0}" = 0 ]; then    # a step has 8 micro-batches unless told otherwise
    export MICRO_BATCH_TOKENS=$((${TRAIN_BATCH_TOKENS:-524288} / world))
    default MICRO_BATCH_TOKENS "$MICRO_BATCH_TOKENS"
fi
need_gpus "$GPUS_PER_NODE"
need_data
train "$VENV/bin/torchrun" "--nnodes=$NNODES" "--node_rank=$NODE_RANK" "--master_addr=$MASTER_ADDR" \
    "--master_port=$MASTER_PORT" "--nproc_per_node=$GPUS_PER_NODE" train_gpt.py
