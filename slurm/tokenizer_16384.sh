#!/bin/bash
#SBATCH --job-name=ibq-tokenizer-16384
#SBATCH --nodes=4-8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-gpu=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR2@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.log
# The tokenizer of 16,384 codes: 64 GPUs or 32.
source "${IBQ_CODE:-.}/slurm/job.sh"
ibq_run ibq/train_tokenizer.py --config yaml/tokenizer_16384.yaml data.train="$IBQ_IMAGES_TRAIN" data.validation="$IBQ_IMAGES_VALIDATION" \
    loss.perceptual.weights="$IBQ_VGG_WEIGHTS" "$@"
