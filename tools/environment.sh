# Sourced by the other scripts: the active environment, or else .venv, with this project installed in it.
# EXTRAS (such as "test") names the optional dependencies that are wanted.
if [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ]; then
  if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
      { echo "error: Python 3.11 or newer is needed; name one by PYTHON=/path/to/python" >&2; exit 2; }
    echo "making .venv"
    "${PYTHON:-python3}" -m venv .venv
  fi
  # shellcheck disable=SC1091
  source .venv/bin/activate
fi
# Installed again only when what is installed, or asked for, has changed.
stamp="$(python -c 'import sys; print(sys.prefix)')/.ibq-installed"
wanted="$(cat setup.cfg pyproject.toml; echo "${EXTRAS:-}"; pwd)"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  echo "installing the project (the first time this fetches PyTorch: a few minutes)"
  python -m pip install --quiet --editable ".${EXTRAS:+[$EXTRAS]}"
  printf '%s\n' "$wanted" >"$stamp"
fi
