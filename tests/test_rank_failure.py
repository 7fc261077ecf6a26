"""The training script when a rank dies: the run ends soon and says which it was, or torchrun starts it again."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from training_support import ROOT, SCRIPTS, checkpoint_tensors, make_workplace, scalars

from ibq.training.run import run_folder

STEPS, SAVE_EVERY = 120, 15
TIMING = ("seconds", "images_per", "tokens_per_s", "peak")
SOON_S = 25.0  # on a busy machine; alone it takes a few seconds
SETTINGS = [
    *(f"training.max_steps={STEPS}", f"checkpoint.save_every={SAVE_EVERY}", "checkpoint.keep=100"),
    *("training.micro_batch=4", "training.log_every=7", "training.validate_every=50", "model.residual_dropout=0.1"),
    *("heartbeat.every_s=0.3", "heartbeat.dead_after_s=4"),
]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run of two ranks under torchrun has ended."""

    folder: Path
    code: int
    seconds: float  # from the harm to the end
    victim: int  # process id
    before: dict[str, int]  # checkpoints at the moment of the harm, and their inodes
    stderr: str

    @property
    def status(self) -> dict:
        return json.loads((self.folder / "status.json").read_text())


def inodes(output: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in (output / "checkpoints").glob("step-*")}


def process_of(agent: int, rank: int) -> int:
    """The process id of a rank that torchrun has started."""
    for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"torchrun has no rank {rank}")


def play(place: Path, name: str, rank: int | None, number: int, *flags: str, restarts: int = 0) -> Outcome:
    """Run the training script; after two checkpoints send signal `number` to a rank, if any is given."""
    output, log = place / name, place / f"{name}.log"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
    script = [SCRIPTS["transformer"], "--config", str(place / "transformer.yaml"), f"output={output}", *SETTINGS]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(log, "wb") as file:
        agent = subprocess.Popen(
            [sys.executable, *launcher, *script, *flags], cwd=ROOT, env=environment, stdout=file, stderr=file
        )
    try:
        victim, before, start = 0, {}, time.monotonic()
        while rank is not None and len(before) < 2:
            assert agent.poll() is None and time.monotonic() < start + 120, log.read_text()
            time.sleep(0.005)
            before = inodes(output)
        if rank is not None:
            victim, start = process_of(agent.pid, rank), time.monotonic()
            os.kill(victim, number)
        code = agent.wait(150)
        seconds = time.monotonic() - start
    finally:
        agent.terminate()  # it takes its ranks along
        agent.wait(60)
    return Outcome(folder=output, code=code, seconds=seconds, victim=victim, before=before, stderr=log.read_text())


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Name -> how it ended; two at a time."""
    place = make_workplace(tmp_path_factory.mktemp("failures"))
    with ThreadPoolExecutor(2) as pool:
        plays = {
            "restarted": pool.submit(play, place, "restarted", 1, signal.SIGKILL, "--fresh", restarts=2),
            "whole": pool.submit(play, place, "whole", None, 0),
            "killed 1": pool.submit(play, place, "killed-1", 1, signal.SIGKILL),
            "killed 0": pool.submit(play, place, "killed-0", 0, signal.SIGKILL),
            "frozen 1": pool.submit(play, place, "frozen-1", 1, signal.SIGSTOP),
        }
    return {name: future.result() for name, future in plays.items()}


@pytest.mark.parametrize("name", ["killed 1", "killed 0", "frozen 1"])
def test_a_run_whose_rank_dies_ends_soon_and_names_it(outcomes, name):
    found, rank = outcomes[name], int(name[-1])
    assert found.code != 0 and found.seconds < SOON_S, found
    said = [line for line in found.stderr.splitlines() if "; all ranks end" in line]
    assert len(said) == 1, found.stderr
    assert f"rank {rank} (host {os.uname().nodename}, process {found.victim}) has died: last heard at step " in said[0]
    assert f"rank {1 - rank} " not in said[0]
    status = found.status
    assert status["state"] == "failed" and status["reason"] in said[0] and status["reason"].startswith(f"rank {rank} ")
    assert len(found.before) * SAVE_EVERY <= status["step"] < STEPS
    assert status["pid"] != found.victim, "a rank that is left writes it"


def deterministic(folder: Path) -> dict[str, dict[int, float]]:
    return {name: series for name, series in scalars(folder).items() if not any(word in name for word in TIMING)}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_torchrun_goes_on_by_itself_to_the_same_end(outcomes):
    whole, restarted = outcomes["whole"], outcomes["restarted"]
    assert whole.code == 0 and restarted.code == 0, restarted.stderr
    assert restarted.stderr.count(f"process {restarted.victim}) has died") == 1 and "has died" not in whole.stderr
    assert whole.status["state"] == restarted.status["state"] == "finished"
    assert equal(checkpoint_tensors(restarted.folder, STEPS), checkpoint_tensors(whole.folder, STEPS))
    assert not equal(checkpoint_tensors(whole.folder, STEPS - SAVE_EVERY), checkpoint_tensors(whole.folder, STEPS))
    assert deterministic(restarted.folder) == deterministic(whole.folder)
    # It went on instead of starting over, though the command line says --fresh.
    assert "--fresh: ignored" in restarted.stderr and restarted.before.items() <= inodes(restarted.folder).items()


@pytest.mark.parametrize("count", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_fresh_wipes_a_run_but_not_in_a_restart(tmp_path, monkeypatch, count, capsys):
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    for value, kept in (("1", True), ("0", False)):
        monkeypatch.setenv(count, value)
        (tmp_path / "config.yaml").touch()
        with run_folder(str(tmp_path), fresh=True) as folder:
            assert (folder / "config.yaml").exists() == kept
        assert ("--fresh: ignored" in capsys.readouterr().err) == kept
