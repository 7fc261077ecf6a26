# Sourced by the scripts beside it, which then call `ibq_run SCRIPT ARGUMENTS`. In a job (`sbatch slurm/ar_b.sh`) that runs
# a script of the project with one task per GPU, see launchers/job.py. Outside of Slurm (`bash slurm/ar_b.sh`) it checks
# everything, copies the code, and submits the script.
set -uo pipefail
[ -f slurm/job.sh ] || { echo "error: $PWD is not the project's folder; start this from there" >&2; exit 2; }
ibq_arguments=("$@")
if [ -n "${SLURM_JOB_ID:-}" ] && [ -z "${IBQ_CODE:-}" ]; then
  # `sbatch` copies nothing but this script: the code is copied at the job's first start, for all the later ones.
  source slurm/setup.sh
  ibq_kept="slurm/logs/code-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}"
  if [ ! -s "$ibq_kept" ]; then
    python launchers/lib/snapshot.py --job "$SLURM_JOB_ID" >"$ibq_kept.$SLURM_JOB_ID" || exit 2
    mv "$ibq_kept.$SLURM_JOB_ID" "$ibq_kept"
  fi
  IBQ_CODE="$(cat "$ibq_kept")"
  export IBQ_CODE
fi
source "${IBQ_CODE:-.}/slurm/setup.sh"

ibq_run() {
  if [ -z "${SLURM_JOB_ID:-}" ]; then
    exec python launchers/lib/submit.py "$0" "${ibq_arguments[@]}" -- "$@"
  fi
  # A save that takes longer than the lead of Slurm's warning is said in the log.
  while read -r ibq_line; do
    [[ "$ibq_line" =~ ^#SBATCH\ --signal=[^@]*@([0-9]+) ]] && export IBQ_WARNING_S="${BASH_REMATCH[1]}"
  done <"$0"
  exec python -u "$IBQ_CODE/launchers/job.py" -- "$@"
}
