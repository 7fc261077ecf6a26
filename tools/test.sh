#!/usr/bin/env bash
# Sets up what the tests need and runs them on all cores; arguments go to pytest:
#
#   bash tools/test.sh              all
#   bash tools/test.sh --quick      style, the tests of units and formulas, one step of every engine: some minutes
#   bash tools/test.sh -k golden    see tests/README.md
set -euo pipefail
[ -z "${IBQ_GOLDEN:-}" ] || { IBQ_GOLDEN="$(realpath "$IBQ_GOLDEN")" && export IBQ_GOLDEN; }
cd "$(dirname "${BASH_SOURCE[0]}")/.."
EXTRAS=test
source tools/lib/environment.sh
if [ "${1:-}" = --quick ]; then
  shift
  ruff check .
  ruff format --check .
  set -- -m "not slow" tests/unit tests/golden tests/process/test_one_step.py "$@"
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # each process of the tests has a core
[ $# -gt 0 ] || PYTHONPATH=.:tests python tests/support/operators.py || true # the tests say what is wrong
exec python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder "$@"
