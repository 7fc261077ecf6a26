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

from ibq.api import load_tokenizer
from ibq.config import UserError, exit_on_user_error
from ibq.data.codes import CodesMeta, write_codes
from ibq.data.loader import validation_batches
from ibq.data.shards import ImageDataset, ImageIndex, to_unit_range
from ibq.data.transforms import AugmentConfig
from ibq.models.tokenizer import Tokenizer
from ibq.progress import progress_bar
from ibq.training.checkpoint import weights_hash
from ibq.training.run import set_up_torch
from tools.options import add_device_options, add_image_options, autocast_of, device_of, open_images_of


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="writes OUTPUT/codes.npy, labels.npy and meta.json"
    )
    add = parser.add_argument
    add("--tokenizer", required=True, help="run folder, its `best` folder, or a published .ckpt file")
    add_image_options(parser)
    add_device_options(parser)
    add("--output", required=True, type=Path, help="folder for the codes")
    add(
        "--views",
        type=int,
        default=1,
        help="views per image; the first is the centre crop, others are augmented",
    )
    add("--flip", action="store_true", help="mirror some of the augmented views")
    add("--max-zoom", type=float, default=1.1, help="how far the augmented views zoom in")
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Encode as the command line says."""
    arguments = parse(argv)
    if arguments.views < 1:
        raise UserError(f"--views must be at least 1, got {arguments.views}")
    set_up_torch(training=False)
    tokenizer = load_tokenizer(arguments.tokenizer, device=device_of(arguments))
    try:
        augment = AugmentConfig(flip=arguments.flip, max_zoom=arguments.max_zoom)
    except ValueError as error:
        raise UserError(f"--max-zoom: {error}") from error
    encode_images(tokenizer, open_images_of(arguments), augment, arguments)


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
                with autocast_of(arguments):
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
