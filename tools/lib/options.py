"""Command-line options that several tools share."""

import argparse
from collections.abc import Sequence

import torch

from ibq.config import UserError
from ibq.data.index import ImageIndex
from ibq.data.shards import ImageDataConfig, open_split


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Which images, how many at once."""
    add = parser.add_argument
    add("--images", required=True, help="glob of tar shards, URLs with braces, or a folder of class folders")
    add("--split", choices=["all", "train", "validation"], default="all", help="part of the images")
    add("--validation-every", type=int, default=10, help="--split: every so many-th image is held out")
    add("--batch-size", type=int, default=32)
    add("--workers", type=int, default=2, help="processes that decode images; 0 decodes in this one")


def open_images_of(arguments: argparse.Namespace, config: ImageDataConfig | None = None) -> ImageIndex:
    """The images that the options name; UserError for impossible options."""
    for name, least in (("batch_size", 1), ("workers", 0), ("validation_every", 2)):
        if getattr(arguments, name) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(arguments, name)}")
    return open_split(arguments.images, arguments.split, arguments.validation_every, config)


def add_device_options(parser: argparse.ArgumentParser, precisions: Sequence[str] = ("fp32", "bf16")) -> None:
    """Where and in which precision."""
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if there is one")
    parser.add_argument(
        "--precision", choices=[*precisions], default="fp32", help="of the networks; the quantizer stays in fp32"
    )


def device_of(arguments: argparse.Namespace) -> torch.device:
    """The device that the options name; UserError if it is not there."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device; use --device cpu")
    name = arguments.device if arguments.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def autocast_of(arguments: argparse.Namespace) -> torch.autocast:
    """The precision that the options name, as a context."""
    return torch.autocast(device_of(arguments).type, torch.bfloat16, enabled=arguments.precision == "bf16")
