# Sourced: the cluster's settings, modules and Python environment. IBQ_CODE is the copy of the code that the job runs.
IBQ_SITE="${IBQ_SITE:-${IBQ_CODE:-.}/slurm/site.env}"
ibq_fail() {
  echo "error: $1" >&2
  exit 2
}
[ -f "$IBQ_SITE" ] || ibq_fail "$IBQ_SITE does not exist; copy slurm/site.env there, or unset IBQ_SITE"
bash -n "$IBQ_SITE" || ibq_fail "$IBQ_SITE is no bash; mend the line that is named above"
case $- in *u*) ibq_unset=-u ;; *) ibq_unset=+u ;; esac
set +u # what a site, its modules and Python environments bring along is often not written for it
source "$IBQ_SITE"
if [ -n "${IBQ_MODULES:-}" ]; then
  type module >/dev/null 2>&1 || source /etc/profile
  module load $IBQ_MODULES || ibq_fail "$IBQ_SITE: IBQ_MODULES: '$IBQ_MODULES' cannot be loaded; see 'module avail'"
fi
if [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ]; then
  [ -f "${IBQ_VENV:-.venv}/bin/activate" ] ||
    ibq_fail "$IBQ_SITE: IBQ_VENV: there is no Python environment in '${IBQ_VENV:-.venv}'; 'source tools/lib/environment.sh' makes one in .venv"
  source "${IBQ_VENV:-.venv}/bin/activate"
fi
set $ibq_unset
export IBQ_PROJECT="$PWD"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_PER_GPU:-1}}}"
