#!/bin/bash
#SBATCH --job-name=ibq-sample
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-gpu=12
#SBATCH --time=04:00:00
#SBATCH --signal=USR2@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.log
# Samples, shared by all GPUs: sbatch slurm/sample.sh --transformer runs/ar_b --output samples_b --total 50000
source "${IBQ_CODE:-.}/slurm/job.sh"
ibq_run tools/sample.py --tokenizer "$IBQ_TOKENIZER" "$@"
