#!/bin/bash
#SBATCH --job-name=ibq-sample
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-gpu=12
#SBATCH --time=04:00:00
#SBATCH --signal=USR2@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.log
# Samples: sbatch slurm/sample.sh --transformer runs/ar_b --output samples --count 4
source "${IBQ_CODE:-.}/slurm/job.sh"
ibq_run tools/sample.py --tokenizer "$IBQ_TOKENIZER" "$@"
