"""How close generated images are to real ones, by ADM's protocol, and whether a classifier recognises them."""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ibq import dist
from ibq.config import UserError
from ibq.data.counts import PictureCount, count
from ibq.data.images import ImageDataset
from ibq.data.index import ImageIndex
from ibq.data.shards import open_images, open_split
from ibq.data.transforms import square
from ibq.evaluation.classifier import ClassifierConfig, LabelledImages, evaluate_with_classifier
from ibq.evaluation.features import load_inception
from ibq.evaluation.generation import GenerationReport, evaluate_generation, protocol
from ibq.evaluation.image_sets import ImageSet, NpzImages, PixelHash, open_set
from ibq.progress import progress_bar, say
from tools.lib.options import add_device_options, check_least, say_left_out

HELP = "FID, sFID, Inception Score, precision and recall of generated images; accuracy of a classifier on them"
HELD_OUT = 10  # every so many-th image is for the classifier's validation, where no other place is given
MOST_TRAINING = 50_000  # images that the classifier learns from
READ_AT_ONCE = 256
LABELS = {"fid": "FID", "sfid": "sFID", "precision": "precision", "recall": "recall"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Of the command."""
    add = parser.add_argument
    place = "an .npz file in ADM's form (arr_0 uint8 [N, H, W, 3]), a folder of images, or a glob of tar shards"
    add("--samples", required=True, help=f"generated images: {place}")
    add("--reference", nargs="+", default=[], help=f"real images: {place}; an .npz file may hold ADM's statistics")
    add("--size", type=int, help="folders and shards: crop and resize images to so many pixels")
    add(
        "--inception", metavar="WEIGHTS", help="file (default: IBQ_INCEPTION_WEIGHTS, or the published one, downloaded)"
    )
    add("--precision-recall", choices=["exact", "adm"], default="exact", help="adm: with ADM's rounding to float16")
    add("--batch-size", type=int, default=64, help="images that are read at once")
    add(
        "--classifier", metavar="PLACE", help="labelled real images (shards, a folder of class folders) to train one on"
    )
    add("--classifier-validation", metavar="PLACE", help="the same to test it on (default: every tenth of them)")
    add("--classifier-size", type=int, default=ClassifierConfig.size, help="pixels that it sees (default: %(default)s)")
    add("--classifier-steps", type=int, default=ClassifierConfig.steps, help="of its training (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the classifier")
    add_device_options(parser, precisions=("fp32",))


def run(arguments: argparse.Namespace, device: torch.device) -> dict:
    """Measure, print, and say what the figures depend on."""
    check(arguments)
    samples = open_set(arguments.samples, arguments.size)
    if samples.count == 0:
        raise UserError(f"{arguments.samples}: holds statistics, and no images to judge; give samples as images")
    if samples.count < 2 and arguments.reference:
        raise UserError(f"{arguments.samples}: one image is too few for statistics; give at least 2")
    made_by = metadata(samples)
    record: dict = {
        "metrics": {},
        "inputs": {"samples_sha256": samples.sha256()},
        "image_count": samples.count,
        "image_size": list(samples.size),
        "pictures": {},
        "samples": arguments.samples,
        "samples_made_by": made_by,
        "checkpoint": {name: made_by.get(name) for name in ("tokenizer", "transformer")},
        "sampler": made_by.get("sampler"),
        "seed": made_by.get("seed"),
        "precision": arguments.precision,
    }
    note_pictures(record, "samples", samples.place, PictureCount(samples.count))
    if arguments.reference:
        against_references(samples, arguments, device, record)
    if arguments.classifier:
        with_classifier(samples, arguments, device, record)
    return record


def note_pictures(record: dict, name: str, place: str, count: PictureCount) -> None:
    """Say what became of the pictures of a place, and put it into the record."""
    record["pictures"][name] = count.to_json()
    if dist.is_main():
        say(f"{place}: {count}")


def check(arguments: argparse.Namespace) -> None:
    """UserError for impossible options."""
    if not arguments.reference and not arguments.classifier:
        raise UserError("nothing to compare with: give --reference for FID and its relatives, or --classifier")
    check_least(arguments, size=1, batch_size=1, classifier_size=8, classifier_steps=1)
    if not 0 <= arguments.seed < 2**63:
        raise UserError(f"--seed must be from 0 to {2**63 - 1}, got {arguments.seed}")


def metadata(samples: ImageSet) -> dict:
    """What the JSON file beside the samples says of their making, as tools/sample.py writes it."""
    path = Path(samples.place)
    path = path.with_suffix(".json") if isinstance(samples, NpzImages) else path / "samples.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable JSON ({error}); write the samples again, or remove it") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: not what tools/sample.py writes; write the samples again, or remove it")
    if found.get("count", samples.count) != samples.count and dist.is_main():
        say(f"WARNING: {path} is about {found['count']} images, {samples.place} holds {samples.count}")
    return found


# --- Against references ---


def against_references(samples: ImageSet, arguments: argparse.Namespace, device: torch.device, record: dict) -> None:
    """FID and its relatives, into the record."""
    network = dist.main_first(lambda: load_inception(arguments.inception)).to(device)
    references = [open_set(place, arguments.size) for place in arguments.reference]
    report = evaluate_generation(
        network,
        samples,
        references,
        distances=arguments.precision_recall,
        batch_size=arguments.batch_size,
        progress=image_bar,
    )
    for reference in references:
        if reference.count:  # not of statistics alone
            note_pictures(record, f"reference {reference.place}", reference.place, PictureCount(reference.count))
    record["metrics"] |= report.metrics
    record["references"] = report.references
    record["protocol"] = protocol(network, arguments.precision_recall)
    record["inputs"] |= {f"reference {name}": facts["sha256"] for name, facts in report.references.items()}
    record["inputs"]["inception_sha256"] = network.sha256
    if dist.is_main():
        show(report, record["protocol"])


def show(report: GenerationReport, settings: Mapping) -> None:
    """Print the figures, each distance under its reference's name."""
    for note in report.notes:
        say(f"note: {note}")
    size = "{1} x {0}".format(*report.samples["image_size"])
    print(f"samples: {report.samples['place']}, {report.samples['images']:,} images of {size}")
    print(f"features: {settings['network']}; resizing: {settings['resizing']}")
    print(f"{'Inception Score':20s} {report.metrics['inception_score']:12.4f}")
    for name, facts in report.references.items():
        images = f"{facts['images']:,} images, " if facts["images"] else ""
        print(f"against {name} ({images}statistics {facts['statistics']}):")
        for key, value in report.metrics[name].items():
            print(f"{f'{LABELS[key]} vs {name}':50s} {value:12.4f}")


@contextmanager
def image_bar(title: str, images: int) -> Iterator[Callable[[int], None]]:
    """A progress bar; what is given is called with the number of further images."""
    with progress_bar(title, images, "image", disable=not dist.is_main()) as bar:
        yield lambda done: bar.update(min(done, bar.total - bar.n))


# --- By a classifier ---


def with_classifier(samples: ImageSet, arguments: argparse.Namespace, device: torch.device, record: dict) -> None:
    """Train a classifier on real images and show it the generated ones; rank 0 does it alone."""
    if not dist.is_main():
        return
    config = ClassifierConfig(size=arguments.classifier_size, steps=arguments.classifier_steps, seed=arguments.seed)
    labels = samples.labels()
    if labels is None:
        raise UserError(
            f"{arguments.samples}: does not say which classes were meant; give an .npz file with them in arr_1, as "
            "tools/sample.py writes"
        )
    if arguments.classifier_validation:
        sets = open_images(arguments.classifier), open_images(arguments.classifier_validation)
    else:
        sets = (open_split(arguments.classifier, split, HELD_OUT) for split in ("train", "validation"))
    train, validation = sets
    validation = with_classes_of(
        train, validation, f"--classifier-validation: classes are matched by name with {arguments.classifier}"
    )
    labels = as_numbered_in(train, samples, labels)
    classes = len(train.classes)
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        wrong = next(int(label) for label in labels if not 0 <= label < classes)
        raise UserError(
            f"{arguments.samples}: class {wrong} is none of the {classes} of {arguments.classifier}; give the real "
            "images of the same classes"
        )
    parts = []
    for name, index in (("classifier", train), ("classifier validation", validation)):
        images, found = real_images(index, config.size, device)
        place = name == "classifier" or not arguments.classifier_validation
        note_pictures(record, name, arguments.classifier if place else arguments.classifier_validation, found)
        parts.append(images)
    generated = LabelledImages(images=resized(samples, config.size).to(device), labels=labels.to(device))
    with progress_bar("classifier", config.steps, "step") as progress:
        metrics = evaluate_with_classifier(*parts, generated, classes, config, progress.update)
    record["metrics"]["classifier"] = metrics
    record["classifier"] = {"train": arguments.classifier, "validation": arguments.classifier_validation}
    record["classifier"] |= {"classes": list(train.classes), **vars(config)}
    for name, part in zip(("train", "validation"), parts, strict=True):
        digest = PixelHash()
        digest.add(part.images)
        record["inputs"][f"classifier_{name}_sha256"] = digest.hexdigest(own=True)
    show_classifier(metrics)


def as_numbered_in(train: ImageIndex, samples: ImageSet, labels: torch.Tensor) -> torch.Tensor:
    """The samples' classes by the numbers of the real images' classes, where their file has names; else as they are."""
    names = samples.class_names()
    if names is None or not 0 <= int(labels.min()) <= int(labels.max()) < len(names):
        return labels
    places = {name: number for number, name in enumerate(train.classes)}
    if missing := [names[number] for number in labels.unique() if names[number] not in places]:
        raise UserError(
            f"{samples.place}: class {missing[0]!r} is none of the classifier's; give real images of the same classes"
        )
    return torch.tensor([places.get(name, -1) for name in names])[labels]


def with_classes_of(train: ImageIndex, other: ImageIndex, what: str) -> ImageIndex:
    """`other` with its classes numbered as those of `train`; UserError, which names `what`, for a class it has not."""
    try:
        return other if other.classes == train.classes else other.numbered_as(train.classes)
    except ValueError as error:
        raise UserError(f"{what}, but {error}") from error


def real_images(index: ImageIndex, size: int, device: torch.device) -> tuple[LabelledImages, PictureCount]:
    """All images of a set, or evenly spaced ones of a large set; what can't be read is left out."""
    step = -(-len(index) // MOST_TRAINING)
    part = index.subset(range(0, len(index), step), f"passed over, as every {step}th is enough for the classifier")
    images, labels, bad = ImageDataset(part, size).batch(range(len(part)))
    say_left_out(bad)
    found = count(part, used=len(images))
    return LabelledImages(images=images.contiguous().to(device), labels=labels.to(device)), found


def resized(samples: ImageSet, size: int) -> torch.Tensor:
    """The generated images as the classifier sees the real ones: uint8 [N, 3, size, size]."""
    found = np.empty((samples.count, size, size, 3), np.uint8)
    number = 0
    for block in samples.blocks(READ_AT_ONCE):
        for image in block.permute(0, 2, 3, 1).contiguous().numpy():
            found[number] = square(Image.fromarray(image), size)
            number += 1
    return torch.from_numpy(found).permute(0, 3, 1, 2).contiguous()


def show_classifier(metrics: Mapping[str, float]) -> None:
    """Print what the classifier makes of the images."""
    print(f"classifier, trained on {metrics['train_images']:,} real images; chance is {metrics['chance']:.4f}")
    print(f"{'':20s} {'accuracy':>12s} {'balanced':>12s} {'pixel':>12s} {'feature':>12s}   distance to the nearest")
    for name in ("validation", "generated"):
        keys = ("accuracy", "balanced_accuracy", "nearest_pixel", "nearest_feature")
        print(f"{name:20s} " + " ".join(f"{metrics[f'{name}_{key}']:12.4f}" for key in keys) + "   training image")
