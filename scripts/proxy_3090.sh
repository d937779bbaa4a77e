#!/usr/bin/env bash
# Track proxy: 12x384 on one 24 GB GPU, 32,768 tokens a step, for a fixed number of steps, which equal seeds repeat.
#   bash scripts/proxy_3090.sh [RECIPE] [KNOB=value ...]       DRY_RUN=1 prints what it would run
#   bash scripts/proxy_3090.sh proxy_3090_180s                 180 seconds instead: as fast as the machine is at that hour
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
take_arguments proxy_3090 "$@"
name_run
need_gpus 1
need_data
train "$VENV/bin/python" train_gpt.py
