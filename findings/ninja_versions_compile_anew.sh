#!/usr/bin/env bash
# Ninja 1.11.1.4 and 1.13.0 (PyPI) on one build folder, such as ~/.cache/torch_extensions, where PyTorch keeps compiled
# extensions (DeepSpeed's operators among them) and calls the first ninja on the PATH at every load.
#
# Guess: the log that ninja keeps of what it has built serves both, or is at worst upgraded once.
# Seen: each finds the other's log of no use, and runs every command again, in both directions, whenever the version
# changes. Only the newer one says so, the first time alone, in a warning that PyTorch does not show.
#
#   1.11, 1.11    builds, no work to do
#   1.13          builds
#   1.13          no work to do
#   1.11          builds
#
# A virtual environment that is activated in one place and called by its path in another (where the system's ninja is
# found first) compiles for minutes at every change. Fails if this changes.
set -euo pipefail
folder="$(mktemp -d)" && trap 'rm -rf "$folder"' EXIT
for version in 1.11.1.4 1.13.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/python" -m pip install --quiet "ninja==$version"
done
mkdir "$folder/build" && cd "$folder/build"
printf 'rule copy\n  command = cp $in $out\nbuild out: copy in\n' >build.ninja
echo content >in
sleep 1.1
for step in 1.11.1.4:builds 1.11.1.4:nothing 1.13.0:builds 1.13.0:nothing 1.11.1.4:builds 1.13.0:builds; do
  version="${step%:*}" wanted="${step#*:}"
  said="$("$folder/$version/bin/ninja" 2>&1)"
  case "$said" in *"no work to do"*) found=nothing ;; *) found=builds ;; esac
  echo "$version $found  ($(head -1 <<<"$said"))"
  [ "$found" = "$wanted" ] || { echo "changed: $version does otherwise" >&2 && exit 1; }
done
echo "as stated"
