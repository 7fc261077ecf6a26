"""True optimizer steps of the 2.06B transformer with its optimizer on disk, a checkpoint, and steps after resuming.

On codes of the bundled emoji, made by a tokenizer of 16,384 codes that is trained for a minute first. Needs about
50 GiB of disk (optimizer state and checkpoint of 12 bytes per parameter each), 21 GiB of memory and half an hour on 2
cores.
"""

import argparse
import json
import resource
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ibq.config import UserError, load_section
from ibq.data.codes import code_files, read_codes_meta, write_codes
from ibq.models.transformer import TransformerConfig
from ibq.progress import progress_bar, say
from ibq.scaling.transformer import transformer_parameters
from tools.lib import ROOT

GIB = 2**30
IMAGES = ROOT / "tests" / "data" / "emoji64"
TOKENIZER = (
    *("model.resolution=64", "model.quantizer.num_codes=16384", "training.max_steps=8", "training.batch_size=8"),
    *("training.micro_batch=8", "codebook_start={kmeans: true, warmup_steps: 4, images: 256, iterations: 1}"),
    *("loss.gan.enabled=false", "training.validate_every=null", "training.log_every=8", "schedule.warmup_steps=2"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this bench."""
    add = parser.add_argument
    add("--config", default="yaml/xxl.yaml", help="the transformer (default: %(default)s)")
    add("--steps", type=int, default=5, help="before the checkpoint (default: %(default)s)")
    add("--more-steps", type=int, default=3, help="after resuming (default: %(default)s)")
    add("--batch", type=int, default=2, help="images of a step (default: %(default)s)")
    add("--folder", type=Path, default=Path("runs/bench-xxl"), help="for all files (default: %(default)s)")
    add("--keep", action="store_true", help="do not remove the checkpoint at the end")
    add("--set", nargs="*", default=[], metavar="key=value", dest="overrides", help="settings over the file's")


def measure(arguments: argparse.Namespace) -> dict:
    """Both runs, one after the other, by the deepspeed launcher."""
    sizes = [override.removeprefix("model.") for override in arguments.overrides if override.startswith("model.")]
    model = load_section(TransformerConfig, arguments.config, "model", sizes)
    folder = arguments.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    free = shutil.disk_usage(folder).free
    if free < (needed := 25 * transformer_parameters(model)):  # optimizer state, and a checkpoint of it
        raise UserError(
            f"--folder {folder}: {free / GIB:.0f} GiB are free, {needed / GIB:.0f} are needed; name another"
        )
    _make_codes(folder, model, arguments.batch)
    last = arguments.steps + arguments.more_steps
    first_rows = _train(arguments, arguments.steps)
    rows = _train(arguments, last, after=arguments.steps)
    found = {
        "parameters": _stored(folder, last),
        "losses": [row["loss/total"] for row in first_rows],
        "resumed_losses": [row["loss/total"] for row in rows[arguments.steps :]],
        "seconds_per_step": sum(row["seconds/step"] for row in rows[1:]) / len(rows[1:]),
        "peak_gib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / GIB,
        "gradient_norms": [row["gradient_norm/transformer"] for row in rows],
        "seconds": {
            name.removeprefix("seconds/"): sum(row[name] for row in rows[1:]) / len(rows[1:])
            for name in ("seconds/forward", "seconds/backward", "seconds/optimizer")
        },
        **{name: getattr(arguments, name) for name in ("config", "batch", "overrides")},
        "threads": torch.get_num_threads(),
    }
    if not arguments.keep:
        shutil.rmtree(folder)
    return found


def table(figures: dict) -> str:
    """The figures for people."""
    losses = "  ".join(f"{loss:.3f}" for loss in figures["losses"])
    resumed = "  ".join(f"{loss:.3f}" for loss in figures["resumed_losses"])
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in figures["seconds"].items())
    return "\n".join(
        [
            f"{figures['parameters']:,} parameters, {figures['batch']} images a step",
            f"losses {losses} | resumed {resumed}",
            f"{figures['seconds_per_step']:.1f} s a step ({parts}), peak memory {figures['peak_gib']:.2f} GiB",
        ]
    )


def _stored(folder: Path, step: int) -> int:
    """The parameters that the checkpoint holds."""
    index = json.loads((folder / f"run/checkpoints/step-{step:08d}/transformer.index.json").read_text())
    return sum(torch.Size(entry["shape"]).numel() for entry in index["parameters"].values())


def _make_codes(folder: Path, model: TransformerConfig, images: int) -> None:
    """Codes of some of the bundled images, and class names for all the classes that the model knows."""
    tokenizer = folder / "tokenizer"
    _run(
        sys.executable, "ibq/train_tokenizer.py", "--config", "yaml/quickstart/tokenizer.yaml", f"output={tokenizer}",
        *TOKENIZER, f"model.quantizer.num_codes={model.vocab_size}",
    )  # fmt: skip
    _run(
        sys.executable, "tools/encode_shards.py", "--tokenizer", str(tokenizer / "checkpoints/step-00000008"),
        "--images", str(IMAGES / "val-*.tar"), "--output", str(folder / "encoded"),
    )  # fmt: skip
    encoded = folder / "encoded"
    meta = read_codes_meta(encoded)
    unused = [f"unused {number}" for number in range(model.num_classes - len(meta.classes))]
    codes, labels = (np.load(file) for file in code_files(encoded, 0))
    # The same images at every step: so few steps show a falling loss only on what they have seen.
    chosen = np.linspace(0, len(codes) - 1, images).astype(int)
    write_codes(folder / "codes", codes[chosen], labels[chosen], replace(meta, classes=meta.classes + unused))


def _train(arguments: argparse.Namespace, last: int, after: int = 0) -> list[dict]:
    """Train until step `last`; the rows of the log. Once resumed, the checkpoint of step `after` makes room."""
    folder = arguments.folder
    command = training_command(folder, arguments.config, arguments.batch, last, arguments.overrides)
    log = folder / "run" / "metrics.jsonl"
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(log, after, last, folder / "run/checkpoints", done))
    watcher.start()
    try:
        _run(*command)
    finally:
        done.set()
        watcher.join()
    return _rows(log)


def training_command(folder: Path, config: str, batch: int, last: int, overrides: Sequence[str]) -> list[str]:
    """Training on the codes in `folder`/codes until step `last`, by the deepspeed launcher; `folder`/run is its own."""
    (folder / "nvme").mkdir(exist_ok=True)
    settings = [
        *("engine.kind=zero", "engine.stage=3", "engine.offload_optimizer=nvme", f"engine.nvme_path={folder / 'nvme'}"),
        *("precision=bf16", "ema_decay=null", "model.gradient_checkpointing=true", f"output={folder / 'run'}"),
        *(f"data.train={folder / 'codes'}", f"data.validation={folder / 'codes'}", "data.streams=1"),
        *(f"training={{epochs: null, max_steps: {last}, batch_size: {batch}}}", "training.log_every=1"),
        *(f"training.micro_batch={batch}", "training.validate_every=null", "checkpoint.keep=1"),
        *("optimizer.scale_learning_rate=false", "optimizer.learning_rate=1e-4", "schedule.end=1.0"),
        *("schedule.warmup_epochs=null", "schedule.warmup_steps=0", *overrides),
    ]
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "1"]
    return [*launcher, "--master_port", str(_free_port()), "ibq/train_ar.py", "--config", config, *settings]


def _watch(log: Path, after: int, last: int, checkpoints: Path, done: threading.Event) -> None:
    """A progress bar; the checkpoint that was resumed from is removed when it has been read."""
    with progress_bar(f"xxl-step {after + 1}-{last}", last - after, "step") as progress:
        while not done.wait(1.0):
            steps = len(_rows(log)) - after
            progress.update(max(0, steps - progress.n))
            if after and steps > 0:
                shutil.rmtree(checkpoints / f"step-{after:08d}", ignore_errors=True)


def _rows(log: Path) -> list[dict]:
    lines = log.read_text().splitlines() if log.exists() else []
    return [row for row in map(json.loads, lines) if "loss/total" in row]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run(*command: str) -> None:
    say(f"$ {' '.join(command)}")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(f"{command[1]} ended with exit code {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
