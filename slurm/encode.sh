#!/bin/bash
#SBATCH --job-name=ibq-encode
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-gpu=12
#SBATCH --time=12:00:00
#SBATCH --signal=USR2@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.log
# Codes for the transformers: ten crops of every training image; --images and --output over these for another set.
source "${IBQ_CODE:-.}/slurm/job.sh"
ibq_run tools/encode_shards.py --tokenizer "$IBQ_TOKENIZER" --images "$IBQ_IMAGES_TRAIN" --output "$IBQ_CODES_TRAIN" \
    --ten-crop "$@"
