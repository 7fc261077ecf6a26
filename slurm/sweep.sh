#!/bin/bash
#SBATCH --job-name=ibq-sweep
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-gpu=12
#SBATCH --time=12:00:00
#SBATCH --signal=USR2@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%A_%a.log
# One run of a sweep for each task of an array; launchers/sweep.py --executor slurm submits it.
source "${IBQ_CODE:-.}/slurm/job.sh"
[ -n "${SLURM_JOB_ID:-}" ] || exec python launchers/sweep.py --executor slurm "$@"
ibq_run launchers/sweep.py --element "${SLURM_ARRAY_TASK_ID:-}" "$@"
