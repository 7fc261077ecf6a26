"""How well images survive a tokenizer, and how well its codebook is used."""

import argparse
import math
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import yaml
from ibq import dist
from ibq.api import load_tokenizer
from ibq.config import UserError, dump_config, load_config
from ibq.data.buckets import bucketed, check_shapes
from ibq.data.counts import BESIDE, UNLABELLED, count, reason_of
from ibq.data.images import ImageDataset, Subset
from ibq.data.index import ImageIndex
from ibq.data.loader import by_shape, validation_batches
from ibq.data.shards import ImageDataConfig
from ibq.evaluation.features import RESIZING, Inception, load_inception, weights_at_hand
from ibq.evaluation.image_sets import PixelHash
from ibq.evaluation.reconstruction import BLOCK, MIN_TOKENS_PER_CODE, ReconstructionReport, evaluate_reconstruction
from ibq.files import whole_file
from ibq.models.perceptual import BACKBONES, build_lpips
from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import SMALLEST_IMAGE
from ibq.progress import bar_of, progress_bar, say
from ibq.training.checkpoint import weights_hash
from ibq.training.tokenizer_config import TokenizerRunConfig
from tools.lib.options import add_device_options, add_image_options, autocast_of, open_images_of, say_left_out

HELP = "PSNR, SSIM, LPIPS, rFID, codebook usage, perplexity and effective rank of a tokenizer"
PICTURES = 24  # that --npz gets
LPIPS_OPTIONS = {"vgg": "lpips", "alex": "lpips_alex"}  # backbone -> option and figure


def add_options(parser: argparse.ArgumentParser) -> None:
    """Of the command."""
    add = parser.add_argument
    add("--tokenizer", required=True, help="run folder, its `best` folder, or a published .ckpt file")
    add_image_options(parser)
    add(
        "--buckets",
        nargs="+",
        metavar="HxW",
        help="heights and widths, such as 256x256 192x320: each picture at that of the nearest aspect ratio; `run`: "
        "those of the tokenizer's run (default: squares)",
    )
    add_device_options(parser)
    for net, name in LPIPS_OPTIONS.items():
        add(
            f"--{name.replace('_', '-')}",
            default="auto",
            metavar="WEIGHTS",
            help=f"{BACKBONES[net].label} weights: download, a file, none, or auto: if they were downloaded before "
            "(default)",
        )
    add(
        "--inception",
        default="auto",
        metavar="WEIGHTS",
        help="for rFID: download, a file, none, or auto: if IBQ_INCEPTION_WEIGHTS names them or they were downloaded "
        "before (default)",
    )
    add("--npz", type=Path, help="write the first originals and reconstructions and the code histogram here")
    add(
        "--samples",
        type=Path,
        metavar="FILE.npz",
        help="write all reconstructions and their classes here, as tools/sample.py writes images: for `generation`",
    )


def run(arguments: argparse.Namespace, device: torch.device) -> dict:
    """Measure, print, and say what the figures depend on."""
    tokenizer = load_tokenizer(arguments.tokenizer, device=device)
    config = data_config(arguments, tokenizer)
    sides = [min(shape) for shape in config.buckets] or [tokenizer.config.resolution]
    perceptual = perceptual_of(arguments, device, min(sides))
    inception = inception_of(arguments, device)
    images = dist.main_first(lambda: open_images_of(arguments, config))
    samples = LabelledSamples(arguments.samples, classes_of(arguments, config)) if arguments.samples else None
    report, originals = reconstruct(tokenizer, perceptual, inception, images, config, arguments, device, samples)
    if not report.metrics["images"]:
        raise UserError(
            f"{arguments.images}: none of its images can be used, as the notes say; mend them, or give others"
        )
    if inception is not None and report.metrics["images"] < 2:
        raise UserError(f"{arguments.images}: rFID needs at least 2 images; add some, or use --inception none")
    pictures = count(images, used=int(report.metrics["images"]))
    if dist.is_main():
        show(report, inception)
        say(f"{arguments.images}: {pictures}")
        if arguments.npz:
            write_pictures(arguments.npz, report)
        if samples is not None:
            samples.write()
    return {
        "metrics": report.metrics,
        "codes_by_use": report.codes_by_use,
        "num_codes": tokenizer.quantizer.num_codes,
        "dim": tokenizer.quantizer.dim,
        "tokens_per_image": round(int(report.histogram.sum()) / report.metrics["images"], 2)
        if config.buckets
        else tokenizer.config.tokens_per_side**2,
        "tokenizer": arguments.tokenizer,
        "tokenizer_sha256": weights_hash(tokenizer.state_dict()),
        "config": yaml.safe_load(dump_config(tokenizer.config)),
        "images": arguments.images,
        "split": arguments.split,
        "precision": arguments.precision,
        "image_count": int(report.metrics["images"]),
        "pictures": {"images": pictures.to_json()},
        "seed": None,  # nothing is drawn
        "sampler": None,
        "protocol": protocol(tokenizer, config, perceptual, inception),
        "inputs": {
            "tokenizer_sha256": weights_hash(tokenizer.state_dict()),
            "images_sha256": originals,
            "inception_sha256": None if inception is None else inception.sha256,
            **{f"{name}_sha256": weights_hash(network.state_dict()) for name, network in perceptual.items()},
        },
    }


def data_config(arguments: argparse.Namespace, tokenizer: Tokenizer) -> ImageDataConfig:
    """Where the pictures are and which shapes they are brought to; UserError for impossible ones."""
    if arguments.samples and (arguments.buckets or dist.world_size() > 1):
        raise UserError("--samples: holds images of one shape, from one process; leave out --buckets and torchrun")
    if arguments.samples and arguments.samples.suffix != ".npz":
        raise UserError(f"--samples {arguments.samples}: give a name that ends in .npz")
    if arguments.buckets == ["run"]:
        shapes = _buckets_of_run(Path(arguments.tokenizer))
    else:
        found = [re.fullmatch(r"(\d+)x(\d+)", text) for text in arguments.buckets or ()]
        if None in found:
            raise UserError(
                f"--buckets: {arguments.buckets[found.index(None)]!r} is no height and width; give such as 192x320, or "
                "`run` alone"
            )
        shapes = tuple((int(match[1]), int(match[2])) for match in found)
    try:
        config = ImageDataConfig(train=arguments.images, labels=False, buckets=shapes)
        check_shapes(shapes, tokenizer.downsampling, SMALLEST_IMAGE)
    except ValueError as error:
        raise UserError(f"--{str(error).removeprefix('data.')}") from error
    return config


def classes_of(arguments: argparse.Namespace, config: ImageDataConfig) -> list[str]:
    """The names of the images' classes; UserError where an image has none: figures are of all images, labelled or not.

    So `verify` needs no --samples to come to the same ones.
    """
    images = open_images_of(arguments, replace(config, labels=True, max_bad_fraction=1.0))
    for number, reason in images.problems():
        if reason_of(reason) in (BESIDE, UNLABELLED):
            raise UserError(
                f"--samples: image {images.key(number)!r} has no class of its place: {reason}; leave it out"
            )
    return images.classes


def _buckets_of_run(folder: Path) -> tuple[tuple[int, int], ...]:
    for place in (folder, folder.parent):  # of a run's `best` folder, the run
        file = place / "config.yaml"
        if file.is_file() and "data" in (yaml.safe_load(file.read_text()) or ()):
            if buckets := load_config(TokenizerRunConfig, file).data.buckets:
                return buckets
            raise UserError(f"--buckets run: {file} has no data.buckets; name them, or leave the option out")
    raise UserError(f"--buckets run: {str(folder)!r} is no folder of a run; name the buckets, such as 192x320")


def perceptual_of(arguments: argparse.Namespace, device: torch.device, resolution: int) -> dict[str, nn.Module]:
    """The LPIPS networks that are asked for and can see such images, by the names of their figures."""
    found = {}
    for net, name in LPIPS_OPTIONS.items():
        wanted, option = getattr(arguments, name), f"--{name.replace('_', '-')}"
        backbone = BACKBONES[net]
        if wanted != "none" and resolution < backbone.smallest:
            lack = f"{backbone.label} sees nothing in images of {resolution} px, {backbone.smallest} px are the least"
            if wanted != "auto":
                raise UserError(f"{option}: {lack}; leave it out by {option} none")
            if dist.is_main():
                say(f"note: no LPIPS: {lack}")
            continue
        if wanted == "auto":
            wanted = "download" if backbone.cached.exists() else "none"
            if wanted == "none" and dist.is_main():
                say(f"note: no LPIPS over {backbone.label}: its weights are not here; {option} download fetches them")
        if wanted != "none":
            remedy = f"give a copy of {backbone.file} by {option} FILE, or leave it out by {option} none"
            found[name] = dist.main_first(
                lambda net=net, wanted=wanted, remedy=remedy: build_lpips(net, wanted, remedy=remedy)
            ).to(device)
    return found


def inception_of(arguments: argparse.Namespace, device: torch.device) -> Inception | None:
    """The network for rFID, or None."""
    wanted = arguments.inception
    if wanted == "auto" and not weights_at_hand():
        if dist.is_main():
            say("note: no rFID: Inception's weights are not here; --inception download fetches them")
        return None
    if wanted == "none":
        return None
    named = None if wanted in ("auto", "download") else wanted
    return dist.main_first(lambda: load_inception(named)).to(device)


def reconstruct(
    tokenizer: Tokenizer,
    perceptual: Mapping[str, nn.Module],
    inception: Inception | None,
    images: ImageIndex,
    config: ImageDataConfig,
    arguments: argparse.Namespace,
    device: torch.device,
    samples: "LabelledSamples | None",
) -> tuple[ReconstructionReport, str]:
    """Encode and decode all images, with a progress bar; also the hash of the originals."""
    size = tokenizer.config.resolution
    if config.buckets:
        bar = bar_of("sizes", "image", least=10_000, disable=not dist.is_main())
        size = dist.main_first(lambda: bucketed(images, config, bar))
    dataset = ImageDataset(images, size)
    batches = validation_batches(
        share_of(dataset, BLOCK, dist.rank(), dist.world_size()),
        arguments.batch_size,
        workers=arguments.workers,
        device=device,
        report=say_left_out,
    )
    digest = PixelHash()
    with (
        progress_bar("reconstruct", len(dataset), "image", disable=not dist.is_main()) as progress,
        autocast_of(arguments),
    ):
        report = evaluate_reconstruction(
            tokenizer,
            observed(batches, progress, digest, samples),
            perceptual=perceptual,
            inception=inception,
            keep=PICTURES,
            block=BLOCK,
            take=samples.add if samples is not None else None,
        )
    return report, digest.hexdigest()


def share_of(dataset: ImageDataset, block: int, rank: int, world_size: int) -> Subset:
    """A rank's blocks of the images: the same blocks, of one shape each, for every number of ranks."""
    alike = by_shape(dataset, range(len(dataset)))
    blocks = [numbers[start : start + block] for numbers in alike for start in range(0, len(numbers), block)]
    return Subset(dataset, [number for numbers in blocks[rank::world_size] for number in numbers])


class LabelledSamples:
    """Images of one shape in the order in which they come, and their classes; on disk until they are written."""

    def __init__(self, path: Path, classes: Sequence[str]):
        self.path, self.classes, self.labels = path, list(classes), []
        self._shape: tuple[int, ...] = ()
        self._pixels = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115 (closed with this object)

    def add(self, images: Tensor) -> None:
        """Take in uint8 [n, 3, H, W]."""
        pixels = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        self._shape = pixels.shape[1:]
        with self._explained():
            self._pixels.write(pixels.data)

    def write(self) -> None:
        """As ADM's form has it, which `NpzImages` reads, with the names of the classes."""
        with self._explained(), whole_file(self.path) as file:
            self._pixels.flush()
            pixels = np.memmap(self._pixels, np.uint8, mode="r", shape=(len(self.labels), *self._shape))
            np.savez(file, pixels, np.asarray(self.labels, np.int64), classes=np.asarray(self.classes, np.str_))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"--samples {self.path}: cannot be written ({error}); give another file") from error


def observed(
    batches: Iterable[tuple[Tensor, Tensor]], progress, digest: PixelHash, samples: LabelledSamples | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, which go into the hash; the bar moves on by the images of each when the next is asked for."""
    for images, labels in batches:
        digest.add(images)
        if samples is not None:
            samples.labels += labels.tolist()
        yield images, labels
        progress.update(len(images) * dist.world_size())


def show(report: ReconstructionReport, inception: Inception | None) -> None:
    """Print the figures."""
    if report.metrics["tokens_per_code"] < MIN_TOKENS_PER_CODE:
        say(
            f"note: {report.metrics['tokens_per_code']:.1f} tokens per code are few: with under "
            f"{MIN_TOKENS_PER_CODE} the usage says as much about the set's size as about the codebook"
        )
    for name, value in report.metrics.items():
        print(f"{name:20s} {value:12.4f}")
    if inception is not None:
        print(f"rfid is against these same {report.metrics['images']:,.0f} images; features: {inception.description}")
    print_histogram(report.codes_by_use)


def print_histogram(codes_by_use: dict[str, int]) -> None:
    """How many codes occur how often, with bars."""
    most = max(codes_by_use.values())
    print("codes that occur ... times:")
    for occurrences, codes in codes_by_use.items():
        print(f"{occurrences:>20s} {codes:12,d} {'#' * math.ceil(40 * codes / most)}")


def protocol(
    tokenizer: Tokenizer, config: ImageDataConfig, perceptual: Mapping[str, nn.Module], inception: Inception | None
) -> dict:
    """What the figures depend on besides the images."""
    found = {
        "image_size": [list(shape) for shape in config.buckets] or tokenizer.config.resolution,
        "images": "centre crop, resized; reconstructions clamped and truncated to 8 bits",
        "images_at_once": BLOCK,
        "lpips": dict.fromkeys(perceptual, "v0.1"),
    }
    if inception is not None:
        found["rfid"] = {
            "reference": "the originals themselves",
            "network": inception.description,
            "resizing": RESIZING,
        }
    return found


def write_pictures(path: Path, report: ReconstructionReport) -> None:
    """The first originals and reconstructions, and the code histogram."""
    with whole_file(path) as file:
        np.savez(
            file,
            originals=report.originals.numpy(),
            reconstructions=report.reconstructions.numpy(),
            histogram=report.histogram.numpy(),
        )
