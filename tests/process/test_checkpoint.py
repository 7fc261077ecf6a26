"""Checkpoints that are damaged, that can't be written, that belong to others; what is kept and what is trusted."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from support import ROOT, needs
from support.points import HANG_S, Points
from support.processes import run_script, script_environment, start_script
from support.training import (
    checkpoint_tensors,
    make_workplace,
    picture,
    png,
    scalars,
    train_here,
    write_images,
    write_shard,
)

from ibq.data.index import sha256_of
from ibq.engine.base import EngineSettings, OptimizerConfig
from ibq.engine.blueprint import Blueprint
from ibq.engine.local import LocalEngine
from ibq.training import checkpoint
from ibq.training.checkpoint import DamagedError, verify_checkpoint
from ibq.training.staging import Staging, available_bytes


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def trained(place):
    """A tokenizer run with checkpoints at steps 2 and 4."""
    assert train_here("tokenizer", ["--config", str(place / "tokenizer.yaml"), f"output={place / 'trained'}"]) == 0
    return place / "trained"


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


def go_on(place, run, *overrides, stage="tokenizer"):
    return train_here(stage, ["--config", str(place / f"{stage}.yaml"), f"output={run}", *overrides])


def flip_a_bit(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGE = {
    "a bit of the weights": ("tokenizer-0000.safetensors", flip_a_bit),
    "weights cut off": ("tokenizer-0000.safetensors", lambda data: data[: len(data) // 2]),
    "weights empty": ("tokenizer-0000.safetensors", lambda data: b""),
    "no discriminator": ("discriminator-0000.safetensors", None),
    "a rank's own tensors": ("rank-0.safetensors", flip_a_bit),
    "step tampered with": ("state.json", lambda data: data.replace(b'"step": 4', b'"step": 9')),
    "no state": ("state.json", None),
    "manifest cut off": ("manifest.json", lambda data: data[:40]),
    "manifest of nothing": ("manifest.json", lambda data: b"{}"),
    "no manifest": ("manifest.json", None),
    "a file too many": ("rank-7.safetensors", lambda data: b"x"),
}


def damage(run: Path, name: str, step: int = 4) -> str:
    file, change = DAMAGE[name]
    path = run / f"checkpoints/step-{step:08d}" / file
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes() if path.exists() else b""))
    return file


@pytest.mark.parametrize("name", DAMAGE)
def test_the_one_before_a_damaged_one_is_used(place, trained, run, name, capsys):
    file = damage(run, name)
    assert go_on(place, run) == 0
    said = next(line for line in capsys.readouterr().err.splitlines() if "set aside" in line)
    assert "step-00000004" in said and "going on from step-00000002" in said
    assert file in said or "manifest.json" in said
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["damaged-step-00000004", "step-00000002", "step-00000004"]
    again, before = checkpoint_tensors(run, 4), checkpoint_tensors(trained, 4)
    assert all(torch.equal(again[key], before[key]) for key in before) and again.keys() == before.keys()
    assert sorted(scalars(run)["loss/total"]) == [1, 2, 3, 4]


def test_all_damaged_is_an_error_and_nothing_is_touched(place, run, capsys):
    damage(run, "a bit of the weights", step=2)
    damage(run, "a bit of the weights", step=4)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    assert go_on(place, run, "seed=5") == 2
    error = capsys.readouterr().err
    assert "step-00000004: tokenizer-0000.safetensors is not what was written" in error and "--fresh" in error
    assert {path: path.read_bytes() for path in before} == before, "not even its config.yaml"


def test_another_version_is_no_damage(place, run, capsys):
    for step in (2, 4):
        folder = run / f"checkpoints/step-{step:08d}"
        state = folder / "state.json"
        state.write_text(state.read_text().replace('"format": 3', '"format": 99'))
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"]["state.json"] = {"bytes": state.stat().st_size, "sha256": sha256_of(state)}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    assert go_on(place, run) == 2
    error = capsys.readouterr().err
    assert "another version" in error and "--fresh" in error and "set aside" not in error


def test_a_refused_run_keeps_its_config(place, run, capsys):
    before = (run / "config.yaml").read_bytes(), (run / "status.json").read_bytes()
    assert go_on(place, run, "model.res_blocks=2") == 2
    assert "another model" in capsys.readouterr().err
    assert ((run / "config.yaml").read_bytes(), (run / "status.json").read_bytes()) == before


def test_verify(trained, tmp_path):
    verify_checkpoint(trained / "checkpoints/step-00000004")
    with pytest.raises(DamagedError, match="manifest"):
        verify_checkpoint(tmp_path)


def test_the_last_ones_and_the_best_are_kept(place, tmp_path):
    """A learning rate that ruins the model after its second step."""
    settings = ["training.max_steps=7", "training.validate_every=1", "checkpoint.save_every=1", "checkpoint.keep=2"]
    assert go_on(place, tmp_path / "run", *settings, "optimizer.learning_rate=0.3") == 0
    best = json.loads((tmp_path / "run/best/info.json").read_text())["step"]
    names = {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    assert names == {f"step-{step:08d}" for step in {best, 6, 7}} and best < 6


# --- What is written last is there or not ---


@pytest.mark.parametrize(("lead", "warnings"), [("0", 1), ("1000", 0), (None, 0)])
def test_a_save_longer_than_the_lead_of_the_warning(place, tmp_path, monkeypatch, capfd, lead, warnings):
    if lead is not None:
        monkeypatch.setenv("IBQ_WARNING_S", lead)
    argv = ["--config", str(place / "transformer.yaml"), f"output={tmp_path / 'run'}", "training.max_steps=4"]
    assert train_here("transformer", [*argv, "checkpoint.save_every=2"]) == 0
    assert capfd.readouterr().err.count("raise --signal=...@0 ") == warnings


def test_leftovers_are_removed(place, run):
    checkpoints = run / "checkpoints"
    (checkpoints / ".tmp-step-00000005").mkdir()
    (checkpoints / ".tmp-step-00000005" / "state.json").write_text("{")
    # Killed between the two renames of a checkpoint that replaces another of the same step.
    (checkpoints / "step-00000004").rename(checkpoints / ".old-step-00000004")
    assert go_on(place, run) == 0
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000002", "step-00000004"]
    assert sorted(scalars(run)["loss/total"]) == [1, 2, 3, 4]


# --- A full disk ---


class SmallDisk:
    """A file system of a few megabytes, in a namespace of its own; `run` starts a command that sees it."""

    def __init__(self, folder: Path, megabytes: int):
        self.folder, self.log = folder, folder.with_suffix(".log")
        folder.mkdir()
        # The process that holds the mount: it does what it is told through its standard input.
        script = f"mount -t tmpfs -o size={megabytes}m tmpfs {folder} && echo ready && exec bash"
        self.holder = subprocess.Popen(
            ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() else []), "bash", "-c", script],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.holder.stdout.readline() == "ready\n", "a file system for the test could not be mounted"

    def path(self, name: str) -> Path:
        """The file as seen from outside."""
        return Path(f"/proc/{self.holder.pid}/root{self.folder}") / name

    def run(self, *command: str, **environment: str) -> subprocess.Popen:
        enter = ["nsenter", f"--target={self.holder.pid}", "--mount", f"--wd={ROOT}"]
        if os.geteuid():
            enter += ["--user", "--preserve-credentials"]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
        with open(self.log, "w") as log:
            return subprocess.Popen([*enter, sys.executable, *command], env=env, stderr=log)

    def said(self) -> str:
        """What the last command that was started has said on stderr."""
        return self.log.read_text()

    def fill(self) -> None:
        with open(self.path("filler"), "wb", buffering=0) as file:
            try:
                while file.write(bytes(2**16)):
                    pass
            except OSError:
                pass

    def free(self) -> None:
        self.path("filler").unlink()

    def close(self) -> None:
        self.holder.kill()
        self.holder.wait()


@pytest.fixture
def disk(tmp_path):
    needs.require(*needs.SMALL_DISK)
    disk = SmallDisk(tmp_path / "disk", 24)
    yield disk
    disk.close()


def saved_steps(disk) -> list[int]:
    folder = disk.path("run/checkpoints")
    return sorted(int(p.name[5:]) for p in folder.iterdir() if p.name.startswith("step-")) if folder.is_dir() else []


FULL = ["training.max_steps=60", "training.validate_every=50", "checkpoint.save_every=20", "training.log_every=5"]


def fill_before_second_save(disk, folder: Path, *command: str) -> subprocess.Popen:
    """A run that finds no room for its second checkpoint."""
    points = Points(folder, {"second save": ("os.mkdir", r"/\.tmp-step-00000040 ")})
    process = disk.run(*command, **points.environment)
    points.wait("second save", process)
    assert saved_steps(disk) == [20]
    disk.fill()
    points.release("second save")
    return process


@pytest.mark.slow
def test_a_full_disk_costs_a_checkpoint_not_the_run(place, disk, tmp_path):
    """The disk fills up, the run goes on, the disk has room again, the run saves again; nothing is lost of the log."""
    points = Points(
        tmp_path / "points",
        {
            "full": ("os.mkdir", r"/\.tmp-step-00000040 "),
            "room": ("os.mkdir", r"/\.tmp-step-00000060 "),
            "end": ("os.mkdir", r"/\.tmp-step-00000080 "),
        },
    )
    command = ["ibq/train_tokenizer.py", "--config", str(place / "tokenizer.yaml"), f"output={disk.folder}/run", *FULL]
    process = disk.run(*command, "training.max_steps=200", **points.environment)
    points.wait("full", process)
    disk.fill()
    points.release("full")
    points.wait("room", process)  # it has gone on to the next save
    assert "could not be written" in disk.said()
    assert saved_steps(disk) == [20] and not list(disk.path("run/checkpoints").glob(".tmp-*"))
    verify_checkpoint(disk.path("run/checkpoints/step-00000020"))
    disk.free()
    points.release("room")
    points.wait("end", process)
    assert saved_steps(disk) == [20, 60]
    process.terminate()
    points.release("end")
    assert process.wait(HANG_S) == 143, disk.said()[-3000:]
    stderr = disk.said()
    warnings = [line for line in stderr.splitlines() if "WARNING" in line]
    assert any("could not be written" in line and "No space left" in line and "is kept" in line for line in warnings)
    assert "Traceback" not in stderr
    metrics = disk.path("run/metrics.jsonl")
    steps = [row["step"] for row in map(json.loads, metrics.read_text().splitlines()) if "loss/total" in row]
    assert steps == list(range(5, 81, 5)), "rows that could not be written were written later"
    status = json.loads(disk.path("run/status.json").read_text())
    assert status["state"] == "stopped" and status["step"] == saved_steps(disk)[-1] == 80


@pytest.mark.slow
def test_a_run_may_rather_stop(place, disk, tmp_path):
    common = ["ibq/train_tokenizer.py", "--config", str(place / "tokenizer.yaml"), f"output={disk.folder}/run", *FULL]
    process = fill_before_second_save(disk, tmp_path / "points", *common, "checkpoint.on_error=stop")
    assert process.wait(HANG_S) == 2
    error = [line for line in disk.said().splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and "No space left" in error[0] and "goes on from step 20" in error[0]
    assert saved_steps(disk) == [20]
    verify_checkpoint(disk.path("run/checkpoints/step-00000020"))
    disk.free()
    again = disk.run(*common, "training.max_steps=23")
    assert again.wait(HANG_S) == 0, disk.said()
    assert saved_steps(disk)[-1] == 23


@pytest.mark.slow
def test_a_run_that_cannot_save_its_end_says_so(place, disk, tmp_path):
    """The last checkpoint is what the run was for: without it the exit code is not 0."""
    command = ["ibq/train_tokenizer.py", "--config", str(place / "tokenizer.yaml"), f"output={disk.folder}/run"]
    process = fill_before_second_save(disk, tmp_path / "points", *command, *FULL, "training.max_steps=50")
    assert process.wait(HANG_S) == 2
    assert "make room and start the same command again" in disk.said().splitlines()[-1]


# --- Two runs, one folder ---


def test_a_second_run_in_the_same_folder_is_refused(place, tmp_path):
    command = ["ibq/train_ar.py", "--config", str(place / "transformer.yaml"), f"output={tmp_path}/run"]
    points = Points(tmp_path / "points", {"logs": ("open", r"/metrics\.jsonl a")})
    first = start_script(*command, environment=script_environment(**points.environment), stderr=subprocess.DEVNULL)
    try:
        points.wait("logs", first)
        second = run_script(*command)
        assert second.returncode == 2 and "another run is writing" in second.stderr
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    assert go_on(place, tmp_path / "run", "training.max_steps=1", "--fresh", stage="transformer") == 0


# --- Trust: nothing of somebody else's is unpickled ---


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_a_trap_in_a_data_set_is_not_sprung(place, tmp_path):
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    pickle.loads(trap)
    assert (tmp_path / "sprung").exists(), "the trap works"
    (tmp_path / "sprung").unlink()
    write_images(tmp_path / "data")
    members = {"0.pyd": trap, "0.pkl": trap, "0.pth": trap, "0.npy": trap, "0.png": png(picture(0)), "0.cls": b"0"}
    write_shard(tmp_path / "data/train-1.tar", members)
    data = [f"data.train={tmp_path}/data/train-*.tar", f"data.cache_folder={tmp_path}/cache"]
    assert go_on(place, tmp_path / "run", *data, "training.max_steps=5") == 0
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("file", ["codes-00000.npy", "labels-00000.npy"])
def test_a_trap_in_codes_is_not_sprung(place, tmp_path, file, capsys):
    import numpy as np

    shutil.copytree(place / "data/codes", tmp_path / "codes")
    np.save(tmp_path / "codes" / file, np.array([Trap(tmp_path / "sprung")], dtype=object), allow_pickle=True)
    assert go_on(place, tmp_path / "run", f"data.train={tmp_path}/codes", stage="transformer") == 2
    assert "codes" in capsys.readouterr().err and not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt"])
def test_a_trap_in_a_model_is_not_sprung(place, tmp_path, name, capsys):
    torch.save({"state_dict": {"a": torch.zeros(1)}, "trap": Trap(tmp_path / "sprung")}, tmp_path / name)
    settings = ["data.kind=images", f"data.tokenizer={tmp_path / name}", f"data.train={place}/data/train-*.tar"]
    assert go_on(place, tmp_path / "run", *settings, stage="transformer") == 2
    assert name in capsys.readouterr().err and not (tmp_path / "sprung").exists()


def test_a_trap_in_a_run_folder_is_not_sprung(place, run, tmp_path):
    """A foreign run is a folder of JSON, YAML and safetensors; anything else in it is not opened."""
    for folder in (run, run / "checkpoints", run / "best"):
        for name in ("optimizer.pt", "state.pkl", "data.pkl"):
            torch.save(Trap(tmp_path / "sprung"), folder / name)
    assert go_on(place, run, "training.max_steps=6") == 0
    assert not (tmp_path / "sprung").exists()


def test_no_source_unpickles():
    """Not even by accident: what would has a safe form, and that is what the code says."""
    unsafe = re.compile(
        r"pickle\.loads?\(|allow_pickle=True|weights_only=False|yaml\.(load|unsafe_load|full_load)\(|\.decode\(\"(pil|torch)|"
        r"all_gather_object|broadcast_object|gather_object|scatter_object"
    )
    for path in [*(ROOT / "ibq").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]:
        text = path.read_text()
        assert not unsafe.search(text), path
        for call in re.finditer(r"torch\.load\(", text):
            assert "weights_only=True" in text[call.start() : call.start() + 200], path
        assert "SafeLoader" in text or "yaml.load(" not in text, path


# --- Saving while training goes on ---

ASYNCHRONOUS = ("checkpoint.asynchronous=true", "checkpoint.save_every=1", "checkpoint.keep=10")


def as_late_as_it_can(monkeypatch) -> None:
    """Let a checkpoint be written when the loop waits for it: if it is no copy, the next step has changed it."""
    waited_for, write, wait = threading.Event(), checkpoint.write_pieces, checkpoint.CheckpointWriter.wait

    def write_late(*arguments):
        assert waited_for.wait(HANG_S)
        return write(*arguments)

    def wait_early(writer):
        waited_for.set()
        try:
            return wait(writer)
        finally:
            waited_for.clear()

    monkeypatch.setattr(checkpoint, "write_pieces", write_late)
    monkeypatch.setattr(checkpoint.CheckpointWriter, "wait", wait_early)


@pytest.mark.parametrize("late", [False, True])
def test_a_checkpoint_written_beside_the_steps_is_that_of_its_step(place, tmp_path, monkeypatch, late):
    def train(name: str, *overrides: str):
        folder = tmp_path / name
        argv = ["--config", str(place / "transformer.yaml"), f"output={folder}", "training.validate_every=null"]
        assert train_here("transformer", [*argv, "training.max_steps=6", *overrides]) == 0
        return folder

    waiting = train("waiting", *ASYNCHRONOUS[1:])
    if late:
        as_late_as_it_can(monkeypatch)
    beside = train("beside", *ASYNCHRONOUS)
    saved = [path.name for path in checkpoint.checkpoints_in(beside / "checkpoints")]
    assert saved == [path.name for path in checkpoint.checkpoints_in(waiting / "checkpoints")]
    for step in range(1, 7):
        ours, theirs = (checkpoint_tensors(folder, step) for folder in (beside, waiting))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items()), step
    # The control: the steps do differ.
    first, second = (checkpoint_tensors(beside, step) for step in (1, 2))
    assert not torch.equal(first["transformer/weight/head.weight"], second["transformer/weight/head.weight"])


def test_training_waits_where_there_is_no_room_for_copies(tmp_path, monkeypatch, capsys):
    """By default on a CPU, and on a GPU whose machine has no room for them; what is asked for is done."""
    settings = EngineSettings(optimizer=OptimizerConfig(), device=torch.device("cpu"))
    engines = {"x": LocalEngine(Blueprint(name="x", build=lambda: torch.nn.Linear(4, 4), seed=0), settings)}
    for wanted, device, free, found in (
        (None, "cpu", 1e12, False),
        (None, "cuda", 160.0, True),  # twice the bytes of its 20 elements
        (None, "cuda", 159.0, False),
        (True, "cpu", 0.0, True),
        (False, "cuda", 1e12, False),
    ):
        config = checkpoint.CheckpointConfig(asynchronous=wanted)
        writer = checkpoint.CheckpointWriter(tmp_path, config, torch.device(device))
        monkeypatch.setattr(checkpoint, "available_bytes", lambda free=free: free)
        monkeypatch.setattr(writer, "_staging", Staging(torch.device("cpu")))
        writer.prepare(engines)
        assert writer.asynchronous is found
    assert "note: training will wait for its checkpoints: copies would take" in capsys.readouterr().err


def test_memory_for_copies_is_used_again():
    staging = Staging(torch.device("cpu"))
    first = staging.take(8)
    assert first.shape == (8,) and staging.take(4).data_ptr() == first.data_ptr()
    assert staging.take(9).shape == (9,)
    staging.give_back()
    assert staging._flat is None and available_bytes() > 2**20


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_checkpoint_is_that_of_its_step(place, tmp_path):
    """Copied while the next step waits, written beside it; the memory is pinned and used again."""
    folders = {}
    for name, setting in (("waiting", "false"), ("beside", "null")):
        folders[name] = tmp_path / name
        argv = ["--config", str(place / "transformer.yaml"), f"output={folders[name]}", "training.validate_every=null"]
        argv += ["device=cuda", *ASYNCHRONOUS[1:], f"checkpoint.asynchronous={setting}", "training.max_steps=6"]
        assert train_here("transformer", argv) == 0
    for step in range(1, 7):
        ours, theirs = (checkpoint_tensors(folder, step) for folder in folders.values())
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items()), step


def test_a_disk_that_fails_beside_the_steps_costs_a_checkpoint(place, tmp_path, monkeypatch, capsys):
    write, calls = checkpoint.write_pieces, []

    def fail_once(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return write(*arguments)

    monkeypatch.setattr(checkpoint, "write_pieces", fail_once)
    argv = ["--config", str(place / "transformer.yaml"), f"output={tmp_path / 'run'}", "training.validate_every=null"]
    assert train_here("transformer", [*argv, *ASYNCHRONOUS]) == 0
    said = capsys.readouterr().err
    assert "WARNING: the checkpoint of step" in said and "No space left" in said
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert "step-00000002" not in saved and "step-00000004" in saved and not [n for n in saved if n.startswith(".")]
