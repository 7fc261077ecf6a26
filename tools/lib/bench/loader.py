"""Images/s of the data loader, against decoding alone, webdataset's pipeline and torchvision's ImageFolder."""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ibq.data.codes import CodeDataset, CodesMeta, CodeStream, write_codes
from ibq.data.images import ImageDataset, ImageStream
from ibq.data.loader import training_batches
from ibq.data.order import Batching, StreamOrder
from ibq.data.shards import open_images
from ibq.data.transforms import decode_rgb, square
from ibq.progress import progress_bar
from tools.lib import ROOT

MAKE_SHARDS = ROOT / "tools/make_shards.py"
BATCH, CLASSES, SHARDS = 32, 10, 8
CODE_BATCH = 256
WIDTHS = (375, 500)  # of ImageNet's usual photographs
TOKENS, CODES, CODE_ROWS = 256, 16_384, 20_000


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this bench."""
    add = parser.add_argument
    add("--images", type=int, default=1_536, help="JPEG files of 500 x 375 pixels to make (default: %(default)s)")
    add("--size", type=int, default=256, help="side in pixels after resizing (default: %(default)s)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="decoding processes (default: one a core)")
    add("--repeats", type=int, default=5, help="rounds, in each of which everything is measured once")


def measure(arguments: argparse.Namespace) -> dict:
    """Every way once a round, in turn, so that a machine that slows down slows all of them; medians of images/s."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = make_images(folder / "folder", arguments.images)
        make_shards(folder, len(paths))
        make_codes(folder / "codes")
        ways = ways_of(folder, paths, arguments)
        rates: dict[str, list[float]] = {name: [] for name in ways}
        with progress_bar("loader", arguments.repeats * len(ways), "run") as progress:
            for _ in range(arguments.repeats):
                for name, way in ways.items():
                    rates[name].append(rate_of(way))
                    progress.update()
    return figures_of(rates, arguments)


def figures_of(rates: dict[str, list[float]], arguments: argparse.Namespace) -> dict:
    """Medians, and ratios that are medians over rounds of two figures of the same round."""

    def ratio(one: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(rates[one], rates[other], strict=True))

    return {
        "images_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "rounds": rates,
        "ratio": {
            "loader_to_decode_limit": ratio("ours", "decode_limit"),
            "loader_to_webdataset": ratio("ours", "webdataset"),
            "loader_to_image_folder": ratio("ours", "image_folder"),
            "codes_to_images": ratio("codes", "ours"),
        },
        "images": arguments.images,
        "size": arguments.size,
        "workers": arguments.workers,
        "repeats": arguments.repeats,
    }


def table(figures: dict) -> str:
    """The figures for people."""
    names = {
        "decode_limit": f"decode and resize alone, {figures['workers']} processes",
        "ours": "this loader",
        "webdataset": "webdataset's plain pipeline",
        "image_folder": "torchvision's ImageFolder and a DataLoader",
        "codes": f"code shards ({TOKENS} tokens an image)",
    }
    rates, ours = figures["images_per_second"], figures["images_per_second"]["ours"]
    lines = [f"{'':46s} {'images/s':>10s} {'this loader is':>15s}"]
    lines += [f"{text:46s} {rates[name]:10,.0f} {ours / rates[name]:14.2f}x" for name, text in names.items()]
    return "\n".join(lines)


# --- The images ---


def make_images(folder: Path, count: int) -> list[Path]:
    """JPEG files as large as photographs, with detail at all scales as these have."""
    paths = []
    for number in range(count):
        path = folder / f"class{number % CLASSES}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(number)
        picture = np.full((*WIDTHS, 3), 128.0)
        for side in (4, 16, 64):
            noise = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
            layer = noise.resize(WIDTHS[::-1], Image.Resampling.BICUBIC)
            picture += (np.asarray(layer, np.float64) - 128) / side**0.3
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        paths.append(path)
    return paths


def make_shards(folder: Path, count: int) -> None:
    """The same files as indexed tar shards."""
    options = ["--samples-per-shard", str(-(-count // SHARDS)), "--prefix", "train"]
    command = [sys.executable, str(MAKE_SHARDS), str(folder / "folder"), str(folder / "shards"), *options]
    subprocess.run(command, check=True, capture_output=True)


def make_codes(folder: Path) -> None:
    """Codes of as many tokens as an image of 256 pixels has."""
    rng = np.random.default_rng(0)
    meta = CodesMeta(num_codes=CODES, grid=(16, 16), classes=list(map(str, range(CLASSES))), tokenizer="none")
    write_codes(folder, rng.integers(0, CODES, (CODE_ROWS, TOKENS)), rng.integers(0, CLASSES, CODE_ROWS), meta)


# --- The ways to read them: each gives the number of images in each batch ---


Way = Callable[[], Iterable[int]]


def ways_of(folder: Path, paths: list[Path], arguments: argparse.Namespace) -> dict[str, Way]:
    """What is compared; all resize with the same function and give batches of uint8."""
    workers, size = arguments.workers, arguments.size
    return {
        "decode_limit": lambda: decode_limit([path.read_bytes() for path in paths], size, workers),
        "ours": lambda: our_loader(folder, size, workers),
        "webdataset": lambda: plain_webdataset(folder, size, workers),
        "image_folder": lambda: image_folder(folder / "folder", size, workers),
        "codes": lambda: our_codes(folder / "codes"),
    }


def rate_of(way: Way) -> float:
    """Images/s from the first batch on: starting the processes is not counted."""
    batches = iter(way())
    next(batches)
    start, images = time.perf_counter(), 0
    for count in batches:
        images += count
    return images / (time.perf_counter() - start)


def decode_limit(files: list[bytes], size: int, workers: int) -> Iterator[int]:
    """Processes that only decode and resize what is in their memory, and send nothing but how much they have done."""

    class Decoding(Dataset):
        def __getitem__(self, number: int) -> int:
            for data in files[number * BATCH : (number + 1) * BATCH]:
                square(decode_rgb(data), size)
            return BATCH

        def __len__(self) -> int:
            return len(files) // BATCH

    yield from DataLoader(Decoding(), batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None)


def our_loader(folder: Path, size: int, workers: int) -> Iterator[int]:
    """One epoch of this project's training batches."""
    index = open_images(str(folder / "shards/train-*.tar"))
    order = StreamOrder(index.unit_sizes(), seed=0, streams=192, window=2_048)
    batching = Batching(batch_size=BATCH, micro_batch=BATCH, streams=192)
    stream = ImageStream([ImageDataset(index, size)], order)
    device = torch.device("cpu")
    for micro_batches in training_batches(stream, batching, 0, len(index) // BATCH, workers=workers, device=device):
        yield sum(len(images) for images, _ in micro_batches)


def plain_webdataset(folder: Path, size: int, workers: int) -> Iterator[int]:
    """webdataset as its documentation has it: shuffled shards, a shuffle buffer, decoding, batches."""
    import webdataset

    shards = sorted(map(str, folder.glob("shards/train-*.tar")))
    dataset = (
        webdataset.WebDataset(shards, shardshuffle=len(shards), detshuffle=True, empty_check=False)
        .shuffle(1000)
        .to_tuple("jpg", "cls")
        .map_tuple(lambda data: _pixels(data, size), int)
        .batched(BATCH)
    )
    for images, _ in webdataset.WebLoader(dataset, batch_size=None, num_workers=workers):
        yield len(images)


def image_folder(folder: Path, size: int, workers: int) -> Iterator[int]:
    """torchvision's data set with PyTorch's DataLoader, shuffled."""
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(
        str(folder),
        transform=lambda image: torch.tensor(square(image, size)),
        loader=lambda path: decode_rgb(Path(path).read_bytes()),
    )
    for images, _ in DataLoader(dataset, batch_size=BATCH, shuffle=True, num_workers=workers, drop_last=True):
        yield len(images)


def our_codes(folder: Path) -> Iterator[int]:
    """Training batches of codes."""
    dataset = CodeDataset(folder)
    order = dataset.order(seed=0, streams=192)
    batching = Batching(batch_size=CODE_BATCH, micro_batch=CODE_BATCH, streams=192)
    steps = len(dataset) // CODE_BATCH
    device = torch.device("cpu")
    for micro_batches in training_batches(CodeStream([dataset], order), batching, 0, steps, workers=0, device=device):
        yield sum(len(codes) for codes, _ in micro_batches)


def _pixels(data: bytes, size: int) -> np.ndarray:
    return square(decode_rgb(data), size)
