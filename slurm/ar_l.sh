#!/bin/bash
#SBATCH --job-name=ibq-ar-l
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-gpu=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR2@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.log
# The 650M transformer: 32 GPUs.
source "${IBQ_CODE:-.}/slurm/job.sh"
ibq_run ibq/train_ar.py --config yaml/l.yaml data.train="$IBQ_CODES_TRAIN" data.validation="$IBQ_CODES_VALIDATION" "$@"
