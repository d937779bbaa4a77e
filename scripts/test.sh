#!/usr/bin/env bash
# The whole default test suite, with all its set-up. Arguments go to pytest: bash scripts/test.sh tests/test_data.py -k ring
# Real data reaches the tests through CORPUS_DIR (a folder as described in data/README.md); without it some skip.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
ensure_venv requirements-dev.txt
export OMP_NUM_THREADS=1
exec "$VENV/bin/python" -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
