"""Write scikit-learn's handwritten digits as tar shards: 1,797 pictures in 10 classes, without any download.

python -m pip install -e '.[digits]'   # adds scikit-learn
python tools/digits.py runs/digits     # train-00000.tar, val-00000.tar and classes.json
"""

import argparse
import io
import json
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from PIL import Image

from ibq.config import UserError, exit_on_user_error
from ibq.data.shards import CLASSES_FILE
from ibq.extras import install
from ibq.files import whole_file, write_text
from tools.lib.options import check_least

VALIDATION_EVERY = 5  # every so many-th picture: no set of neighbours, who may be of one hand
BRIGHTEST = 16  # of the 8 x 8 counts of ink in the UCI repository's "Optical Recognition of Handwritten Digits"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder")
    parser.add_argument("--size", type=int, default=32, help="pixels of a side (default: %(default)s)")
    arguments = parser.parse_args(argv)
    check_least(arguments, size=8)
    return arguments


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Values 0 to 16 [N, 8, 8] and labels [N]; UserError without scikit-learn."""
    try:
        from sklearn.datasets import load_digits  # slow to import: --help should not wait for it
    except ImportError as error:
        raise UserError(f"the digits come with scikit-learn: {install('digits')} ({error})") from error
    found = load_digits()
    return found.images, found.target


def picture(values: np.ndarray, size: int) -> bytes:
    """PNG of values 0 to 16 [8, 8], enlarged."""
    grey = Image.fromarray((values * (255 / BRIGHTEST)).round().astype(np.uint8))
    data = io.BytesIO()
    grey.resize((size, size), Image.Resampling.BICUBIC).convert("RGB").save(data, "PNG")
    return data.getvalue()


def write_shard(path: Path, images: np.ndarray, labels: np.ndarray, size: int) -> None:
    """KEY.png and KEY.cls of every picture."""
    with whole_file(path) as file, tarfile.open(fileobj=file, mode="w") as tar:
        for number, (values, label) in enumerate(zip(images, labels, strict=True)):
            for suffix, data in (("png", picture(values, size)), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{number:05d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def main(argv: Sequence[str] | None = None) -> None:
    """Write them as the command line says."""
    arguments = parse(argv)
    images, labels = digits()
    held_out = np.arange(len(images)) % VALIDATION_EVERY == VALIDATION_EVERY - 1
    for name, part in (("train", ~held_out), ("val", held_out)):
        write_shard(arguments.output / f"{name}-00000.tar", images[part], labels[part], arguments.size)
        print(f"{part.sum():,} pictures in {arguments.output / name}-00000.tar")
    write_text(arguments.output / CLASSES_FILE, json.dumps([str(digit) for digit in range(10)]) + "\n")


if __name__ == "__main__":
    exit_on_user_error(main)
