"""Real processes, killed with SIGKILL at 20 places, end with what an undisturbed run ends with, bit by bit.

The places are chosen, not hoped for: the process stands there (support/points.py) when the signal comes.
"""

import json
import signal
import subprocess
from pathlib import Path
from typing import Literal, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from support.points import HANG_S, Points
from support.processes import Forked, rank_environments, script_environment, start_script
from support.training import SCRIPTS, checkpoint_tensors, make_workplace, scalars, train_here

STEPS = {"tokenizer": 60, "transformer": 240}
RHYTHM = {"tokenizer": (7, 10, 3), "transformer": (25, 40, 9)}  # save, validate, log: none a multiple of another
SETTINGS = {
    # A GAN that starts in the middle, a codebook from k-means, augmentation, worker processes, learning-rate groups.
    "tokenizer": [
        *("loss.gan.start_step=12", "codebook_start={kmeans: true, warmup_steps: 6, images: 40}", "ema_warmup=true"),
        *("data.in_memory=false", "data.workers=1", "data.augment.max_zoom=1.3", "data.streams=4"),
        "optimizer.groups={encoder.down.*: frozen, decoder.*: 0.5}",
    ],
    "transformer": [
        *("model.residual_dropout=0.1", "model.class_dropout=0.1", "data.streams=4"),
        "optimizer.groups={blocks.0.*: frozen, head.*: 0.5}",
    ],
}


class Place(NamedTuple):
    """Where a run is killed."""

    event: str  # that is about to happen; see support/points.py
    pattern: str
    ranks: Literal["each", "first"] = "first"  # that come there
    cut: bool = False  # an unfinished checkpoint is left behind


# Of each kind of moment some: while it starts, while it trains, while it saves.
START = {
    "its config is read": Place("open", r"/(tokenizer|transformer)\.yaml r", "each"),
    "its log is opened": Place("open", r"/events\.out\.tfevents"),
    "its status is written": Place("open", r"/\.tmp-\d+-status\.json"),
}
TRAIN = {"a step is logged": Place("open", r"/metrics\.jsonl a")}
SAVE = {
    "the folder is made": Place("shutil.rmtree", r"/\.tmp-step-\d+ "),
    "between two files": Place("open", r"/rank-\d\.safetensors w", "each", cut=True),
    "the state is written": Place("open", r"/\.tmp-step-\d+/\.tmp-\d+-state\.json", cut=True),
    "the manifest is written": Place("open", r"/\.tmp-step-\d+/\.tmp-\d+-manifest\.json", cut=True),
    "before the rename": Place("os.rename", r"/\.tmp-step-\d+ ", cut=True),
    "after the rename": Place("open", r"/checkpoints None"),
    "an old one is removed": Place("shutil.rmtree", r"/checkpoints/step-\d+ "),
    "the best is written": Place("open", r"/\.tmp-best/model\.safetensors"),
    "the best takes its place": Place("os.rename", r"/\.tmp-best "),
}
PLACES = START | TRAIN | SAVE


class Life(NamedTuple):
    """How a life of a run ends."""

    place: str
    time: int = 1  # at which it comes there in this life
    only: int | None = None  # of two ranks this one alone dies


LIVES = {
    ("tokenizer", 1): [
        *(Life("a step is logged", 2), Life("between two files"), Life("its config is read")),
        *(Life("before the rename", 2), Life("the best takes its place")),
    ],
    ("tokenizer", 2): [
        *(Life("a step is logged", 3, only=1), Life("the manifest is written"), Life("its status is written")),
        *(Life("after the rename"), Life("a step is logged", 5)),
    ],
    ("transformer", 1): [
        *(Life("the best is written"), Life("the folder is made", 3), Life("its log is opened")),
        *(Life("the state is written"), Life("a step is logged", 4)),
    ],
    ("transformer", 2): [
        *(Life("a step is logged", 7), Life("between two files", only=0), Life("its config is read")),
        *(Life("an old one is removed"), Life("a step is logged", 6, only=0)),
    ],
}
TIMING = ("seconds", "images_per", "tokens_per_s", "peak")


class Run:
    """One or two processes of one run."""

    def __init__(self, place: Path, stage: str, output: Path, ranks: int):
        self.place, self.stage, self.output, self.ranks = place, stage, output, ranks
        self.processes: list[Forked | subprocess.Popen] = []

    def arguments(self) -> list[str]:
        save, validate, log = RHYTHM[self.stage]
        return [
            *("--config", str(self.place / f"{self.stage}.yaml"), f"output={self.output}"),
            *(f"training.max_steps={STEPS[self.stage]}", f"checkpoint.save_every={save}"),
            *(f"training.validate_every={validate}", f"training.log_every={log}", *SETTINGS[self.stage]),
            f"training.micro_batch={8 // self.ranks}",
        ]

    def start(self, **environment: str) -> None:
        for rank, own in enumerate(rank_environments(self.ranks)):
            whole = script_environment(**own | environment)
            with open(self.output.with_suffix(f".log{rank}"), "ab") as log:
                command = (SCRIPTS[self.stage], *self.arguments())
                self.processes.append(start_script(*command, environment=whole, stdout=log, stderr=log))

    def finish(self) -> None:
        codes = [process.wait(HANG_S) for process in self.processes]
        assert codes == [0] * self.ranks, self.output.with_suffix(".log0").read_text()[-3000:]

    def alive(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def kill(self, only: int | None, points: Points) -> None:
        """Kill all ranks, or one: the others must end by themselves."""
        chosen = self.processes if only is None else [self.processes[only]]
        for process in chosen:
            process.kill()
            process.wait()
        points.release("place")
        for process in self.processes:
            code = process.wait(HANG_S)
            assert code == -signal.SIGKILL if process in chosen else code != 0
        self.processes = []

    def saving(self) -> bool:
        checkpoints = self.output / "checkpoints"
        return checkpoints.is_dir() and any(path.name.startswith(".tmp-step") for path in checkpoints.iterdir())

    def steps_logged(self) -> int:
        path = self.output / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0


def live_and_die(run: Run, life: Life, folder: Path) -> None:
    place = PLACES[life.place]
    points = Points(folder, {"place": (place.event, place.pattern, life.time)})
    run.start(**points.environment)
    standing = points.wait("place", *run.processes, count=run.ranks if place.ranks == "each" else 1)
    assert set(standing) <= {process.pid for process in run.processes}
    run.kill(life.only, points)
    if life.place not in START and life.only is None:  # a start finds what the life before has left
        assert run.saving() == place.cut


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("kill"))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_killed_run_ends_like_an_undisturbed_one(place, tmp_path, stage, ranks):
    undisturbed, killed = (Run(place, stage, tmp_path / name, ranks) for name in ("undisturbed", "killed"))
    if ranks == 1:
        assert train_here(stage, undisturbed.arguments()) == 0
    else:
        undisturbed.start()
        undisturbed.finish()
    for number, life in enumerate(LIVES[stage, ranks]):
        live_and_die(killed, life, tmp_path / f"points-{number}")
    killed.start()
    killed.finish()
    compare(killed.output, undisturbed.output, STEPS[stage])


def test_every_place_is_one_of_the_twenty():
    """Some of them within a save, where an unfinished checkpoint is left behind."""
    lives = [life for some in LIVES.values() for life in some]
    assert len(lives) == 20 and {life.place for life in lives} == set(PLACES)
    assert sum(PLACES[life.place].cut for life in lives) >= 3


def compare(one: Path, other: Path, steps: int) -> None:
    """Fail unless two runs have left the same behind."""
    left, right = (checkpoint_tensors(folder, steps) for folder in (one, other))
    assert_identical(left, right)  # weights, averages, moments, LeCAM, batch statistics, of every rank
    assert_identical(load_file(one / "best/model.safetensors"), load_file(other / "best/model.safetensors"))
    states = [json.loads((folder / f"checkpoints/step-{steps:08d}/state.json").read_text()) for folder in (one, other)]
    assert states[0] == states[1] and states[0]["position"] == 8 * steps
    best = [json.loads((folder / "best/info.json").read_text()) for folder in (one, other)]
    assert best[0] == best[1]
    names = [sorted(path.name for path in (folder / "checkpoints").iterdir()) for folder in (one, other)]
    assert names[0] == names[1]
    logs = [scalars(folder) for folder in (one, other)]  # which fails where a step is logged twice
    assert logs[0].keys() == logs[1].keys()
    for name, series in logs[0].items():
        assert list(series) == sorted(series) and series.keys() == logs[1][name].keys(), name
        if not name.startswith(TIMING):
            assert series == logs[1][name], name
    assert tensorboard_steps(one) == tensorboard_steps(other)
    assert [json.loads((folder / "status.json").read_text())["state"] for folder in (one, other)] == ["finished"] * 2


def assert_identical(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different, different


def tensorboard_steps(folder: Path) -> dict[str, list[int]]:
    """Of every tag; all that the files say, as TensorBoard's data server shows them, and its Python loader does."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    found: dict[str, list[int]] = {}
    for path in sorted((folder / "tensorboard").iterdir(), key=lambda path: path.stat().st_ctime_ns):
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                found.setdefault(value.tag, []).append(event.step)
    assert all(steps == sorted(set(steps)) for steps in found.values()), "a step is there twice"
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    for name in events.Tags()["scalars"]:
        assert found[name] == [event.step for event in events.Scalars(name)]
    return found


def test_a_difference_is_noticed(place, tmp_path):
    """The comparison sees a single other seed of the dropout."""
    config, steps = ["--config", str(place / "transformer.yaml")], 12
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        settings = [*SETTINGS["transformer"], f"training.max_steps={steps}", f"seed={seed}"]
        assert train_here("transformer", [*config, f"output={tmp_path / name}", *settings]) == 0
    compare(tmp_path / "same", tmp_path / "one", steps)
    with pytest.raises(AssertionError):
        compare(tmp_path / "other", tmp_path / "one", steps)
