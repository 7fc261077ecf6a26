#!/usr/bin/env bash
# Sets up what the tests need and runs them; arguments go to pytest:  bash tools/test.sh -k golden
set -euo pipefail
[ -z "${IBQ_GOLDEN:-}" ] || { IBQ_GOLDEN="$(realpath "$IBQ_GOLDEN")" && export IBQ_GOLDEN; }
cd "$(dirname "${BASH_SOURCE[0]}")/.."
EXTRAS=test
source tools/lib/environment.sh
exec python -m pytest "$@"
