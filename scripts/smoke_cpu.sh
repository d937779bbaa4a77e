#!/usr/bin/env bash
# Track smoke: everything once on the embedded corpus, under 5 minutes on 2 cores, needs no data and after set-up no network.
#   bash scripts/smoke_cpu.sh [RECIPE] [KNOB=value ...]        DRY_RUN=1 prints what it would run
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
take_arguments smoke_cpu "$@"
name_run
train_embedded
