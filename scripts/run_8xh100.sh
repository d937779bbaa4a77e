#!/usr/bin/env bash
# 8xH100, the record track: the challenge's baseline, or another recipe.
#   bash scripts/run_8xh100.sh [RECIPE] [KNOB=value ...]       rd_14x576_8xh100 SEED=1338; DRY_RUN=1 prints what it would run
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
take_arguments baseline_8xh100 "$@"
name_run
need_gpus 8
need_data
train "$VENV/bin/torchrun" --standalone --nproc_per_node=8 train_gpt.py
