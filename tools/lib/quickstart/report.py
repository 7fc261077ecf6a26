"""What the quickstart shows of its run: the figures, and the page."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ibq.data.codes import CodeDataset
from ibq.data.images import ImageDataset
from ibq.data.index import ImageIndex
from ibq.evaluation.code_models import bigram_nll, unigram_nll
from ibq.evaluation.reconstruction import CodeUsage, thumbnail
from ibq.reports.page import ReportData, write_report

TOKENIZER_CURVES = {
    "training L1": "loss/l1",
    "quantization loss": "quantizer/quantization",
    "discriminator loss": "gan/discriminator",
    "validation PSNR": "validation/psnr",
    "codebook usage": "codebook/usage",
}
TRANSFORMER_CURVES = {"training NLL": "loss/total", "validation NLL": "validation/nll"}


def collect_metrics(output: Path) -> dict:
    """The figures of a run, from the files that its parts wrote."""
    reconstruction = json.loads((output / "reconstruction.json").read_text())
    figures = reconstruction["metrics"]
    usage = code_usage(output).figures()
    return {
        "reconstruction": {name: figures[name] for name in ("psnr", "thumbnail_psnr", "ssim", "l1", "images")},
        "codebook": {
            "num_codes": reconstruction["num_codes"],
            "dim": reconstruction["dim"],
            "usage": usage["usage"],
            "perplexity": usage["perplexity"],
            "effective_rank": figures["effective_rank"],
        },
        "tokens_per_image": reconstruction["tokens_per_image"],
        "ar": code_nlls(output),
        **judgement(output),
    }


def judgement(output: Path) -> dict:
    """What the classifier made of the samples, where there was one."""
    path = output / "generation.json"
    if not path.exists():
        return {}
    figures = json.loads(path.read_text())["metrics"]["classifier"]
    names = ("accuracy", "nearest_pixel")
    return {"classifier": {name: value for name, value in figures.items() if name.endswith(names) or name == "chance"}}


def plain_codes(output: Path) -> np.ndarray:
    """Codes [N, T] of all training and validation images, each image once."""
    train, validation = (CodeDataset(output / "codes" / split) for split in ("train", "validation"))
    images = len(train) // train.meta.views
    return np.concatenate([train.codes(slice(images)), validation.codes()])  # the first view is the image itself


def code_usage(output: Path) -> CodeUsage:
    """How often each code occurs over training and validation images."""
    usage = CodeUsage(CodeDataset(output / "codes" / "train").meta.num_codes)
    usage.add(torch.from_numpy(plain_codes(output).astype(np.int64)))
    return usage


def code_nlls(output: Path) -> dict[str, float]:
    """The transformer's validation NLL and what simple models of the same codes reach, in nats a token."""
    train, validation = (CodeDataset(output / "codes" / split) for split in ("train", "validation"))
    meta = train.meta
    best = json.loads((output / "transformer" / "best" / "info.json").read_text())
    return {
        "val_nll": best["metrics"]["nll"],
        "unigram_nll": unigram_nll(plain_codes(output), meta.num_codes),
        "bigram_nll": bigram_nll(train.codes(), validation.codes(), meta.num_codes, meta.grid[1]),
    }


def write_page(output: Path, metrics: dict, training: ImageIndex) -> None:
    """Write `report.html`; `training` holds the training images."""
    pictures = np.load(output / "reconstruction.npz")
    originals = torch.from_numpy(pictures["originals"])
    samples = np.load(output / "samples" / "samples.npz")
    images, labels = torch.from_numpy(samples["arr_0"]).permute(0, 3, 1, 2), samples["arr_1"]
    neighbours = nearest_images(images, training)
    per_class = {int(label): torch.from_numpy(np.flatnonzero(labels == label)) for label in np.unique(labels)}
    data = ReportData(
        title="From a folder of images to generated images",
        subtitle=subtitle(metrics, len(training)),
        metrics=metrics,
        originals=originals,
        reconstructions=torch.from_numpy(pictures["reconstructions"]),
        thumbnails=thumbnail(originals, CodeDataset(output / "codes" / "train").meta.grid[0]),
        classes=training.classes,
        samples={label: images[numbers] for label, numbers in per_class.items()},
        nearest={label: neighbours[numbers] for label, numbers in per_class.items()},
        tokenizer_curves=curves(output / "tokenizer", TOKENIZER_CURVES),
        transformer_curves=curves(output / "transformer", TRANSFORMER_CURVES),
        reference_lines={"unigram": metrics["ar"]["unigram_nll"], "bigram": metrics["ar"]["bigram_nll"]},
        histogram=code_usage(output).counts,
        commands=next_commands(output),
    )
    write_report(output / "report.html", data)


def subtitle(metrics: dict, images: int) -> str:
    """What was trained on what, where, how long, and what was left out."""
    machine, steps = metrics["machine"], metrics["steps"]
    text = f"IBQ tokenizer and autoregressive transformer, {images:,} training images; {steps['tokenizer']:,} and "
    text += f"{steps['transformer']:,} steps on {machine['processor']} ({machine['instructions']}, "
    text += f"{machine['precision']})."
    left_out = "; ".join(f"{what}: {why}" for what, why in metrics["left_out"].items())
    return f"{text} Left out: {left_out}." if left_out else text


def curves(run: Path, names: dict[str, str]) -> dict[str, list[tuple[int, float]]]:
    """Series of a run's metrics.jsonl, by the names for the chart."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {shown: [(line["step"], line[key]) for line in lines if key in line] for shown, key in names.items()}
    return {shown: series for shown, series in found.items() if series}


def nearest_images(images: Tensor, index: ImageIndex) -> Tensor:
    """The training image with the smallest pixel distance to each of the images: uint8, of the same shape."""
    dataset = ImageDataset(index, images.shape[-1])
    training = torch.stack([dataset[i][0] for i in range(len(dataset))])
    distances = torch.cdist(images.flatten(1).float(), training.flatten(1).float())
    return training[distances.argmin(dim=1)]


def next_commands(output: Path) -> list[tuple[str, str]]:
    """What to try next."""
    models = f"--tokenizer {output / 'tokenizer'} --transformer {output / 'transformer'}"
    cluster = (
        "torchrun --nproc-per-node 8 ibq/train_tokenizer.py --config yaml/tokenizer_16384.yaml "
        "data.train='shards/train-*.tar'"
    )
    return [
        ("More images of one class", f"python tools/sample.py {models} --classes 3 --count 32 --output samples"),
        ("Your own images, one folder a class", "bash tools/quickstart.sh --data my_images --output runs/mine"),
        ("Curves in TensorBoard", f"tensorboard --logdir {output}"),
        ("The paper's tokenizer, on a cluster", cluster),
    ]
