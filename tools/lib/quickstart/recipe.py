"""From a folder of images to generated images: tokenizer, codes, transformer, samples and a report.

Run by tools/quickstart.sh. Every part but the first is one of the project's own commands, printed before it runs. The
number of training steps follows from the speed of the steps themselves, and is corrected while they run, so that the
whole takes about --minutes; of large sets only as many images are used as that allows. A second call goes on where the
first was interrupted.
"""

import argparse
import importlib
import itertools
import json
import os
import shlex
import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from ibq.config import UserError, exit_on_user_error
from ibq.data.counts import DAMAGED, PictureCount
from ibq.data.index import ImageIndex
from ibq.data.shards import open_images
from ibq.extras import need
from ibq.files import remove, write_text
from ibq.progress import bar_of
from ibq.training.provenance import origin
from tools.lib import ROOT
from tools.lib.quickstart.pace import Load, Pace, saved_step, watch
from tools.lib.quickstart.pictures import prepare
from tools.lib.quickstart.speed import best_threads, bf16_speedup

# PyTorch is imported where it is needed: --help should not wait for it.

EMOJI = ("tests/data/emoji64/train-*.tar", "tests/data/emoji64/val-*.tar")
OWN_FILES = ("tokenizer", "transformer", "codes", "samples", "pictures", "calibration", "plan.json", "metrics.json",
             "report.html", "reconstruction.json", "reconstruction.npz", "generation.json")  # fmt: skip
PICTURES_SHARE, ENCODE_SHARE = 0.12, 0.06  # of the time, at most
PICTURES_A_MINUTE, MOST_PICTURES, SAMPLES_A_MINUTE = 2_000, 20_000, 32
# By precision: the tokenizer's batch (small ones cost most in bf16), the share of the time that is spent when it ends
# (in fp32 it has the fewer steps), and the time of the transformer's steps in the tokenizer's.
BATCH, TOKENIZER_END = {"fp32": 4, "bf16": 8}, {"fp32": 0.6, "bf16": 0.55}
TRANSFORMER_STEP = {"fp32": 3.0, "bf16": 2.0}
STEPS = (10, 8_000)  # of a stage, at least and at most
FEW = 500  # steps that are called few
# What follows the transformer (samples, classifier, report) takes so many seconds and tokenizer steps.
TAIL_S, TAIL_STEPS = 6, 150
ENCODED = 7  # images that are encoded in the time of training the tokenizer on one
CLASSIFIER_STEP, CLASSIFIER_STEPS = 0.4, 250  # in time, of a tokenizer's; how many it makes by itself
SMOKE_STEPS, SMOKE_PICTURES = 12, 200
SAMPLES_PER_CLASS, GUIDANCE, TOP_P = 8, 2.5, 0.9
VIEWS = 4
STAGES = {  # script and config
    "tokenizer": ("ibq/train_tokenizer.py", "yaml/quickstart/tokenizer.yaml"),
    "transformer": ("ibq/train_ar.py", "yaml/quickstart/transformer.yaml"),
}
VALIDATIONS, WATCHED = 5, 128  # in a training, of so many pictures for the tokenizer
STEP_PRODUCTS = 75  # of `best_threads`, in the time of a tokenizer's step: a first guess, too
# The discriminator comes for the end: it costs 0.1 dB, and more samples are recognised. A very short training has none.
LOADS = {"tokenizer": Load(late=0.85, extra=0.5, long=1_000), "transformer": Load()}
CODEBOOK_START = 150  # the step at which the codebook starts from the latents, at most


@dataclass(frozen=True, kw_only=True)
class Place:
    """The images of the quickstart, for the commands and for this process."""

    train: str
    validation: str | None

    def overrides(self) -> list[str]:
        """Settings for ibq/train_tokenizer.py."""
        return [f"data.train={self.train}", f"data.validation={self.validation or 'null'}"]

    def index(self) -> ImageIndex:
        """The training images themselves."""
        return open_images(self.train)


class Quickstart:
    """One run in one folder: its choices, its parts and the time that each has taken by `clock`."""

    def __init__(
        self, output: Path, place: Place, minutes: float, smoke: bool, clock: Callable[[], float] = time.perf_counter
    ):
        self.output, self.place, self.minutes, self.smoke, self.clock = output, place, minutes, smoke, clock
        self.choices_file = output / "plan.json"  # by the name that earlier runs gave it
        self.choices = json.loads(self.choices_file.read_text()) if self.choices_file.exists() else {}
        wanted = {"train": place.train, "validation": place.validation, "smoke": smoke}
        if self.choices.setdefault("data", wanted) != wanted:
            raise UserError(f"{output} holds a run on other data; add --fresh to start over, or --output elsewhere")
        self.seconds: dict[str, float] = self.choices.setdefault("seconds", {})
        self.left_out: dict[str, str] = self.choices.setdefault("left_out", {})
        self.products = 1_000.0  # a second, as `threads` finds it
        self._part: tuple[str, float] | None = None  # and the time up to which it is counted

    def elapsed(self) -> float:
        """Seconds spent so far, in this call and in earlier ones."""
        return sum(self.seconds.values()) + (0.0 if self._part is None else self.clock() - self._part[1])

    def budget(self, share: float = 1.0) -> float:
        """Seconds of a share of the time."""
        return self.minutes * 60 * share

    def tail(self) -> float:
        """Seconds for what follows the transformer, on this machine."""
        return min(TAIL_S + TAIL_STEPS * self.step_seconds(), self.budget(0.25))

    def step_seconds(self) -> float:
        """Seconds of a step of the tokenizer, as last measured, or else as guessed."""
        guess = 1000 * STEP_PRODUCTS / self.products
        return self.choices.get("ms_per_step", {}).get("tokenizer", guess) / 1000

    @contextmanager
    def part(self, name: str):
        """Add the time of a part to the choices, also when it fails after others."""
        self._part = name, self.clock()
        try:
            yield
            self.save_choices()
        except BaseException:
            if self.choices_file.exists():  # else nothing has begun, and the next call may be about other data
                self.save_choices()
            raise
        finally:
            self._part = None

    def save_choices(self) -> None:
        """Write down what a later call has to know."""
        if self._part is not None:
            name, since = self._part
            self._part = name, self.clock()
            self.seconds[name] = self.seconds.get(name, 0.0) + self._part[1] - since
        write_text(self.choices_file, json.dumps(self.choices, indent=1))

    def leave_out(self, what: str, why: str) -> None:
        """Say what is not done for want of time, now and in the report."""
        print(f"left out: {what}: {why}", flush=True)
        self.left_out[what] = why

    def say(self, what: str, *command: str) -> None:
        """Say what comes."""
        print(f"\n[{self.elapsed():4.0f} s] {what}" + (f"\n$ {shlex.join(['python', *command])}" if command else ""))
        sys.stdout.flush()

    def run(self, what: str, script: str, *arguments: str) -> None:
        """Run one of the project's commands, in this process: to start another takes seconds."""
        self.say(what, script, *arguments)
        self.threads()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = importlib.import_module(script.removesuffix(".py").replace("/", ".")).main(arguments)
        if code:
            raise UserError(f"{what}: the command above ended with exit code {code}")

    def threads(self) -> int:
        """Use as many threads as are fastest now."""
        import torch

        self.choices["threads"], self.products = best_threads()
        torch.set_num_threads(self.choices["threads"])
        return self.choices["threads"]

    def precision(self) -> str:
        """bf16 where this machine multiplies matrices much faster in it, else fp32."""
        if "precision" not in self.choices:
            self.threads()
            self.choices["precision"] = "bf16" if bf16_speedup() > 1.5 else "fp32"
        return self.choices["precision"]


# --- Pictures ---


def take_pictures(quickstart: Quickstart) -> None:
    """Somebody's own pictures, small, and no more than there is time for; they are the place from then on."""
    if quickstart.place.validation is not None:
        return
    folder, place = quickstart.output / "pictures", quickstart.place.train
    if "pictures" not in quickstart.choices:
        quickstart.say(f"look for pictures in {place}")
        index = open_images(place, report=bar_of("list pictures", "part"))
        until = max(quickstart.budget(PICTURES_SHARE), quickstart.elapsed() + quickstart.budget(PICTURES_SHARE / 2))
        most = min(max(int(quickstart.minutes * PICTURES_A_MINUTE), 1_000), MOST_PICTURES)
        counts = prepare(
            index,
            folder,
            most=SMOKE_PICTURES if quickstart.smoke else most,
            in_time=lambda: quickstart.smoke or quickstart.elapsed() < until,
        )
        quickstart.choices["pictures"] = counts
        say_pictures(quickstart, counts)
    quickstart.place = Place(train=str(folder / "train-*.tar"), validation=str(folder / "val-*.tar"))


def say_pictures(quickstart: Quickstart, counts: Mapping[str, int]) -> None:
    """How many there are, and how many are used."""
    used = counts["training"] + counts["validation"]
    print(f"{counts['found']:,} pictures: {counts['training']:,} to train on, {counts['validation']:,} held out")
    if rest := counts["found"] - used - counts["unreadable"]:
        quickstart.leave_out("pictures", f"{rest:,} of {counts['found']:,} are not used; --minutes gives time for more")
    if counts["unreadable"]:
        quickstart.leave_out("unreadable pictures", f"{counts['unreadable']:,} can't be read")
    if rest := counts["classes_found"] - counts["classes"]:
        quickstart.leave_out("classes", f"{rest:,} of {counts['classes_found']:,} have no picture among those")


# --- Training ---


def train(quickstart: Quickstart, stage: str, guess: int, seconds: float, settings: Callable[..., list[str]]) -> None:
    """Train a stage in about so many seconds; `settings` are those of (steps in all, steps done)."""
    choices, folder, (script, config) = quickstart.choices, quickstart.output / stage, STAGES[stage]
    low, high = [SMOKE_STEPS] * 2 if quickstart.smoke else STEPS
    end, measured = quickstart.clock() + seconds, stage in choices
    pace = Pace(end=end, load=LOADS[stage], low=low, high=high, measured=measured)
    wanted = choices[stage] if measured else min(max(guess, low), high)
    while wanted is not None:
        choices[stage] = wanted
        command = [script, "--config", config, *settings(wanted, saved_step(folder))]
        quickstart.save_choices()  # at once: a run that is killed in the middle must go on with the same steps
        quickstart.say(f"train the {stage}: {wanted:,} steps", *command)
        environment = {"OMP_NUM_THREADS": str(quickstart.threads()), "PYTHONWARNINGS": "ignore"}
        wanted = watch(command, environment, folder, pace, wanted, quickstart.clock, quickstart.save_choices)
        if pace.seconds is not None:
            choices.setdefault("ms_per_step", {})[stage] = 1000 * pace.seconds
        if wanted is not None:
            print(f"{1000 * pace.seconds:.0f} ms a step: {wanted:,} steps fit the time", flush=True)
            choices.setdefault("corrections", {}).setdefault(stage, []).append(wanted)
    if choices[stage] < FEW and not quickstart.smoke:
        quickstart.leave_out(f"{stage} steps", f"only {choices[stage]:,} fit the time; --minutes gives time for more")
    elif choices[stage] == high and not quickstart.smoke:
        quickstart.leave_out(f"{stage} steps", f"it makes no more than {high:,}, though there is time for more")


def train_tokenizer(quickstart: Quickstart) -> None:
    """Stage 1."""
    choices = quickstart.choices
    batch = BATCH[quickstart.precision()]
    overrides = [*quickstart.place.overrides(), f"precision={quickstart.precision()}"]
    overrides += [f"training.batch_size={batch}", f"training.micro_batch={batch}"]

    def settings(steps: int, done: int) -> list[str]:
        # The step of k-means may move until it has come, and no longer.
        start = choices.get("codebook_start", codebook_start(steps))
        choices["codebook_start"] = max(done, codebook_start(steps)) if done <= start else start
        every = rhythm(choices.get("ms_per_step", {}).get("tokenizer"), steps)
        return tokenizer_settings(overrides, quickstart.output / "tokenizer", steps, choices["codebook_start"], every)

    seconds = quickstart.budget(TOKENIZER_END[quickstart.precision()]) - quickstart.elapsed()
    train(quickstart, "tokenizer", int(seconds / quickstart.step_seconds()), seconds, settings)


def codebook_start(steps: int) -> int:
    """The step at which the codebook starts from the latents, in a training of so many."""
    return min(CODEBOOK_START, steps // 8)


def tokenizer_settings(
    overrides: Sequence[str], output: Path, steps: int, start: int | None = None, log_every: int = 20
) -> list[str]:
    """Settings over the config for a training of so many steps, with the codebook from step `start` on."""
    return [
        *overrides,
        f"output={output}",
        *step_overrides(steps, log_every),
        f"training.validation_images={WATCHED}",
        f"loss.gan.start_step={LOADS['tokenizer'].costly(steps)}",
        f"codebook_start.warmup_steps={codebook_start(steps) if start is None else start}",
    ]


def step_overrides(steps: int, log_every: int) -> list[str]:
    """Length of a run, and a rhythm that fits it."""
    return [
        f"training.max_steps={steps}",
        f"training.validate_every={max(steps // VALIDATIONS, 1)}",
        f"checkpoint.save_every={max(steps // 8, 1)}",
        f"training.log_every={log_every}",
        f"schedule.warmup_steps={min(50, steps // 4)}",
    ]


def rhythm(ms_per_step: float | None, steps: int) -> int:
    """Steps between two lines of a log: few seconds, and few steps before any is timed."""
    return 2 if ms_per_step is None else max(min(20, steps // 4, int(3000 / ms_per_step)), 1)


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
        f"model.tokens_per_side={meta.grid[0]}",
        f"model.num_classes={len(meta.classes)}",
        f"output={quickstart.output / 'transformer'}",
    ]
    seconds = quickstart.budget() - quickstart.tail() - quickstart.elapsed()
    guess = int(seconds / (TRANSFORMER_STEP[quickstart.precision()] * quickstart.step_seconds()))

    def settings(steps: int, _done: int) -> list[str]:
        log_every = rhythm(quickstart.choices.get("ms_per_step", {}).get("transformer"), steps)
        return [*overrides, *step_overrides(steps, log_every)]

    train(quickstart, "transformer", guess, seconds, settings)


# --- What follows a training ---


def evaluate_tokenizer(quickstart: Quickstart) -> None:
    """Reconstruction figures on the validation images."""
    output = quickstart.output
    files = options(json=output / "reconstruction.json", npz=output / "reconstruction.npz")
    images = options(images=quickstart.place.validation, workers=0)
    command = ["tools/evaluate.py", "reconstruction", *options(tokenizer=output / "tokenizer"), *images, *files]
    quickstart.run("evaluate the tokenizer", *command)


def encode(quickstart: Quickstart) -> None:
    """Images to codes; once begun with so many, it goes on with them."""
    place, choices = quickstart.place, quickstart.choices
    if "views" not in choices:
        sizes = place.index().unit_sizes().tolist()
        choices["views"], choices["shards"] = encoded_in_time(quickstart, sizes)
        quickstart.save_choices()
    views, shards = choices["views"], choices.get("shards")
    train = place.train if shards is None else place.train.replace("*", f"0000[0-{shards - 1}]")
    for split, images in (("train", train), ("validation", place.validation)):
        what = options(tokenizer=quickstart.output / "tokenizer", images=images, workers=0)
        how = options(views=views if split == "train" else 1, precision=quickstart.precision())
        output = options(output=quickstart.output / "codes" / split)
        quickstart.run(f"encode the {split} images", "tools/encode_shards.py", *what, *output, *how)


def encoded_in_time(quickstart: Quickstart, sizes: Sequence[int]) -> tuple[int, int | None]:
    """(views of each training image, of how many shards of such sizes; None: all) that there is time to encode."""
    images = sum(sizes)
    a_step = ENCODED * BATCH[quickstart.precision()]
    rows = quickstart.budget(ENCODE_SHARE) / quickstart.step_seconds() * a_step
    views = 1 if quickstart.smoke else min(max(int(rows / images), 1), VIEWS)
    if views < VIEWS and not quickstart.smoke:
        quickstart.leave_out("views", f"the transformer sees {views} of each image instead of {VIEWS}")
    shards = max(sum(end <= rows for end in itertools.accumulate(sizes)), 1)
    if quickstart.smoke or shards == len(sizes):
        return views, None
    kept = sum(sizes[:shards])
    quickstart.leave_out("images of the transformer", f"{images - kept:,} of {images:,} are not encoded")
    return views, shards


def sample(quickstart: Quickstart) -> None:
    """A few images of every class, or of as many classes as there is time for."""
    output = quickstart.output
    shutil.rmtree(output / "samples", ignore_errors=True)
    models = options(tokenizer=output / "tokenizer", transformer=output / "transformer", output=output / "samples")
    number = len(quickstart.place.index().classes)
    classes, count = sampled(number, int(quickstart.minutes * SAMPLES_A_MINUTE))
    how = options(count=count, guidance_scale=GUIDANCE, top_p=TOP_P)
    if count < SAMPLES_PER_CLASS:
        quickstart.leave_out("samples", f"{count} a class instead of {SAMPLES_PER_CLASS}")
    if classes is not None:
        quickstart.leave_out("sampled classes", f"{len(classes):,} of {number:,}")
        how += ["--classes", *map(str, classes)]
    quickstart.run("generate images", "tools/sample.py", *models, *how)


def sampled(classes: int, most: int) -> tuple[list[int] | None, int]:
    """(evenly spaced classes, or None for all; images of each) with about so many images at most."""
    most = max(most, SAMPLES_PER_CLASS)
    chosen = None if classes <= most else [i * classes // most for i in range(most)]
    return chosen, max(min(SAMPLES_PER_CLASS, most // classes), 1)


def judge(quickstart: Quickstart) -> None:
    """Whether a classifier of the real images recognises the generated ones; not with a single class."""
    output, place = quickstart.output, quickstart.place
    if len(place.index().classes) < 2:
        return
    command = ["tools/evaluate.py", "generation", *options(samples=output / "samples" / "samples.npz")]
    command += options(classifier=place.train, classifier_validation=place.validation)
    steps = 10 if quickstart.smoke else classifier_steps(quickstart)
    if steps < CLASSIFIER_STEPS and not quickstart.smoke:
        quickstart.leave_out("classifier", f"{steps} training steps instead of {CLASSIFIER_STEPS}: it recognises less")
    command += options(classifier_steps=steps) if steps < CLASSIFIER_STEPS else []
    quickstart.run("judge the generated images", *command, *options(json=output / "generation.json"))


def classifier_steps(quickstart: Quickstart) -> int:
    """Steps of the classifier that the time left allows."""
    seconds = quickstart.budget() - quickstart.elapsed() - TAIL_S
    return int(min(max(seconds / (CLASSIFIER_STEP * quickstart.step_seconds()), 50), CLASSIFIER_STEPS))


def options(**values: object) -> list[str]:
    """Options of a command: --top-p 0.9 for top_p=0.9."""
    return [text for name, value in values.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def report(quickstart: Quickstart) -> None:
    """The page and, last, the figures: they say that the run is whole."""
    output = quickstart.output
    from tools.lib.quickstart.report import collect_metrics, write_page

    metrics = collect_metrics(output)
    choices = quickstart.choices
    metrics["steps"] = {stage: choices[stage] for stage in STAGES}
    metrics["machine"] = machine() | {
        "threads": choices["threads"],
        "precision": quickstart.precision(),
        "ms_per_step": {stage: round(ms) for stage, ms in choices.get("ms_per_step", {}).items()},
    }
    metrics["pictures"] = counted(quickstart)
    metrics["left_out"] = quickstart.left_out
    metrics["corrections"] = {
        stage: ", then ".join(map(str, steps)) for stage, steps in choices.get("corrections", {}).items()
    }
    metrics["parts"] = {name.replace("_", " "): seconds for name, seconds in quickstart.seconds.items()}
    metrics["seconds"] = quickstart.elapsed()
    metrics["origin"] = origin(f"bash tools/quickstart.sh {shlex.join(sys.argv[1:])}".strip())
    write_page(output, metrics, quickstart.place.index())
    write_text(output / "metrics.json", json.dumps(metrics, indent=1))


def counted(quickstart: Quickstart) -> dict[str, dict]:
    """Place -> what became of its pictures: of --data, or as the tokenizer's training counts the emoji."""
    from ibq.training.stopping import read_status

    if (counts := quickstart.choices.get("pictures")) is None:
        return read_status(quickstart.output / "tokenizer").get("pictures", {})
    rest = counts["found"] - counts["training"] - counts["validation"] - counts["unreadable"]
    left_out = Counter({DAMAGED: counts["unreadable"], "not used for want of time": rest})
    return {"data": PictureCount(counts["found"], +left_out).to_json()}


def machine() -> dict[str, str]:
    """What this ran on."""
    import torch

    found = origin("")
    return {
        "processor": found["gpu"] or found["cpu"],
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bash tools/quickstart.sh", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--data",
        help="your images: a folder with one sub-folder per class, or a glob of tar shards "
        "(default: the bundled emoji); every tenth image is held out for validation, up to 400",
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
    need("tensorboard", "matplotlib")  # before what takes minutes
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
    quickstart = Quickstart(output, place, arguments.minutes, arguments.smoke)
    if (output / "metrics.json").exists():
        print(f"{output} is finished: see {output / 'report.html'}; --fresh starts over")
        return
    parts = (take_pictures, train_tokenizer, evaluate_tokenizer, encode, train_transformer, sample, judge)
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
    machine, steps = metrics["machine"], metrics["steps"]
    speeds = ", ".join(
        f"{steps[stage]:,} of the {stage}" + (f" at {speed:,} ms" if speed else "")
        for stage, speed in ((stage, machine["ms_per_step"].get(stage)) for stage in STAGES)
    )
    left_out = "".join(f"\n  left out        {what}: {why}" for what, why in metrics["left_out"].items())
    counts = {place: PictureCount(row["found"], row["left_out"]) for place, row in metrics["pictures"].items()}
    pictures = "".join(f"\n  {place:15s} {count}" for place, count in counts.items())
    print(
        f"\ndone in {metrics['seconds'] / 60:.1f} minutes"
        f"\n  reconstruction  {reconstruction['psnr']:.2f} dB (thumbnail of as many pixels as tokens: "
        f"{reconstruction['thumbnail_psnr']:.2f} dB), SSIM {reconstruction['ssim']:.3f}"
        f"\n  codebook        {codebook['usage']:.1%} of {codebook['num_codes']} codes in use, perplexity "
        f"{codebook['perplexity']:.0f}"
        f"\n  transformer     {ar['val_nll']:.3f} nats a token (bigram {ar['bigram_nll']:.3f}, unigram "
        f"{ar['unigram_nll']:.3f})"
        f"{recognised(metrics.get('classifier'))}"
        f"\n  machine         {machine['processor']}, {machine['instructions']}, {machine['precision']}"
        f"\n  steps           {speeds}{left_out}{pictures}"
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
