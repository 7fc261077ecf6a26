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
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from ibq.config import UserError, exit_on_user_error
from ibq.data.index import ImageIndex
from ibq.data.shards import open_images, open_split
from ibq.files import remove, write_text
from ibq.training.provenance import origin
from tools.lib import ROOT

# PyTorch is imported where it is needed: --help should not wait for it.

EMOJI = ("tests/data/emoji64/train-*.tar", "tests/data/emoji64/val-*.tar")
OWN_FILES = ("tokenizer", "transformer", "codes", "samples", "calibration", "plan.json", "metrics.json", "report.html",
             "reconstruction.json", "reconstruction.npz", "generation.json")  # fmt: skip
# Shares of the time budget; the rest goes to starting the commands, encoding, evaluating, sampling and the report.
TOKENIZER_SHARE, TRANSFORMER_END = 0.51, 0.93
GAN_START = 0.75  # of the tokenizer's steps
STEP_LIMITS = {"tokenizer": (300, 4_000), "transformer": (200, 4_000)}
SMOKE_STEPS = {"tokenizer": 12, "transformer": 12}
SAMPLES_PER_CLASS, GUIDANCE, TOP_P = 8, 2.5, 0.9
VIEWS = 4
STAGES = {  # script and config
    "tokenizer": ("ibq/train_tokenizer.py", "yaml/quickstart/tokenizer.yaml"),
    "transformer": ("ibq/train_ar.py", "yaml/quickstart/transformer.yaml"),
}


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
    """One run in one folder: its choices, its parts and the time that each has taken."""

    def __init__(self, output: Path, place: Place, minutes: float, smoke: bool):
        self.output, self.place, self.minutes, self.smoke = output, place, minutes, smoke
        self.choices_file = output / "plan.json"  # by the name that earlier runs gave it
        self.choices = json.loads(self.choices_file.read_text()) if self.choices_file.exists() else {}
        wanted = {"train": place.train, "validation": place.validation, "smoke": smoke}
        if self.choices.setdefault("data", wanted) != wanted:
            raise UserError(f"{output} holds a run on other data; add --fresh to start over, or --output elsewhere")
        self.seconds: dict[str, float] = self.choices.setdefault("seconds", {})
        self._part_started: float | None = None

    def elapsed(self) -> float:
        """Seconds spent so far, in this call and in earlier ones."""
        running = 0.0 if self._part_started is None else time.perf_counter() - self._part_started
        return sum(self.seconds.values()) + running

    @contextmanager
    def part(self, name: str):
        """Add the time of a part to the choices, also when it fails."""
        self._part_started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - self._part_started
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
            self._part_started = None
            self.save_choices()

    def save_choices(self) -> None:
        """Write down what a later call has to know."""
        write_text(self.choices_file, json.dumps(self.choices, indent=1))

    def run(self, what: str, *command: str) -> None:
        """Run one of the project's commands."""
        print(f"\n[{self.elapsed():4.0f} s] {what}\n$ {shlex.join(['python', *command])}", flush=True)
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        code = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=False).returncode
        if code:
            raise UserError(f"{what}: the command above ended with exit code {code}")

    def precision(self) -> str:
        """bf16 where this machine multiplies matrices much faster in it, else fp32."""
        if "precision" not in self.choices:
            self.choices["precision"] = "bf16" if bf16_speedup() > 1.5 else "fp32"
        return self.choices["precision"]

    def steps(self, stage: str, overrides: Sequence[str], until: float) -> int:
        """Training steps of a stage, such that it ends when the share `until` of the budget is spent."""
        if stage not in self.choices:
            if self.smoke:
                self.choices[stage] = SMOKE_STEPS[stage]
            else:
                per_step, fixed = measure(self, stage, overrides)
                seconds = self.minutes * 60 * until - self.elapsed() - fixed
                low, high = STEP_LIMITS[stage]
                self.choices[stage] = int(min(max(seconds / per_step // 50 * 50, low), high))
                print(f"{1000 * per_step:.0f} ms a step: {self.choices[stage]} steps fit the time")
            self.save_choices()  # at once: a run that is killed in the middle must go on with the same steps
        return self.choices[stage]


def bf16_speedup() -> float:
    """How many times faster than fp32 a bf16 matrix product is here."""
    import torch

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


def measure(quickstart: Quickstart, stage: str, overrides: Sequence[str]) -> tuple[float, float]:
    """(seconds per step, seconds besides the steps) of a stage's training command, by a short run of it."""
    folder, gan = quickstart.output / "calibration", stage == "tokenizer"
    shutil.rmtree(folder, ignore_errors=True)
    steps = 40
    settings = [f"output={folder}", f"training.max_steps={steps}", "schedule.warmup_steps=1"]
    settings += [f"training.log_every={steps // 4}"]
    # Half of the steps with the discriminator, all with the quantizer.
    settings += [f"loss.gan.start_step={steps // 2}", "codebook_start.warmup_steps=0"] if gan else []
    start = time.perf_counter()
    train(quickstart, "measure the speed", stage, *overrides, *settings)
    total = time.perf_counter() - start
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "seconds/step" in line]
    timed = [line["seconds/step"] - line["seconds/data"] for line in lines]  # images are decoded only once
    shutil.rmtree(folder)
    per_step = GAN_START * timed[1] + (1 - GAN_START) * timed[3] if gan else (timed[1] + timed[3]) / 2
    # Besides its steps a run starts, validates and saves: some of it again and again.
    return per_step, 2.0 * (total - sum(timed) * steps / 4)


def train(quickstart: Quickstart, what: str, stage: str, *settings: str) -> None:
    """Run the training command of a stage."""
    script, config = STAGES[stage]
    quickstart.run(what, script, "--config", config, *settings)


def train_tokenizer(quickstart: Quickstart) -> None:
    """Stage 1."""
    overrides = [*quickstart.place.overrides(), f"precision={quickstart.precision()}"]
    steps = quickstart.steps("tokenizer", overrides, TOKENIZER_SHARE)
    settings = tokenizer_settings(overrides, quickstart.output / "tokenizer", steps)
    train(quickstart, "train the tokenizer", "tokenizer", *settings)


def tokenizer_settings(overrides: Sequence[str], output: Path, steps: int) -> list[str]:
    """Settings over the config for a training of so many steps."""
    return [
        *overrides,
        f"output={output}",
        *step_overrides(steps),
        f"loss.gan.start_step={int(steps * GAN_START)}",
        f"codebook_start.warmup_steps={min(150, steps // 8)}",
    ]


def step_overrides(steps: int) -> list[str]:
    """Length of a run, and a rhythm that fits it."""
    every = max(steps // 8, 1)
    return [
        f"training.max_steps={steps}",
        f"training.validate_every={every}",
        f"checkpoint.save_every={every}",
        f"training.log_every={max(min(20, steps // 4), 1)}",
        f"schedule.warmup_steps={min(50, steps // 4)}",
    ]


def evaluate_tokenizer(quickstart: Quickstart) -> None:
    """Reconstruction figures on the validation images."""
    output = quickstart.output
    files = options(json=output / "reconstruction.json", npz=output / "reconstruction.npz")
    images = [*quickstart.place.options("validation"), *options(workers=0)]
    command = ["tools/evaluate.py", "reconstruction", *options(tokenizer=output / "tokenizer"), *images, *files]
    quickstart.run("evaluate the tokenizer", *command)


def encode(quickstart: Quickstart) -> None:
    """Images to codes."""
    for split in ("train", "validation"):
        views = VIEWS if split == "train" and not quickstart.smoke else 1
        place = options(output=quickstart.output / "codes" / split)
        how = options(views=views, workers=0, precision=quickstart.precision())
        command = ["tools/encode_shards.py", *options(tokenizer=quickstart.output / "tokenizer")]
        quickstart.run(f"encode the {split} images", *command, *quickstart.place.options(split), *place, *how)


def train_transformer(quickstart: Quickstart) -> None:
    """Stage 2."""
    from ibq.data.codes import CodeDataset

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
    settings = step_overrides(quickstart.steps("transformer", overrides, TRANSFORMER_END))
    output = f"output={quickstart.output / 'transformer'}"
    train(quickstart, "train the transformer", "transformer", *overrides, output, *settings)


def sample(quickstart: Quickstart) -> None:
    """A few images of every class."""
    output = quickstart.output
    shutil.rmtree(output / "samples", ignore_errors=True)
    models = options(tokenizer=output / "tokenizer", transformer=output / "transformer", output=output / "samples")
    how = options(count=SAMPLES_PER_CLASS, guidance_scale=GUIDANCE, top_p=TOP_P)
    quickstart.run("generate images", "tools/sample.py", *models, *how)


def judge(quickstart: Quickstart) -> None:
    """Whether a classifier of the real images recognises the generated ones; not with a single class."""
    output, place = quickstart.output, quickstart.place
    if len(place.index("train").classes) < 2:
        return
    command = ["tools/evaluate.py", "generation", *options(samples=output / "samples" / "samples.npz")]
    command += options(classifier=place.train)
    command += options(classifier_validation=place.validation) if place.validation is not None else []
    command += options(classifier_steps=10) if quickstart.smoke else []
    quickstart.run("judge the generated images", *command, *options(json=output / "generation.json"))


def options(**values: object) -> list[str]:
    """Options of a command: --top-p 0.9 for top_p=0.9."""
    return [text for name, value in values.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def report(quickstart: Quickstart) -> None:
    """The page and, last, the figures: they say that the run is whole."""
    output = quickstart.output
    from tools.lib.quickstart.report import collect_metrics, write_page

    metrics = collect_metrics(output)
    metrics["steps"] = {stage: quickstart.choices[stage] for stage in STEP_LIMITS}
    metrics["parts"] = {name.replace("_", " "): seconds for name, seconds in quickstart.seconds.items()}
    metrics["seconds"] = quickstart.elapsed()
    metrics["origin"] = origin(f"bash tools/quickstart.sh {shlex.join(sys.argv[1:])}".strip())
    write_page(output, metrics, quickstart.place.index("train"))
    write_text(output / "metrics.json", json.dumps(metrics, indent=1))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bash tools/quickstart.sh", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--data",
        help="your images: a folder with one sub-folder per class, or a glob of tar shards "
        "(default: the bundled emoji); every tenth image is held out for validation",
    )
    add("--output", type=Path, help="folder of the run (default: runs/quickstart of this project)")
    add("--minutes", type=float, default=8.5, help="time to fill, after the installation (default: %(default)s)")
    add("--fresh", action="store_true", help="start over instead of going on with an interrupted run")
    add("--smoke", action="store_true", help="a dozen steps each, to see that everything works")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is left to do."""
    arguments = parse(argv)
    if arguments.minutes <= 0:
        raise UserError(f"--minutes must be positive, got {arguments.minutes}")
    place = Place(train=EMOJI[0], validation=EMOJI[1])
    caller = Path(os.environ.get("IBQ_CALLED_FROM", "."))
    if arguments.data is not None:
        place = Place(train=os.path.abspath(caller / arguments.data), validation=None)
    # By default inside this project, whose paths the printed commands then show.
    output = Path("runs/quickstart") if arguments.output is None else Path(os.path.abspath(caller / arguments.output))
    if output.is_relative_to(ROOT):
        output = output.relative_to(ROOT)
    os.chdir(ROOT)
    if arguments.fresh:
        remove(output, OWN_FILES)
    place.index("train")  # complains at once if there is nothing
    quickstart = Quickstart(output, place, arguments.minutes, arguments.smoke)
    if (output / "metrics.json").exists():
        print(f"{output} is finished: see {output / 'report.html'}; --fresh starts over")
        return
    parts = (train_tokenizer, evaluate_tokenizer, encode, train_transformer, sample, judge)
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
        f"{recognised(metrics.get('classifier'))}"
        f"\n  report          {output / 'report.html'}"
    )


def recognised(classifier: dict | None) -> str:
    """The classifier's line, if there is one."""
    if classifier is None:
        return ""
    generated, real, chance = (classifier[name] for name in ("generated_accuracy", "validation_accuracy", "chance"))
    return (
        f"\n  samples         {generated:.1%} recognised by a classifier (real images {real:.1%}, chance {chance:.1%})"
    )


if __name__ == "__main__":
    exit_on_user_error(main)
