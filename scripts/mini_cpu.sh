#!/usr/bin/env bash
# Track mini: 400 fixed steps on real prose under a cap of 1,000,000 bytes, about 10 minutes on 2 cores; compare in pairs of
# equal seeds.
#   bash scripts/mini_cpu.sh [RECIPE] [KNOB=value ...]         SEED=1338 ...; DRY_RUN=1 prints what it would run
# Where CORPUS_DIR has docs_prose.jsonl.xz and tokenizers/fineweb_1024_bpe.model, the prose is tokenised first.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
take_arguments mini_cpu "$@"
name_run
if [ -n "${CORPUS_DIR:-}" ] && [ "$DATA_PATH" = data/datasets/prose_sp1024 ] && [ ! -e "$DATA_PATH/manifest.json" ]; then
    dry || ensure_venv requirements.txt
    step "$VENV/bin/python" data/prepare.py tokenize --docs "$CORPUS_DIR/docs_prose.jsonl.xz" \
        --tokenizer-model "$CORPUS_DIR/tokenizers/fineweb_1024_bpe.model" --val-docs 2000 --out "$DATA_PATH"
fi
need_data
train "$VENV/bin/python" train_gpt.py
