# Sourced by the other scripts: the active environment, or else .venv, with this project installed in it.
# EXTRAS (such as "test") names the optional dependencies that are wanted; without it, those of all commands but the demo.
usual=train,evaluate,report
EXTRAS="${EXTRAS:-$usual}"
fail() {
  echo "error: $1" >&2
  exit 2
}
if [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ]; then
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python="${PYTHON:-python3}"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
      fail "Python 3.11 or newer is needed; name one by PYTHON=/path/to/python"
    echo "making .venv"
    rm -rf .venv
    "$python" -m venv .venv || { rm -rf .venv; fail "$python cannot make environments; on Debian install python3-venv"; }
  fi
  source .venv/bin/activate
fi
# Installed again only when the project, its place or the wanted extras have changed.
stamps="$(python -c 'import sys; print(sys.prefix)')/.ibq-installed"
wanted="$(cat setup.cfg pyproject.toml; pwd)"
if [ "$(cat "$stamps/$EXTRAS" 2>/dev/null)" != "$wanted" ]; then
  echo "installing the project (the first time this fetches PyTorch: a few minutes)"
  python -m pip install --quiet --editable ".[$EXTRAS]" || fail "the installation failed; see above"
  mkdir -p "$stamps"
  for name in "$usual" "$EXTRAS"; do printf '%s\n' "$wanted" >"$stamps/$name"; done
fi
