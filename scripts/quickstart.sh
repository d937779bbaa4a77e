#!/usr/bin/env bash
# From nothing to a scored artifact: virtual environment, embedded corpus, training, export, read-back, val_bpb.
# Uses a GPU when there is one, else the CPU (under 5 minutes on 2 cores). Knobs in the environment win over the recipe's,
# scripts/recipes/smoke_cpu.env. scripts/smoke_cpu.sh is the same on the CPU and prints what it runs.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
default DEVICE auto
default RUN_ID "quickstart_$(date +%Y%m%d_%H%M%S)"
QUIET=1
take_arguments smoke_cpu "$@"
train_embedded
