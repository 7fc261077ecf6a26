"""Real processes, killed with SIGKILL at 20 random moments, end with what an undisturbed run ends with, bit by bit."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import ROOT
from support.training import SCRIPTS, checkpoint_tensors, make_workplace, scalars, train_here

STEPS = {"tokenizer": 60, "transformer": 240}
RHYTHM = {"tokenizer": (7, 10, 3), "transformer": (25, 40, 9)}  # save, validate, log: none a multiple of another
SETTINGS = {
    # A GAN that starts in the middle, a codebook from k-means, augmentation, worker processes.
    "tokenizer": [
        *("loss.gan.start_step=12", "codebook_start={kmeans: true, warmup_steps: 6, images: 40}", "ema_warmup=true"),
        *("data.in_memory=false", "data.workers=1", "data.augment.max_zoom=1.3", "data.streams=4"),
    ],
    "transformer": ["model.residual_dropout=0.1", "model.class_dropout=0.1", "data.streams=4"],
}
# How each life of a run ends: while it starts, while it trains, while it saves; of two ranks sometimes only one dies.
MOMENTS = ("train", "save", "start", "save", "train")
TIMING = ("seconds", "images_per", "tokens_per_s", "peak")


class Run:
    """One or two processes of one run."""

    def __init__(self, place: Path, stage: str, output: Path, ranks: int):
        self.place, self.stage, self.output, self.ranks = place, stage, output, ranks
        self.processes: list[subprocess.Popen] = []

    def arguments(self) -> list[str]:
        save, validate, log = RHYTHM[self.stage]
        return [
            *("--config", str(self.place / f"{self.stage}.yaml"), f"output={self.output}"),
            *(f"training.max_steps={STEPS[self.stage]}", f"checkpoint.save_every={save}"),
            *(f"training.validate_every={validate}", f"training.log_every={log}", *SETTINGS[self.stage]),
            f"training.micro_batch={8 // self.ranks}",
        ]

    def start(self) -> None:
        command = [sys.executable, SCRIPTS[self.stage], *self.arguments()]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        for rank in range(self.ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.ranks)}
            with open(self.output.with_suffix(f".log{rank}"), "ab") as log:
                self.processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=environment | own, stdout=log, stderr=log)
                )

    def finish(self) -> None:
        codes = [process.wait(120) for process in self.processes]
        assert codes == [0] * self.ranks, self.output.with_suffix(".log0").read_text()[-3000:]

    def alive(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def kill(self, only: int | None) -> None:
        """Kill all ranks, or one: the others must end by themselves."""
        chosen = self.processes if only is None else [self.processes[only]]
        for process in chosen:
            process.kill()
        for process in self.processes:
            code = process.wait(60)
            assert code == -signal.SIGKILL if process in chosen else code != 0
        self.processes = []

    def saving(self) -> bool:
        checkpoints = self.output / "checkpoints"
        return checkpoints.is_dir() and any(path.name.startswith(".tmp-step") for path in checkpoints.iterdir())

    def steps_logged(self) -> int:
        path = self.output / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0


def live_and_die(run: Run, moment: str, rng: random.Random) -> bool:
    """One life; whether it was cut off during a save."""
    before = run.steps_logged()
    run.start()
    deadline = time.monotonic() + 60

    def wait_for(condition) -> None:
        while not condition():
            assert run.alive(), (
                "it ended before it could be killed: " + run.output.with_suffix(".log0").read_text()[-2000:]
            )
            assert time.monotonic() < deadline
            time.sleep(0.0005)

    if moment == "start":
        time.sleep(rng.uniform(0.5, 4.0))
    else:
        wait_for(lambda: run.steps_logged() != before)
        time.sleep(rng.uniform(0.0, 0.4))
        if moment == "save":
            wait_for(run.saving)
            time.sleep(rng.uniform(0.0, 0.006))
    only = rng.randrange(2) if run.ranks == 2 and rng.random() < 0.3 else None
    run.kill(only)
    return run.saving()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("kill"))


cut_saves: list[bool] = []


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_killed_run_ends_like_an_undisturbed_one(place, tmp_path, stage, ranks):
    rng = random.Random(f"{stage} {ranks}")
    undisturbed, killed = (Run(place, stage, tmp_path / name, ranks) for name in ("undisturbed", "killed"))
    if ranks == 1:
        assert train_here(stage, undisturbed.arguments()) == 0
    else:
        undisturbed.start()
        undisturbed.finish()
    for moment in MOMENTS:
        cut_saves.append(live_and_die(killed, moment, rng))
    killed.start()
    killed.finish()
    compare(killed.output, undisturbed.output, STEPS[stage])


@pytest.mark.slow
def test_some_were_killed_during_a_save():
    """Twenty kills in all; an unfinished checkpoint was left behind by some of them."""
    assert len(cut_saves) == 4 * len(MOMENTS) == 20
    assert sum(cut_saves) >= 3


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
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {name: [event.step for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_a_difference_is_noticed(place, tmp_path):
    """The comparison sees a single other seed of the dropout."""
    config, steps = ["--config", str(place / "transformer.yaml")], 12
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        settings = [*SETTINGS["transformer"], f"training.max_steps={steps}", f"seed={seed}"]
        assert train_here("transformer", [*config, f"output={tmp_path / name}", *settings]) == 0
    compare(tmp_path / "same", tmp_path / "one", steps)
    with pytest.raises(AssertionError):
        compare(tmp_path / "other", tmp_path / "one", steps)
