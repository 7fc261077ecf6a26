#!/bin/bash
#SBATCH --job-name=ibq-ar-2b
#SBATCH --nodes=6-12
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-gpu=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR2@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.log
# The 2.06B transformer: 96 GPUs, as in the paper; after a node has died, 48 (the batch of 768 divides over those).
source "${IBQ_CODE:-.}/slurm/job.sh"
ibq_run ibq/train_ar.py --config yaml/xxl.yaml data.train="$IBQ_CODES_TRAIN" data.validation="$IBQ_CODES_VALIDATION" "$@"
