"""Pass pictures of any size through a tokenizer and write what comes out.

python tools/reconstruct.py --tokenizer runs/tokenizer_16384 --images photo.jpg --output reconstructions
python tools/reconstruct.py --tokenizer runs/tokenizer_16384 --images photos/*.jpg --size 1024 --tile 512 --output out
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ibq.api import load_tokenizer
from ibq.config import UserError, exit_on_user_error
from ibq.data.counts import PictureCount, reason_of
from ibq.data.index import IMAGE_SUFFIXES
from ibq.data.shards import pictures_below, problem_of_file
from ibq.data.transforms import decode_rgb, to_uint8, to_unit_range
from ibq.evaluation.reconstruction import SSIM_WINDOW, psnr, ssim
from ibq.files import whole_file
from ibq.models.tiling import reconstruct
from ibq.models.tokenizer import Tokenizer
from ibq.progress import progress_bar, say
from ibq.training.metrics import peak_memory_gib
from ibq.training.run import set_up_torch
from tools.lib.options import add_device_options, autocast_of, device_of

FORMATS = ("PNG", "JPEG", "WEBP")
SMALLEST_TILE = 16


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--tokenizer", required=True, help="run folder, its `best` folder, or a published file")
    add("--images", nargs="+", required=True, type=Path, metavar="FILE", help="PNG, JPEG or WebP, or folders of them")
    add("--output", required=True, type=Path, help="folder of the reconstructions, as PNG")
    add("--size", type=int, metavar="PIXELS", help="shrink or enlarge the shorter side to this first")
    add(
        "--tile",
        type=int,
        metavar="CELLS",
        help="work in tiles of so many pixels (and cells of the inner maps), for pictures too large for the device's "
        "memory; the result is the same up to rounding",
    )
    add("--spill", type=Path, metavar="FOLDER", help="with --tile: keep large inner maps in files there, not in memory")
    add("--compare", action="store_true", help="with --tile: also without tiles, and say how far apart they are")
    add_device_options(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Reconstruct as the command line says."""
    arguments = parse(argv)
    check(arguments)
    device = device_of(arguments)
    set_up_torch(training=False)
    files, pictures = list_files(arguments.images)
    tokenizer = load_tokenizer(arguments.tokenizer, device=device)
    if arguments.size is not None and arguments.size < tokenizer.downsampling:
        raise UserError(f"--size: a token is {tokenizer.downsampling} pixels wide; give at least so many")
    arguments.output.mkdir(parents=True, exist_ok=True)
    with progress_bar("reconstruct", len(files), "picture") as progress:
        for file in files:
            one(tokenizer, file, arguments)
            progress.update()
    say(f"{arguments.output}: {len(files)} pictures; peak memory {peak_memory_gib(device):.2f} GiB")
    say(str(pictures))


def check(arguments: argparse.Namespace) -> None:
    """UserError for impossible options."""
    if arguments.size is not None and arguments.size < SSIM_WINDOW:
        raise UserError(f"--size: must be at least {SSIM_WINDOW}, got {arguments.size}")
    if arguments.tile is not None and arguments.tile < SMALLEST_TILE:
        raise UserError(f"--tile: must be at least {SMALLEST_TILE}, got {arguments.tile}; 512 is a good start")
    for option in ("spill", "compare"):
        if getattr(arguments, option) and arguments.tile is None:
            raise UserError(f"--{option} is about tiles; give --tile too")
    if arguments.spill is not None and not arguments.spill.is_dir():
        raise UserError(f"--spill: {arguments.spill} is no folder; make it, on a disk with room")


def list_files(places: Sequence[Path]) -> tuple[list[Path], PictureCount]:
    """The pictures that are meant, and what became of all; UserError if there are none, or two for one name."""
    files, left_out = [], Counter()
    for place in places:
        inside = pictures_below(place) if place.is_dir() else []
        problems = [problem_of_file(path) for path in inside]
        left_out.update(reason_of(problem) for problem in problems if problem)
        chosen = [path for path, problem in zip(inside, problems, strict=True) if not problem]
        if not chosen and not place.is_file():
            kinds = ", ".join(sorted(IMAGE_SUFFIXES))
            raise UserError(f"{place}: no picture there; give files, or folders with {kinds} in them")
        files += chosen or [place]
    names = [file.stem for file in files]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"--images: two files are named {twice!r}, and would be written to the same {twice}.png")
    return files, PictureCount(len(files) + left_out.total(), left_out)


def one(tokenizer: Tokenizer, file: Path, arguments: argparse.Namespace) -> None:
    """Reconstruct a picture, write it, and print how near it is."""
    pixels = read(file, arguments.size)
    images = to_unit_range(pixels)
    started = time.perf_counter()
    with autocast_of(arguments):
        found, codes = reconstruct(tokenizer, images, arguments.tile, arguments.spill)
    seconds = time.perf_counter() - started
    result = to_uint8(found.float())
    write(arguments.output / f"{file.stem}.png", result)
    (rows, columns), (height, width) = codes.shape[1:], pixels.shape[2:]
    line = f"{file.name}: {width} x {height} px, {columns} x {rows} tokens, {codes.unique().numel()} codes, "
    line += f"{psnr(pixels, result).item():.2f} dB, SSIM {ssim(pixels, result).item():.4f}, {seconds:.1f} s"
    if arguments.compare:
        with autocast_of(arguments):
            whole, whole_codes = reconstruct(tokenizer, images)
        same = float((whole_codes == codes).double().mean())
        line += f"; tiles against the whole: {distance(found, whole):.1f} dB, {same:.2%} of the codes equal"
    print(line, flush=True)


def distance(one: Tensor, other: Tensor) -> float:
    """PSNR in dB of floating-point images of a range of 2; infinite for equal ones."""
    return float(-10 * ((one.double() - other.double()) / 2).square().mean().log10())


def read(file: Path, size: int | None) -> Tensor:
    """A picture as uint8 [1, 3, H, W]; UserError for what is none, or too small."""
    try:
        image = decode_rgb(file.read_bytes(), formats=FORMATS)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: {error}; give a PNG, JPEG or WebP file") from error
    if size is not None:
        scale = size / min(image.size)
        image = ImageOps.fit(image, tuple(max(round(side * scale), size) for side in image.size), Image.LANCZOS)
    if min(image.size) < SSIM_WINDOW:
        raise UserError(f"{file}: {image.width} x {image.height} pixels are too few; give --size")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(1, image.height, image.width, 3).permute(0, 3, 1, 2).contiguous()


def write(path: Path, image: Tensor) -> None:
    """Write uint8 [1, 3, H, W] as PNG."""
    with whole_file(path) as file:
        Image.fromarray(image[0].permute(1, 2, 0).contiguous().numpy()).save(file, "PNG")


if __name__ == "__main__":
    exit_on_user_error(main)
