"""How many files a reader opens to follow one training step, or one image, from the command down; held down here.

    python -m pytest tests/unit/test_way.py -s      prints the files

A step's way is the entry script, what the entry scripts share, the loop, and what runs while the task makes a step, but
for what serves every line of the code alike (SERVICES). Beside it stands all that runs from one step to the next: the
data, the log, the saving, the signs of life. Counted in the third step of a run, when all has been set up.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from support import ROOT
from support.training import CLASSES, CODES, SCRIPTS, SIDE, make_workplace, train_here, write_best

from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.models.transformer import Transformer, TransformerConfig
from ibq.quantizers import IBQConfig
from ibq.training import loop
from ibq.training.ar_task import ARTask
from ibq.training.tokenizer_task import TokenizerTask
from tools import sample

SERVICES = {
    "ibq/dist.py",
    "ibq/progress.py",
    "ibq/engine/heartbeat.py",
    "ibq/engine/watch.py",
    "ibq/training/metrics.py",
}
TASKS = {"tokenizer": TokenizerTask, "transformer": ARTask}
MOST = {"tokenizer": 19, "transformer": 12}  # files on the way of a step
MOST_IN_ALL = {"tokenizer": 31, "transformer": 22}  # and of all that runs from one step to the next
MOST_OF_AN_IMAGE = 13
QUIET = ("training.max_steps=5", "training.log_every=50", "training.validate_every=null", "checkpoint.save_every=50")


@contextmanager
def noting(files: set[str]) -> Iterator[None]:
    """Add the files of this project, relative to it, whose functions this thread runs within the context."""
    root = f"{ROOT}/"

    def note(frame, event: str, _argument) -> None:
        if event == "call" and frame.f_code.co_filename.startswith((f"{root}ibq/", f"{root}tools/")):
            files.add(frame.f_code.co_filename.removeprefix(root))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(before)


def show(title: str, files: set[str]) -> None:
    print(f"\n{title}: {len(files)}", *sorted(files), sep="\n    ")


@pytest.mark.parametrize("stage", TASKS)
def test_the_way_of_a_step(stage, tmp_path, monkeypatch):
    way, between, begun = set(), set(), []
    task, seed_step = TASKS[stage], loop.seed_step
    step, body = task.step, noting(between)

    def seeded(seed: int, number: int) -> None:
        if number == 2:
            body.__enter__()
        if number == 3:
            body.__exit__(None, None, None)
        seed_step(seed, number)
        begun.append(number)

    def made(self, number: int, *arguments):
        if number != 3:
            return step(self, number, *arguments)
        with noting(way):
            return step(self, number, *arguments)

    monkeypatch.setattr(loop, "seed_step", seeded)
    monkeypatch.setattr(task, "step", made)
    config = make_workplace(tmp_path) / f"{stage}.yaml"
    assert train_here(stage, ["--config", str(config), f"output={tmp_path / 'run'}", *QUIET]) == 0
    assert begun == [0, 1, 2, 3, 4]
    way = way - SERVICES | {SCRIPTS[stage], "ibq/training/run.py", "ibq/training/loop.py"}
    show(f"the way of a step of the {stage}", way)
    show("besides, from one step to the next", between - way)
    assert {f"ibq/training/{'tokenizer' if stage == 'tokenizer' else 'ar'}_task.py", "ibq/engine/local.py"} <= way
    assert len(way) <= MOST[stage]
    assert len(way | between) <= MOST_IN_ALL[stage]


def test_the_way_of_an_image(tmp_path, monkeypatch):
    torch.manual_seed(0)
    tokenizer = TokenizerConfig(
        resolution=16, channels=32, channel_multipliers=(1, 1, 1), res_blocks=1, attention_resolutions=(),
        latent_channels=16, quantizer=IBQConfig(num_codes=CODES, dim=16),
    )  # fmt: skip
    transformer = TransformerConfig(
        vocab_size=CODES, num_classes=CLASSES, tokens_per_side=SIDE, depth=2, heads=2, width=32
    )
    write_best(tmp_path / "tokenizer", Tokenizer(tokenizer))
    write_best(tmp_path / "transformer", Transformer(transformer))
    way, draw = set(), sample.draw

    def noted(*arguments) -> None:
        with noting(way):
            draw(*arguments)

    monkeypatch.setattr(sample, "draw", noted)
    models = [f"--{name}={tmp_path / name}" for name in ("tokenizer", "transformer")]
    try:
        sample.main([*models, f"--output={tmp_path / 'out'}", "--device=cpu", "--classes=1", "--count=1", "--rows=2"])
    finally:
        torch.set_flush_denormal(False)
    way -= SERVICES | {"ibq/files.py", "tools/lib/sample/files.py"}  # the writing, when it is drawn
    show("the way of an image", way)
    assert {"tools/sample.py", "ibq/sampling.py", "ibq/models/tokenizer.py"} <= way
    assert len(way) <= MOST_OF_AN_IMAGE
