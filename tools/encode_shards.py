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
from tqdm import tqdm

from ibq.api import load_tokenizer
from ibq.config import UserError, exit_on_user_error
from ibq.data.codes import CodesMeta, write_codes
from ibq.data.loader import validation_batches
from ibq.data.shards import ImageDataset, ImageIndex, open_images, to_unit_range
from ibq.data.transforms import AugmentConfig
from ibq.models.tokenizer import Tokenizer
from ibq.training.checkpoint import weights_hash
from ibq.training.run import set_up_torch


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="writes OUTPUT/codes.npy, labels.npy and meta.json"
    )
    parser.add_argument("--tokenizer", required=True, help="run folder, its `best` folder, or a published .ckpt file")
    parser.add_argument("--images", required=True, help="glob of tar shards, or a folder of class folders")
    parser.add_argument("--output", required=True, type=Path, help="folder for the codes")
    parser.add_argument("--views", type=int, default=1, help="augmented views per image; the first is the centre crop")
    parser.add_argument("--flip", action="store_true", help="mirror some of the further views")
    parser.add_argument("--max-zoom", type=float, default=1.1, help="how far the further views zoom in")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
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
    encode_images(tokenizer, open_images(arguments.images), arguments.output, arguments, augment)


def encode_images(
    tokenizer: Tokenizer, index: ImageIndex, output: Path, arguments: argparse.Namespace, augment: AugmentConfig
) -> None:
    """Write the codes of all images, every view in turn, to `output`."""
    size, batch_size = tokenizer.config.resolution, arguments.batch_size
    device = next(tokenizer.parameters()).device
    codes, labels = [], []
    total = arguments.views * math.ceil(len(index) / batch_size)
    with tqdm(total=total, desc=f"encode {output.name}", unit="batch", mininterval=0.5) as progress:
        for number in range(arguments.views):
            dataset = ImageDataset(
                index, size, augment=augment if number else None, seed=arguments.seed + number
            )
            for images, classes in validation_batches(
                dataset, batch_size, workers=arguments.workers, device=device
            ):
                codes.append(tokenizer.encode(to_unit_range(images)).flatten(1).cpu().numpy())
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
    torch.manual_seed(0)
    exit_on_user_error(main)
