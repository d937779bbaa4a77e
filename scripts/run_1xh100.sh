#!/usr/bin/env bash
# One H100: the challenge's baseline, or another recipe.
#   bash scripts/run_1xh100.sh [RECIPE] [KNOB=value ...]       targeted_9x512 SEED=1338; DRY_RUN=1 prints what it would run
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
take_arguments baseline_8xh100 "$@"
name_run
need_gpus 1
need_data
train "$VENV/bin/python" train_gpt.py
