"""From a folder of images to generated images: tokenizer, codes, transformer, samples and a report.

Run by tools/quickstart.sh. Every part is one of the project's own commands, printed before it runs. The number of
training steps is fitted to the machine's measured speed, so that the whole takes about --minutes; a second call goes
on where the first was interrupted.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import numpy as np
import torch
from torch import Tensor

from ibq.config import UserError, exit_on_user_error
from ibq.data.codes import CodeDataset
from ibq.data.shards import ImageDataset, ImageIndex, open_images, open_split
from ibq.evaluation.code_models import bigram_nll, unigram_nll
from ibq.evaluation.reconstruction import CodeUsage, thumbnail
from ibq.evaluation.report import ReportData, write_report
from ibq.training.checkpoint import write_text

EMOJI = ("tests/data/emoji64/train-*.tar", "tests/data/emoji64/val-*.tar")
OWN_FILES = (
    "tokenizer",
    "transformer",
    "codes",
    "samples",
    "calibration",
    "plan.json",
    "metrics.json",
    "report.html",
    "reconstruction.json",
    "reconstruction.npz",
)
# Shares of the time budget; the rest goes to starting the commands, encoding, evaluating, sampling and the report.
TOKENIZER_SHARE, TRANSFORMER_END = 0.58, 0.93
GAN_START = 0.75  # of the tokenizer's steps
STEP_LIMITS = {"tokenizer": (300, 4_000), "transformer": (200, 4_000)}
SMOKE_STEPS = {"tokenizer": 12, "transformer": 12}
SAMPLES_PER_CLASS, GUIDANCE, TOP_P = 8, 2.0, 0.95
VIEWS = 4


@dataclass(frozen=True, kw_only=True)
class Place:
    """The images of the quickstart, for the commands and for this process."""

    train: str
    validation: str | None

    def overrides(self) -> list[str]:
        """Settings for ibq/train_tokenizer.py."""
        return [f"data.train={self.train}", f"data.validation={self.validation or 'null'}"]

    def options(self, split: str) -> list[str]:
        """Options of the tools that read images."""
        if self.validation is not None:
            return ["--images", self.train if split == "train" else self.validation]
        return ["--images", self.train, "--split", split]

    def index(self, split: str) -> ImageIndex:
        """The images themselves."""
        if self.validation is not None:
            return open_images(self.train if split == "train" else self.validation)
        return open_split(self.train, split, 10)


class Quickstart:
    """One run in one folder: its plan, its parts and the time that each has taken."""

    def __init__(self, output: Path, place: Place, minutes: float, smoke: bool):
        self.output, self.place, self.minutes, self.smoke = output, place, minutes, smoke
        self.plan_file = output / "plan.json"
        self.plan = json.loads(self.plan_file.read_text()) if self.plan_file.exists() else {}
        wanted = {"train": place.train, "validation": place.validation, "smoke": smoke}
        if self.plan.setdefault("data", wanted) != wanted:
            raise UserError(f"{output} holds a run on other data; add --fresh to start over, or --output elsewhere")
        self.seconds: dict[str, float] = self.plan.setdefault("seconds", {})
        self._part_started: float | None = None

    def elapsed(self) -> float:
        """Seconds spent so far, in this call and in earlier ones."""
        running = 0.0 if self._part_started is None else time.perf_counter() - self._part_started
        return sum(self.seconds.values()) + running

    @contextmanager
    def part(self, name: str):
        """Add the time of a part to the plan, also when it fails."""
        self._part_started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - self._part_started
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
            self._part_started = None
            self.output.mkdir(parents=True, exist_ok=True)
            write_text(self.plan_file, json.dumps(self.plan, indent=1))

    def run(self, what: str, *command: str) -> None:
        """Run one of the project's commands."""
        print(f"\n[{self.elapsed():4.0f} s] {what}\n$ {shlex.join(['python', *command])}", flush=True)
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        code = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=False).returncode
        if code:
            raise UserError(f"{what}: the command above ended with exit code {code}")

    def precision(self) -> str:
        """bf16 where this machine multiplies matrices much faster in it, else fp32."""
        if "precision" not in self.plan:
            self.plan["precision"] = "bf16" if bf16_speedup() > 1.5 else "fp32"
        return self.plan["precision"]

    def steps(self, stage: str, calibrate: Callable[[], tuple[float, float]], until: float) -> int:
        """Training steps of a stage, such that it ends when the share `until` of the budget is spent."""
        if stage not in self.plan:
            if self.smoke:
                self.plan[stage] = SMOKE_STEPS[stage]
            else:
                per_step, fixed = calibrate()
                seconds = self.minutes * 60 * until - self.elapsed() - fixed
                low, high = STEP_LIMITS[stage]
                self.plan[stage] = int(min(max(seconds / per_step // 50 * 50, low), high))
                print(f"{1000 * per_step:.0f} ms a step: {self.plan[stage]} steps fit the time")
        return self.plan[stage]


def bf16_speedup() -> float:
    """How many times faster than fp32 a bf16 matrix product is here."""
    if torch.cuda.is_available():
        return float("inf")
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(1024, 1024).to(dtype)
        a @ a
        start = time.perf_counter()
        for _ in range(5):
            a @ a
        seconds[dtype] = time.perf_counter() - start
    return seconds[torch.float32] / seconds[torch.bfloat16]


def measure(
    quickstart: Quickstart, script: str, config: str, overrides: Sequence[str], gan: bool
) -> tuple[float, float]:
    """(seconds per step, seconds besides the steps) of a training command, by a short run of it."""
    folder = quickstart.output / "calibration"
    shutil.rmtree(folder, ignore_errors=True)
    steps = 20
    # Half of the steps with the discriminator, all with the quantizer.
    extra = [f"loss.gan.start_step={steps // 2}", "codebook_start.warmup_steps=0"] if gan else []
    start = time.perf_counter()
    quickstart.run(
        "measure the speed",
        script,
        "--config",
        config,
        *overrides,
        *extra,
        f"output={folder}",
        f"training.max_steps={steps}",
        "schedule.warmup_steps=1",
        f"training.log_every={steps // 4}",
    )
    total = time.perf_counter() - start
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = [line["seconds/step"] for line in lines if "seconds/step" in line]
    shutil.rmtree(folder)
    per_step = GAN_START * timed[1] + (1 - GAN_START) * timed[3] if gan else (timed[1] + timed[3]) / 2
    # Besides its steps a run starts, validates and saves: some of it again and again.
    return per_step, 2.0 * (total - sum(timed) * steps / 4)


def train_tokenizer(quickstart: Quickstart) -> None:
    """Stage 1."""
    script, config = "ibq/train_tokenizer.py", "yaml/quickstart_tokenizer.yaml"
    overrides = [*quickstart.place.overrides(), f"precision={quickstart.precision()}"]
    steps = quickstart.steps(
        "tokenizer", lambda: measure(quickstart, script, config, overrides, gan=True), TOKENIZER_SHARE
    )
    quickstart.run(
        "train the tokenizer",
        script,
        "--config",
        config,
        *overrides,
        f"output={quickstart.output / 'tokenizer'}",
        *step_overrides(steps),
        f"loss.gan.start_step={int(steps * GAN_START)}",
        f"codebook_start.warmup_steps={min(150, steps // 8)}",
    )


def step_overrides(steps: int) -> list[str]:
    """Length of a run, and a rhythm that fits it."""
    every = max(steps // 8, 1)
    return [
        f"training.max_steps={steps}",
        f"training.validate_every={every}",
        f"training.save_every={every}",
        f"training.log_every={max(min(20, steps // 4), 1)}",
        f"schedule.warmup_steps={min(50, steps // 4)}",
    ]


def evaluate_tokenizer(quickstart: Quickstart) -> None:
    """Reconstruction figures on the validation images."""
    output = quickstart.output
    quickstart.run(
        "evaluate the tokenizer",
        "tools/evaluate.py",
        "reconstruction",
        "--tokenizer",
        str(output / "tokenizer"),
        *quickstart.place.options("validation"),
        "--workers",
        "0",
        "--json",
        str(output / "reconstruction.json"),
        "--npz",
        str(output / "reconstruction.npz"),
    )


def encode(quickstart: Quickstart) -> None:
    """Images to codes."""
    for split in ("train", "validation"):
        views = VIEWS if split == "train" and not quickstart.smoke else 1
        quickstart.run(
            f"encode the {split} images",
            "tools/encode_shards.py",
            "--tokenizer",
            str(quickstart.output / "tokenizer"),
            *quickstart.place.options(split),
            "--output",
            str(quickstart.output / "codes" / split),
            "--views",
            str(views),
            "--workers",
            "0",
            "--precision",
            quickstart.precision(),
        )


def train_transformer(quickstart: Quickstart) -> None:
    """Stage 2."""
    script, config = "ibq/train_ar.py", "yaml/quickstart_transformer.yaml"
    codes = quickstart.output / "codes"
    meta = CodeDataset(codes / "train").meta
    overrides = [
        f"precision={quickstart.precision()}",
        f"data.train={codes / 'train'}",
        f"data.validation={codes / 'validation'}",
        f"model.vocab_size={meta.num_codes}",
        f"model.tokens_per_side={meta.tokens_per_side}",
        f"model.num_classes={len(meta.classes)}",
    ]
    steps = quickstart.steps(
        "transformer", lambda: measure(quickstart, script, config, overrides, gan=False), TRANSFORMER_END
    )
    output = f"output={quickstart.output / 'transformer'}"
    quickstart.run("train the transformer", script, "--config", config, *overrides, output, *step_overrides(steps))


def sample(quickstart: Quickstart) -> None:
    """A few images of every class."""
    output = quickstart.output
    shutil.rmtree(output / "samples", ignore_errors=True)
    quickstart.run(
        "generate images",
        "tools/sample.py",
        "--tokenizer",
        str(output / "tokenizer"),
        "--transformer",
        str(output / "transformer"),
        "--output",
        str(output / "samples"),
        "--count",
        str(SAMPLES_PER_CLASS),
        "--guidance-scale",
        str(GUIDANCE),
        "--top-p",
        str(TOP_P),
    )


def collect_metrics(quickstart: Quickstart) -> dict:
    """The figures of the run, from the files that its parts wrote."""
    output = quickstart.output
    reconstruction = json.loads((output / "reconstruction.json").read_text())
    train, validation = (CodeDataset(output / "codes" / split) for split in ("train", "validation"))
    meta = train.meta
    images = len(train) // meta.views
    plain = np.asarray(train.codes[:images])  # the first view is the image itself
    both = np.concatenate([plain, np.asarray(validation.codes)])
    usage = CodeUsage(meta.num_codes)
    usage.add(torch.from_numpy(both.astype(np.int64)))
    statistics = usage.statistics()
    best = json.loads((output / "transformer" / "best" / "info.json").read_text())
    figures = reconstruction["metrics"]
    return {
        "reconstruction": {name: figures[name] for name in ("psnr", "thumbnail_psnr", "ssim", "l1", "images")},
        "codebook": {
            "num_codes": reconstruction["num_codes"],
            "dim": reconstruction["dim"],
            "usage": statistics["usage"],
            "perplexity": statistics["perplexity"],
            "effective_rank": figures["effective_rank"],
        },
        "tokens_per_image": reconstruction["tokens_per_image"],
        "ar": {
            "val_nll": best["metrics"]["nll"],
            "unigram_nll": unigram_nll(both, meta.num_codes),
            "bigram_nll": bigram_nll(train.codes, np.asarray(validation.codes), meta.num_codes, meta.tokens_per_side),
        },
        "steps": {stage: quickstart.plan[stage] for stage in ("tokenizer", "transformer")},
        "parts": dict(quickstart.seconds),
        "seconds": quickstart.elapsed(),
        "histogram": usage.counts.tolist(),
    }


def report(quickstart: Quickstart) -> None:
    """metrics.json and report.html."""
    output = quickstart.output
    metrics = collect_metrics(quickstart)
    histogram = torch.tensor(metrics.pop("histogram"))
    pictures = np.load(output / "reconstruction.npz")
    originals = torch.from_numpy(pictures["originals"])
    samples = np.load(output / "samples" / "samples.npz")
    images, labels = torch.from_numpy(samples["arr_0"]).permute(0, 3, 1, 2), samples["arr_1"]
    index = quickstart.place.index("train")
    neighbours = nearest_images(images, index)
    per_class = {int(c): torch.from_numpy(np.flatnonzero(labels == c)) for c in np.unique(labels)}
    side = CodeDataset(output / "codes" / "train").meta.tokens_per_side
    data = ReportData(
        title="From a folder of images to generated images",
        subtitle=f"IBQ tokenizer and autoregressive transformer, {len(index):,} training images",
        metrics=metrics,
        originals=originals,
        reconstructions=torch.from_numpy(pictures["reconstructions"]),
        thumbnails=thumbnail(originals, side),
        classes=index.classes,
        samples={label: images[numbers] for label, numbers in per_class.items()},
        nearest={label: neighbours[numbers] for label, numbers in per_class.items()},
        tokenizer_curves=curves(
            output / "tokenizer",
            {
                "training L1": "loss/l1",
                "quantization loss": "quantizer/quantization",
                "discriminator loss": "gan/discriminator",
                "validation PSNR (dB)": "validation/psnr",
                "codebook usage": "codebook/usage",
            },
        ),
        transformer_curves=curves(
            output / "transformer",
            {
                "training NLL": "loss/total",
                "validation NLL": "validation/nll",
            },
        ),
        reference_lines={"unigram": metrics["ar"]["unigram_nll"], "bigram": metrics["ar"]["bigram_nll"]},
        histogram=histogram,
        commands=next_commands(output),
    )
    write_report(output / "report.html", data)
    write_text(output / "metrics.json", json.dumps(metrics, indent=1))


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
    return [
        ("More images of one class", f"python tools/sample.py {models} --classes 3 --count 32 --output samples"),
        ("Your own images, one folder a class", "bash tools/quickstart.sh --data my_images --output runs/mine"),
        ("Curves in TensorBoard", f"tensorboard --logdir {output}"),
        (
            "The paper's tokenizer, on a cluster",
            "torchrun --nproc-per-node 8 ibq/train_tokenizer.py "
            "--config yaml/tokenizer_16384.yaml data.train='shards/train-*.tar'",
        ),
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bash tools/quickstart.sh", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--data",
        help="your images: a folder with one sub-folder per class, or a glob of tar shards "
        "(default: the bundled emoji); every tenth image is held out for validation",
    )
    add("--output", type=Path, default=Path("runs/quickstart"), help="folder of the run (default: %(default)s)")
    add("--minutes", type=float, default=8.5, help="time to fill, after the installation (default: %(default)s)")
    add("--fresh", action="store_true", help="start over instead of going on with an interrupted run")
    add("--smoke", action="store_true", help="a dozen steps each, to see that everything works")
    return parser.parse_args(argv)


def remove_own_files(output: Path) -> None:
    """Remove what an earlier quickstart left in its folder, and nothing else."""
    for name in OWN_FILES:
        path = output / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is left to do."""
    arguments = parse(argv)
    if arguments.minutes <= 0:
        raise UserError(f"--minutes must be positive, got {arguments.minutes}")
    place = Place(train=EMOJI[0], validation=EMOJI[1])
    if arguments.data is not None:
        data = os.path.abspath(arguments.data)
        place = Place(train=data, validation=None)
    output = arguments.output
    if arguments.fresh:
        remove_own_files(output)
    if (output / "metrics.json").exists():
        print(f"{output} is finished: see {output / 'report.html'}; --fresh starts over")
        return
    place.index("train")  # complains at once if there is nothing
    quickstart = Quickstart(output, place, arguments.minutes, arguments.smoke)
    parts = (train_tokenizer, evaluate_tokenizer, encode, train_transformer, sample)
    for part in parts:
        with quickstart.part(part.__name__):
            part(quickstart)
    with quickstart.part("report"):
        report(quickstart)
    summary(output)


def summary(output: Path) -> None:
    """Print the main figures and where to look."""
    metrics = json.loads((output / "metrics.json").read_text())
    reconstruction, codebook, ar = metrics["reconstruction"], metrics["codebook"], metrics["ar"]
    print(
        f"\ndone in {metrics['seconds'] / 60:.1f} minutes"
        f"\n  reconstruction  {reconstruction['psnr']:.2f} dB (thumbnail of as many pixels as tokens: "
        f"{reconstruction['thumbnail_psnr']:.2f} dB), SSIM {reconstruction['ssim']:.3f}"
        f"\n  codebook        {codebook['usage']:.1%} of {codebook['num_codes']} codes in use, perplexity "
        f"{codebook['perplexity']:.0f}"
        f"\n  transformer     {ar['val_nll']:.3f} nats a token (bigram {ar['bigram_nll']:.3f}, unigram "
        f"{ar['unigram_nll']:.3f})"
        f"\n  report          {output / 'report.html'}"
    )


if __name__ == "__main__":
    exit_on_user_error(main)
