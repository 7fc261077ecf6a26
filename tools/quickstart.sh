#!/usr/bin/env bash
# From a folder of images to generated images: installs the project, then runs tools/lib/quickstart/recipe.py.
#
#   bash tools/quickstart.sh                       the bundled emoji
#   bash tools/quickstart.sh --data my_images      your own: one sub-folder per class
#   bash tools/quickstart.sh --fresh               start over
set -euo pipefail
export IBQ_CALLED_FROM="$PWD" # relative --data and --output are the caller's
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/lib/environment.sh
exec python tools/lib/quickstart/recipe.py "$@"
