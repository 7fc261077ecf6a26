"""Download, import and measure a published model.

python tools/published.py ibq-16384 --images 'shards/val-*.tar'
python tools/published.py ar-b --reference VIRTUAL_imagenet256_labeled.npz --processes 8
python tools/published.py list

Every part is one command, printed before it runs. A file that has been downloaded before is taken as it is.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ibq.config import UserError, exit_on_user_error
from ibq.interop.catalogue import CATALOGUE, Entry
from ibq.progress import say
from tools.lib import ROOT
from tools.lib.options import add_device_option, check_least, words_of

SAMPLES = 50_000  # of the published FID: 50 of each class

# --- Commands ---


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("name", choices=["list", *CATALOGUE], metavar="NAME", help="of a model, or list: all of them")
    add("--output", type=Path, default=Path("published"), help="folder (default: %(default)s)")
    add("--file", type=Path, help="the published file, where it has been downloaded before")
    add("--images", help="tokenizers: real images to reconstruct, as for tools/evaluate.py; without them no figures")
    add("--resolution", type=int, help="tokenizers: pixels along a side (default: those of the published figure)")
    add("--reference", help="transformers: ADM's statistics of ImageNet; without them no figures")
    add("--total", type=int, default=SAMPLES, help="transformers: images to draw (default: %(default)s)")
    add("--processes", type=int, default=1, help="that share sampling and evaluation, one a GPU")
    add_device_option(parser)
    add("--dry-run", action="store_true", help="print the commands, and run none")
    return parser.parse_args(argv)


def commands(arguments: argparse.Namespace) -> Iterator[list[str]]:
    """The command of every part."""
    entry, folder = CATALOGUE[arguments.name], arguments.output
    model = folder / f"{arguments.name}.safetensors"
    file = arguments.file or folder / entry.file
    if arguments.file is None and not file.exists():
        yield ["hf", "download", entry.repository, entry.file, "--local-dir", str(folder)]
    importing = ["python", "tools/convert.py", "import", entry.family, str(file), str(model)]
    if not entry.is_transformer:
        importing += ["--resolution", str(arguments.resolution or entry.resolution)]
    yield importing
    yield from _generation(entry, model, arguments) if entry.is_transformer else _reconstruction(model, arguments)


def _reconstruction(model: Path, arguments: argparse.Namespace) -> Iterator[list[str]]:
    if arguments.images:
        figures = model.with_suffix(".json")
        measure = ["reconstruction", "--tokenizer", str(model), "--images", arguments.images, "--json", str(figures)]
        yield [*_script("tools/evaluate.py", arguments), *measure, "--device", arguments.device]


def _generation(entry: Entry, model: Path, arguments: argparse.Namespace) -> Iterator[list[str]]:
    samples = model.with_name(f"{arguments.name}-samples")
    draw = ["--tokenizer", str(model.with_suffix(".tokenizer.safetensors")), "--transformer", str(model)]
    draw += ["--total", str(arguments.total), "--output", str(samples), "--files", "none"]
    draw += [*words_of(entry.sampler), "--device", arguments.device]
    yield [*_script("tools/sample.py", arguments), *draw]
    if arguments.reference:
        figures = model.with_suffix(".json")
        measure = ["generation", "--samples", str(samples / "samples.npz"), "--reference", arguments.reference]
        measure += ["--json", str(figures), "--device", arguments.device]
        yield [*_script("tools/evaluate.py", arguments), *measure]


def _script(script: str, arguments: argparse.Namespace) -> list[str]:
    if arguments.processes == 1:
        return ["python", script]
    return ["torchrun", "--nproc-per-node", str(arguments.processes), script]


# --- Running them ---


def main(argv: Sequence[str] | None = None) -> None:
    """Do what the command line says."""
    arguments = parse(argv)
    if arguments.name == "list":
        show_list()
        return
    check(arguments)
    for command in commands(arguments):
        say(shlex.join(command))
        if not arguments.dry_run:
            run(command)
    if not arguments.dry_run and (arguments.images or arguments.reference):
        show_figures(CATALOGUE[arguments.name], arguments.output / f"{arguments.name}.json")


def check(arguments: argparse.Namespace) -> None:
    """UserError for options that the model has no use for."""
    entry = CATALOGUE[arguments.name]
    others = {"--images": arguments.images, "--resolution": arguments.resolution}
    if not entry.is_transformer:
        others = {"--reference": arguments.reference}
    for option, value in others.items():
        if value is not None:
            raise UserError(f"{option}: {arguments.name} has no use for it; see --help")
    check_least(arguments, total=1, processes=1)


def run(command: list[str]) -> None:
    """Run a part; UserError where it fails, or is not installed."""
    tools = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    tools["hf"] = [sys.executable, "-m", "huggingface_hub.cli.hf"]
    words = [str(ROOT / word) if word.startswith("tools/") else word for word in command[1:]]
    done = subprocess.run([*tools[command[0]], *words], check=False)
    if done.returncode:
        raise UserError(f"the command above ended with exit code {done.returncode}; see what it says")


def show_list() -> None:
    """Print all models."""
    for name, entry in CATALOGUE.items():
        figures = ", ".join(f"{figure} {value:g}" for figure, value in entry.reported.items())
        print(f"{name:30s} {entry.repository + '/' + entry.file:75s} reported: {figures}")


def show_figures(entry: Entry, figures: Path) -> None:
    """Print the measured figures beside the published ones."""
    metrics = json.loads(figures.read_text())["metrics"]
    against = next((value for value in metrics.values() if isinstance(value, dict)), {})
    measured = metrics | against
    print(f"{'':20s} {'published':>12s} {'measured':>12s}")
    for name, value in entry.reported.items():
        found = measured.get(name)
        print(f"{name:20s} {value:12.4f} {'-' if found is None else format(found, '12.4f'):>12s}")


if __name__ == "__main__":
    exit_on_user_error(main)
