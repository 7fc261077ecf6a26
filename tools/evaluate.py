"""Measure a trained model.

python tools/evaluate.py reconstruction --tokenizer runs/tokenizer --images 'shards/val-*.tar' --json figures.json
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch
from torch import Tensor

from ibq.api import load_tokenizer
from ibq.config import exit_on_user_error
from ibq.data.images import BadSample, ImageDataset
from ibq.data.loader import validation_batches
from ibq.evaluation.reconstruction import MIN_TOKENS_PER_CODE, ReconstructionReport, evaluate_reconstruction
from ibq.files import write_text
from ibq.models.perceptual import PerceptualConfig, build_perceptual, vgg_was_downloaded
from ibq.models.tokenizer import Tokenizer
from ibq.progress import progress_bar, say
from ibq.training.checkpoint import weights_hash
from ibq.training.run import set_up_torch
from tools.options import add_device_options, add_image_options, autocast_of, device_of, open_images_of


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "reconstruction",
        help="PSNR, SSIM, LPIPS, codebook usage, perplexity and effective rank of a tokenizer",
    )
    add = command.add_argument
    add("--tokenizer", required=True, help="run folder, its `best` folder, or a published .ckpt file")
    add_image_options(command)
    add_device_options(command)
    add(
        "--lpips",
        default="auto",
        metavar="WEIGHTS",
        help="VGG-16 weights: download, a file, none, or auto: if they were downloaded before (default)",
    )
    add("--json", type=Path, help="write the figures here")
    add("--npz", type=Path, help="write the first originals and reconstructions and the code histogram here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate as the command line says."""
    arguments = parse(argv)
    set_up_torch(training=False)
    perceptual = perceptual_of(arguments)
    tokenizer = load_tokenizer(arguments.tokenizer, device=device_of(arguments))
    report = reconstruct(tokenizer, perceptual, arguments)
    if report.metrics["tokens_per_code"] < MIN_TOKENS_PER_CODE:
        say(
            f"note: {report.metrics['tokens_per_code']:.1f} tokens per code are few: with under "
            f"{MIN_TOKENS_PER_CODE} the usage says as much about the set's size as about the codebook"
        )
    for name, value in report.metrics.items():
        print(f"{name:20s} {value:12.4f}")
    print_histogram(report.codes_by_use)
    write_results(tokenizer, report, arguments)


def perceptual_of(arguments: argparse.Namespace) -> torch.nn.Module | None:
    """LPIPS on the chosen device, or None."""
    wanted = arguments.lpips
    if wanted == "auto":
        wanted = "download" if vgg_was_downloaded() else "none"
        if wanted == "none":
            say("note: no LPIPS, as its VGG-16 weights are not here; --lpips download fetches them")
    if wanted == "none":
        return None
    return build_perceptual(PerceptualConfig(weights=wanted)).to(device_of(arguments))


def reconstruct(tokenizer: Tokenizer, perceptual, arguments: argparse.Namespace) -> ReconstructionReport:
    """Encode and decode all images, with a progress bar."""
    dataset = ImageDataset(open_images_of(arguments), tokenizer.config.resolution)
    batches = validation_batches(
        dataset, arguments.batch_size, workers=arguments.workers, device=device_of(arguments), report=say_left_out
    )
    with progress_bar("reconstruct", len(dataset), "image") as progress, autocast_of(arguments):
        return evaluate_reconstruction(tokenizer, advancing(batches, progress), perceptual=perceptual, keep=24)


def say_left_out(samples: Sequence[BadSample]) -> None:
    """Name the images that the figures are without."""
    for sample in samples:
        say(f"note: left out: shard {sample.shard}, image {sample.key!r}: {sample.reason}")


def advancing(batches: Iterable[tuple[Tensor, Tensor]], progress) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches; the bar moves on by the images of each when the next is asked for."""
    for images, labels in batches:
        yield images, labels
        progress.update(len(images))


def print_histogram(codes_by_use: dict[str, int]) -> None:
    """How many codes occur how often, with bars."""
    most = max(codes_by_use.values())
    print("codes that occur ... times:")
    for occurrences, codes in codes_by_use.items():
        print(f"{occurrences:>20s} {codes:12,d} {'#' * math.ceil(40 * codes / most)}")


def write_results(tokenizer: Tokenizer, report: ReconstructionReport, arguments: argparse.Namespace) -> None:
    """Write the files that were asked for."""
    figures = {
        "metrics": report.metrics,
        "codes_by_use": report.codes_by_use,
        "num_codes": tokenizer.quantizer.num_codes,
        "dim": tokenizer.quantizer.dim,
        "tokens_per_image": tokenizer.config.tokens_per_side**2,
        "tokenizer": arguments.tokenizer,
        "tokenizer_sha256": weights_hash(tokenizer.state_dict()),
        "images": arguments.images,
        "split": arguments.split,
        "precision": arguments.precision,
    }
    if arguments.json:
        write_text(arguments.json, json.dumps(figures, indent=1))
    if arguments.npz:
        arguments.npz.parent.mkdir(parents=True, exist_ok=True)
        np.savez(
            arguments.npz,
            originals=report.originals.numpy(),
            reconstructions=report.reconstructions.numpy(),
            histogram=report.histogram.numpy(),
        )


if __name__ == "__main__":
    exit_on_user_error(main)
