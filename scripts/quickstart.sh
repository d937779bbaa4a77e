#!/usr/bin/env bash
# From nothing to a scored artifact: virtual environment, embedded corpus, training, export, read-back, val_bpb.
# Uses a GPU when there is one, else the CPU (under 5 minutes on 2 cores). Knobs in the environment win over the ones here.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
ensure_venv requirements.txt
export HF_HUB_OFFLINE=1
"$VENV/bin/python" data/prepare.py embedded

export DATA_PATH=${DATA_PATH:-data/datasets/embedded_sp1024}
export TOKENIZER_PATH=${TOKENIZER_PATH:-data/tokenizers/embedded_1024_bpe.model}
export RUN_ID=${RUN_ID:-quickstart_$(date +%Y%m%d_%H%M%S)}
export NUM_LAYERS=${NUM_LAYERS:-4} MODEL_DIM=${MODEL_DIM:-192} NUM_HEADS=${NUM_HEADS:-3} NUM_KV_HEADS=${NUM_KV_HEADS:-3}
export TRAIN_SEQ_LEN=${TRAIN_SEQ_LEN:-256} TRAIN_BATCH_TOKENS=${TRAIN_BATCH_TOKENS:-4096} MICRO_BATCH_TOKENS=${MICRO_BATCH_TOKENS:-4096}
export ITERATIONS=${ITERATIONS:-300} WARMDOWN_ITERS=${WARMDOWN_ITERS:-150} WARMUP_STEPS=${WARMUP_STEPS:-0}
export MAX_WALLCLOCK_SECONDS=${MAX_WALLCLOCK_SECONDS:-0} MUON_MOMENTUM_WARMUP_STEPS=${MUON_MOMENTUM_WARMUP_STEPS:-100}
export VAL_LOSS_EVERY=${VAL_LOSS_EVERY:-0} TRAIN_LOG_EVERY=${TRAIN_LOG_EVERY:-50} VAL_BATCH_SIZE=${VAL_BATCH_SIZE:-65536}
"$VENV/bin/python" train_gpt.py
exec "$VENV/bin/python" scripts/show_run.py "${LOG_DIR:-logs}/$RUN_ID"
