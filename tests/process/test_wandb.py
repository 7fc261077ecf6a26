"""Weights & Biases as a writer: what its files hold, the id and the steps of a run that goes on, what is missing.

Nothing here leaves this machine: it is offline, or asks a port of the loopback at which nobody listens.
"""

import json
import os
import struct
import sys
import time

import pytest
import torch
from support.training import make_workplace, scalars, train_here

from ibq.training import wandb_writer
from ibq.training.writers import LogConfig, WandbConfig

BLOCK, HEAD = 32_768, 7  # bytes of the form of W&B's files: LevelDB's log
OFFLINE = WandbConfig(mode="offline", project="tests", group="these")
NOBODY = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """No key of whoever runs the tests, no file in their home, and no server: W&B reads its address once a process."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home/netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", NOBODY)
    (tmp_path / "home").mkdir()


def records(folder):
    """Of every start, in order: (what W&B's file says of the run, its rows {name: value})."""
    from wandb.proto.wandb_internal_pb2 import Record

    for path in sorted(folder.glob("wandb/*run-*/*.wandb"), key=lambda path: path.parent.name.split("run-")[1]):
        data, place, part, run, rows = path.read_bytes(), HEAD, b"", None, []
        while place + HEAD <= len(data):
            if BLOCK - place % BLOCK < HEAD:
                place += BLOCK - place % BLOCK
                continue
            _, length, kind = struct.unpack_from("<IHB", data, place)
            part += data[place + HEAD : place + HEAD + length]
            place += HEAD + length
            if kind in (1, 4):  # whole, or the last part
                record, part = Record.FromString(part), b""
                run = record.run if record.HasField("run") else run
                items = record.history.item
                if items:
                    rows.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
        yield run, rows


def steps(rows, name):
    return {row["step"]: row[name] for row in rows if name in row}


def test_what_is_missing_is_said_before_anything_is_written(tmp_path, monkeypatch, capsys):
    # The first test of this file: W&B remembers a key that another has shown it.
    place = make_workplace(tmp_path / "place")
    argv = ["--config", str(place / "tokenizer.yaml"), f"output={tmp_path / 'run'}", "log.writers=[wandb]"]
    assert train_here("tokenizer", argv) == 2
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert train_here("tokenizer", argv) == 2
    key, package = capsys.readouterr().err.splitlines()
    assert "log.wandb.mode" in key and "wandb login" in key and "offline" in key
    assert "log.writers" in package and "python -m pip install -e '.[wandb]'" in package
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_is_told_and_goes_on_under_its_id(tmp_path):
    place, folder = make_workplace(tmp_path / "place"), tmp_path / "run"
    argv = ["--config", str(place / "tokenizer.yaml"), f"output={folder}", "log.writers=[wandb]"]
    argv += ["log.wandb.mode=offline", "log.wandb.project=tests"]
    assert train_here("tokenizer", argv) == 0
    assert train_here("tokenizer", [*argv, "training.max_steps=6"]) == 0
    (first, rows), (second, more) = records(folder)
    assert first.project == "tests" and first.run_id == second.run_id and first.run_id
    config = {item.key: json.loads(item.value_json) for item in first.config.update}
    assert config["data"]["train"].endswith(".tar") and config["training"]["max_steps"] == 4
    assert {row["step"] for row in rows} == {1, 2, 3, 4} and {row["step"] for row in more} == {5, 6}
    for name in ("loss/total", "learning_rate", "validation/psnr"):
        assert steps([*rows, *more], name) == pytest.approx(scalars(folder)[name]), name
    assert "image-file" in str(rows) and list(folder.glob("wandb/*run-*/files/media/images/*.png"))
    assert not (folder / "tensorboard").exists()
    assert train_here("tokenizer", [*argv, "--fresh", "log.writers=[]"]) == 0
    assert not [path for path in folder.iterdir() if path.name in wandb_writer.FILES]


def test_steps_that_come_again_are_told_once(tmp_path):
    for told in ([2, 4, 6], [4, 6, 8]):  # killed after step 6, and gone on from the checkpoint of step 2
        writer = wandb_writer.WandbWriter(tmp_path, OFFLINE, "{}")
        for step in told:
            writer.write(step, {"loss/total": float(step)})
        writer.close()
        time.sleep(1.1)  # W&B names what a start writes by the second
    (first, rows), (second, more) = records(tmp_path)
    assert first.run_id == second.run_id and first.run_group == "these"
    assert steps(rows, "loss/total") == {2: 2.0, 4: 4.0, 6: 6.0} and steps(more, "loss/total") == {8: 8.0}
    assert json.loads((tmp_path / "wandb.json").read_text()) == {"id": first.run_id, "step": 8}


def test_a_server_that_does_not_answer_is_told_of_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wandb_writer, "REACH_S", 1.0)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    writer = wandb_writer.WandbWriter(tmp_path, WandbConfig(), "{}")
    writer.write(1, {"loss/total": 1.0, "pictures": torch.zeros(3, 8, 8, dtype=torch.uint8)})
    writer.close()
    said = capsys.readouterr().err
    assert said.count("WARNING") == 1 and "cannot be reached" in said and "wandb sync" in said
    assert {1: 1.0} in [steps(rows, "loss/total") for _, rows in records(tmp_path)]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not [path for path in files if b"k" * 40 in path.read_bytes()]


def test_it_reports_nothing_to_its_makers(tmp_path):
    writer = wandb_writer.WandbWriter(tmp_path, OFFLINE, "{}")
    writer.close()
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"


def test_impossible_settings():
    with pytest.raises(ValueError, match="writers: one is named twice"):
        LogConfig(writers=("wandb", "wandb"))
    with pytest.raises(ValueError, match="project: must not be empty"):
        WandbConfig(project="")
