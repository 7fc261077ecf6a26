#!/usr/bin/env bash
# Runs the tests as on a machine that has Python and pip alone: without root, compilers, their headers, and what else
# tests/support/needs.py names. Arguments go to pytest:  bash tests/support/bare_machine.sh tests/process -q
# Nothing is changed on this machine: files are hidden in a mount namespace, which takes user namespaces or root.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
HIDDEN="g++ gcc c++ cc clang clang++ curl unshare nsenter ip chromium chromedriver slurmctld slurmd munged
  sbatch srun squeue sinfo scontrol scancel"
if [ -z "${IBQ_BARE:-}" ]; then
  IBQ_BARE="$(mktemp -d)"
  trap 'rm -rf "$IBQ_BARE"' EXIT
  cp "$(type -P unshare)" "$IBQ_BARE/unshare"
  IBQ_BARE="$IBQ_BARE" unshare --user --map-root-user --mount bash tests/support/bare_machine.sh "$@"
  exit
fi
IFS=: read -ra folders <<<"$PATH:/usr/sbin:/sbin"
for folder in "${folders[@]}"; do
  for program in $HIDDEN; do
    [ ! -x "$folder/$program" ] || mount --bind /dev/null "$folder/$program"
  done
done
mount -t tmpfs none /usr/include
mkdir "$IBQ_BARE/home"
# What was compiled before is not found either.
export HOME="$IBQ_BARE/home" TORCH_EXTENSIONS_DIR="$IBQ_BARE/home/extensions" XDG_CACHE_HOME="$IBQ_BARE/home/cache"
export TORCHINDUCTOR_CACHE_DIR="$IBQ_BARE/home/inductor" TRITON_CACHE_DIR="$IBQ_BARE/home/triton" USER=bare LOGNAME=bare
unset CXX CC IBQ_ALL_TESTS
exec "$IBQ_BARE/unshare" --user --map-user=1000 --map-group=1000 python -m pytest --basetemp "$IBQ_BARE/tests" "$@"
