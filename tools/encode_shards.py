"""Turn images into codes with a trained tokenizer, once, for the transformer to train on.

python tools/encode_shards.py --tokenizer runs/tokenizer --images 'shards/train-*.tar' --output codes/train
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch

from ibq.api import load_tokenizer
from ibq.config import UserError, exit_on_user_error
from ibq.data.codes import CodesMeta, write_codes
from ibq.data.loader import validation_batches
from ibq.data.shards import ImageDataset, ImageIndex, open_split, to_unit_range
from ibq.data.transforms import AugmentConfig
from ibq.models.tokenizer import Tokenizer
from ibq.progress import progress_bar
from ibq.training.checkpoint import weights_hash
from ibq.training.run import set_up_torch


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="writes OUTPUT/codes.npy, labels.npy and meta.json"
    )
    add = parser.add_argument
    add("--tokenizer", required=True, help="run folder, its `best` folder, or a published .ckpt file")
    add("--images", required=True, help="glob of tar shards, or a folder of class folders")
    add("--split", choices=["all", "train", "validation"], default="all", help="part of the images")
    add("--validation-every", type=int, default=10, help="--split: every so many-th image is held out")
    add("--output", required=True, type=Path, help="folder for the codes")
    add(
        "--views",
        type=int,
        default=1,
        help="views per image; the first is the centre crop, others are augmented",
    )
    add("--flip", action="store_true", help="mirror some of the augmented views")
    add("--max-zoom", type=float, default=1.1, help="how far the augmented views zoom in")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="of the encoder; the quantizer stays in fp32")
    add("--batch-size", type=int, default=32)
    add("--workers", type=int, default=2)
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Encode as the command line says."""
    arguments = parse(argv)
    if arguments.views < 1 or arguments.batch_size < 1:
        raise UserError("--views and --batch-size must be at least 1")
    set_up_torch()
    tokenizer = load_tokenizer(arguments.tokenizer)
    try:
        augment = AugmentConfig(flip=arguments.flip, max_zoom=arguments.max_zoom)
    except ValueError as error:
        raise UserError(f"--max-zoom: {error}") from error
    index = open_split(arguments.images, arguments.split, arguments.validation_every)
    encode_images(tokenizer, index, augment, arguments)


def encode_images(
    tokenizer: Tokenizer, index: ImageIndex, augment: AugmentConfig, arguments: argparse.Namespace
) -> None:
    """Write the codes of all images, one view after the other, to the output folder."""
    output, batch_size = arguments.output, arguments.batch_size
    device = next(tokenizer.parameters()).device
    codes, labels = [], []
    total = arguments.views * math.ceil(len(index) / batch_size)
    with progress_bar(f"encode {output.name}", total, "batch") as progress:
        for number in range(arguments.views):
            dataset = ImageDataset(
                index,
                tokenizer.config.resolution,
                augment=augment if number else None,
                seed=arguments.seed + number,
            )
            for images, classes in validation_batches(dataset, batch_size, workers=arguments.workers, device=device):
                with torch.autocast(device.type, torch.bfloat16, enabled=arguments.precision == "bf16"):
                    batch = tokenizer.encode(to_unit_range(images))
                codes.append(batch.flatten(1).cpu().numpy())
                labels.append(classes.cpu().numpy())
                progress.update()
    meta = CodesMeta(
        num_codes=tokenizer.quantizer.num_codes,
        tokens_per_side=tokenizer.config.tokens_per_side,
        classes=index.classes,
        tokenizer=weights_hash(tokenizer.state_dict()),
        views=arguments.views,
    )
    write_codes(output, np.concatenate(codes), np.concatenate(labels), meta)


if __name__ == "__main__":
    exit_on_user_error(main)
