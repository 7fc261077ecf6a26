"""Train a small vision transformer on labelled images: frozen features for a discriminator, where DINO's do not fit.

python tools/train_features.py --images 'tests/data/emoji64/train-*.tar' --validation 'tests/data/emoji64/val-*.tar' \\
    --output runs/features/emoji.safetensors
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ibq.config import UserError, exit_on_user_error
from tools.lib.options import add_device_option, check_least, device_of

EPILOG = """\
It learns to tell the images' classes apart, and is written with the names of DINO's files. A tokenizer's discriminator
takes it by loss.gan.discriminator='{kind: features, backbone: {width: 96, ...}, weights: FILE}', of the same shape.
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--images", required=True, help="labelled images to train on: glob of tar shards, or a folder of class folders")
    add("--validation", required=True, metavar="IMAGES", help="others, to say how good the features are")
    add("--output", required=True, type=Path, metavar="FILE.safetensors", help="write the backbone here")
    for name, default in (("width", 96), ("depth", 4), ("heads", 3), ("patch", 4), ("side", 32)):
        add(f"--{name}", type=int, default=default, help="of the transformer (default: %(default)s)")
    add("--steps", type=int, default=200, help="of 128 images (default: %(default)s)")
    add("--learning-rate", type=float, default=1e-3, help="at its peak (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights and order (default: %(default)s)")
    add_device_option(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train a backbone as the command line says."""
    arguments = parse(argv)
    check_least(arguments, steps=1, seed=0)
    if arguments.output.suffix != ".safetensors":
        raise UserError(f"--output {arguments.output}: give a name that ends in .safetensors")
    device = device_of(arguments)
    from tools.lib.features import train  # reads PyTorch, for which --help should not wait

    train.run(arguments, device)


if __name__ == "__main__":
    exit_on_user_error(main)
