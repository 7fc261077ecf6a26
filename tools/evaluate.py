"""Measure a trained model.

python tools/evaluate.py reconstruction --tokenizer runs/tokenizer --images 'shards/val-*.tar' --json figures.json
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np

from ibq.api import load_tokenizer
from ibq.config import UserError, exit_on_user_error
from ibq.data.loader import validation_batches
from ibq.data.shards import ImageDataset, open_split
from ibq.evaluation.reconstruction import MIN_TOKENS_PER_CODE, evaluate_reconstruction
from ibq.models.perceptual import PerceptualConfig, build_perceptual
from ibq.progress import say
from ibq.training.checkpoint import weights_hash, write_text
from ibq.training.run import set_up_torch


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
    add("--images", required=True, help="glob of tar shards, or a folder of class folders")
    add("--split", choices=["all", "train", "validation"], default="all", help="part of the images")
    add("--validation-every", type=int, default=10, help="--split: every so many-th image is held out")
    add("--lpips", default="none", metavar="WEIGHTS", help="none, download, or a file of VGG-16 weights")
    add("--batch-size", type=int, default=32)
    add("--workers", type=int, default=2)
    add("--json", type=Path, help="write the figures here")
    add("--npz", type=Path, help="write the first originals and reconstructions and the code histogram here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate as the command line says."""
    arguments = parse(argv)
    if arguments.batch_size < 1:
        raise UserError("--batch-size must be at least 1")
    set_up_torch()
    perceptual = None
    if arguments.lpips != "none":
        perceptual = build_perceptual(PerceptualConfig(weights=arguments.lpips))
    tokenizer = load_tokenizer(arguments.tokenizer)
    device = next(tokenizer.parameters()).device
    index = open_split(arguments.images, arguments.split, arguments.validation_every)
    dataset = ImageDataset(index, tokenizer.config.resolution)
    report = evaluate_reconstruction(
        tokenizer,
        validation_batches(dataset, arguments.batch_size, workers=arguments.workers, device=device),
        perceptual=None if perceptual is None else perceptual.to(device),
        keep=24,
    )
    if report.metrics["tokens_per_code"] < MIN_TOKENS_PER_CODE:
        say(
            f"note: {report.metrics['tokens_per_code']:.1f} tokens per code are few: with under "
            f"{MIN_TOKENS_PER_CODE} the usage says as much about the set's size as about the codebook"
        )
    figures = {
        "metrics": report.metrics,
        "num_codes": tokenizer.quantizer.num_codes,
        "dim": tokenizer.quantizer.dim,
        "tokens_per_image": tokenizer.config.tokens_per_side**2,
        "tokenizer": arguments.tokenizer,
        "tokenizer_sha256": weights_hash(tokenizer.state_dict()),
        "images": arguments.images,
        "split": arguments.split,
    }
    for name, value in report.metrics.items():
        print(f"{name:20s} {value:12.4f}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_text(arguments.json, json.dumps(figures, indent=1))
    if arguments.npz:
        np.savez(
            arguments.npz,
            originals=report.originals.numpy(),
            reconstructions=report.reconstructions.numpy(),
            histogram=report.histogram.numpy(),
        )


if __name__ == "__main__":
    exit_on_user_error(main)
