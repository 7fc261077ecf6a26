"""Signals: the step is finished, one checkpoint is written, status.json says why, and the same command goes on."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from support.points import HANG_S, Points, wait_for
from support.processes import PIPE, rank_environments, script_environment, start_script
from support.training import SCRIPTS, checkpoint_tensors, make_workplace, scalars, train_here

from ibq.training.stopping import StopSignals

STEPS = {"tokenizer": 20, "transformer": 40}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("stopping"))


def arguments(place, stage, output: Path, *overrides, ranks=1) -> list[str]:
    argv = ["--config", str(place / f"{stage}.yaml"), f"output={output}", f"training.max_steps={STEPS[stage]}"]
    argv += ["checkpoint.save_every=100000", "training.log_every=4", "training.validate_every=15"]
    argv += ["data.in_memory=false"] if stage == "tokenizer" else []
    return [*argv, f"training.micro_batch={8 // ranks}", *overrides]


class Running:
    """The processes of a run that saves only at its end or when it is told to; with `stands` at some points of it."""

    def __init__(self, place, stage, output: Path, *overrides, ranks=1, workers=0, stands=False):
        self.output = output
        command = [SCRIPTS[stage], *arguments(place, stage, output, *overrides, ranks=ranks), f"data.workers={workers}"]
        environment = {}
        if stands:
            points = {"logged": ("open", r"/metrics\.jsonl a", 2), "saved": ("os.rename", r"/\.tmp-step-\d+ ")}
            self.points = Points(output.with_suffix(".points"), points)
            environment = self.points.environment
        self.ranks = [
            start_script(
                *command, environment=script_environment(**own | environment), stderr=PIPE, start_new_session=True
            )
            for own in (rank_environments(ranks) if ranks > 1 else [{}])
        ]

    def end(self) -> tuple[list[int], str]:
        """Exit codes, and what rank 0 said."""
        said = [rank.communicate(timeout=HANG_S)[1] for rank in self.ranks]
        return [rank.returncode for rank in self.ranks], said[0]

    def status(self) -> dict:
        return json.loads((self.output / "status.json").read_text())

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.output / "checkpoints").iterdir())


def check_stopped(run: Running, name: str, stage: str) -> int:
    """The step at which a run was stopped."""
    codes, said = run.end()
    assert codes == [128 + signal.Signals[name]] * len(run.ranks), said
    status = run.status()
    assert status["state"] == "stopped" and status["reason"] == name and 0 < status["step"] < STEPS[stage]
    assert run.checkpoints() == [f"step-{status['step']:08d}"], "one checkpoint, of the step that was finished"
    assert f"{name}: saving once" in said and "Traceback" not in said
    return status["step"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stage", "settings", "ranks", "workers"),
    [
        ("SIGTERM", "tokenizer", [], 1, 1),
        ("SIGINT", "transformer", ["model.residual_dropout=0.1"], 1, 0),
        ("SIGHUP", "transformer", [], 1, 0),
        ("SIGUSR2", "tokenizer", [], 2, 0),
        ("SIGUSR1", "transformer", ["checkpoint.signal=USR1"], 2, 1),
    ],
)
def test_a_stopped_run_goes_on_as_if_nothing_had_been(place, tmp_path, name, stage, settings, ranks, workers):
    if ranks == 1:
        assert train_here(stage, arguments(place, stage, tmp_path / "whole", *settings)) == 0
    else:
        assert Running(place, stage, tmp_path / "whole", *settings, ranks=ranks).end()[0] == [0] * ranks
    run = Running(place, stage, tmp_path / "run", *settings, ranks=ranks, workers=workers, stands=True)
    run.points.wait("logged", *run.ranks)
    # To the whole group, with its worker processes, as a terminal and Slurm do; with two ranks to one of them only.
    os.killpg(run.ranks[-1].pid, signal.Signals[name])
    run.points.release("logged", "saved")
    step = check_stopped(run, name, stage)
    again = Running(place, stage, tmp_path / "run", *settings, ranks=ranks)
    codes, said = again.end()
    assert codes == [0] * ranks, said
    assert again.status()["state"] == "finished"
    last = STEPS[stage]
    assert again.checkpoints() == [f"step-{s:08d}" for s in (step, last)]
    expected, found = (checkpoint_tensors(tmp_path / n, last) for n in ("whole", "run"))
    assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected)
    logs = [scalars(tmp_path / n) for n in ("whole", "run")]
    timing = ("seconds", "images_per", "tokens_per_s", "peak")
    for series in logs[0]:
        assert series.startswith(timing) or logs[0][series] == logs[1][series], series


@pytest.mark.slow
def test_more_signals_during_the_save_and_after_do_no_harm(place, tmp_path):
    run = Running(place, "tokenizer", tmp_path / "run", stands=True)
    (process,) = run.ranks
    run.points.wait("logged", process)
    process.send_signal(signal.SIGTERM)
    run.points.wait("logged.signalled", process)
    run.points.release("logged")
    run.points.wait("saved", process)

    def ended() -> bool:
        for name in ("SIGINT", "SIGUSR2", "SIGTERM"):
            process.send_signal(signal.Signals[name])
        return process.poll() is not None

    assert not ended()
    run.points.release("saved")
    wait_for(ended)  # until the very end of the process
    check_stopped(run, "SIGTERM", "tokenizer")


def test_a_closed_terminal_is_nothing_to_what_nohup_has_started():
    """SIGHUP is ignored there, and stays so."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signals = StopSignals("none")
        with signals.noted():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            signal.raise_signal(signal.SIGHUP)
            assert not signals.received
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_a_signal_that_is_not_wanted_has_its_usual_effect(place, tmp_path):
    run = Running(place, "transformer", tmp_path / "run", "checkpoint.signal=none", stands=True)
    run.points.wait("logged", *run.ranks)
    run.ranks[0].send_signal(signal.SIGUSR2)
    assert run.end()[0] == [-signal.SIGUSR2]
    assert run.status()["state"] == "running", "nothing could be said any more"


def test_a_validation_that_was_cut_short_is_made_up_for(place, tmp_path, monkeypatch):
    """A signal that comes during the validation ends it at once; the next start begins with it."""
    from ibq.training.tokenizer_task import TokenizerTask

    config = ["--config", str(place / "tokenizer.yaml"), "training.max_steps=6", "training.validate_every=3"]
    assert train_here("tokenizer", [*config, f"output={tmp_path}/whole"]) == 0
    validate, seen = TokenizerTask.validate, []

    def interrupted(task, batches):
        def counted():
            for number, batch in enumerate(batches):
                seen.append(number)
                os.kill(os.getpid(), signal.SIGTERM)
                yield batch

        return validate(task, counted())

    settings = [*config, f"output={tmp_path}/run", "training.micro_batch=2", "loss.gan.enabled=false"]
    monkeypatch.setattr(TokenizerTask, "validate", interrupted)
    assert train_here("tokenizer", settings) == 143
    assert seen == [0], "four batches would have come"
    monkeypatch.setattr(TokenizerTask, "validate", validate)
    state = json.loads((tmp_path / "run/checkpoints/step-00000003/state.json").read_text())
    assert state["validation_pending"] and state["best_score"] is None
    assert "validation/psnr" not in scalars(tmp_path / "run")
    assert train_here("tokenizer", settings) == 0
    assert sorted(scalars(tmp_path / "run")["validation/psnr"]) == [3, 6]


def test_a_failed_run_says_why(place, tmp_path, capsys):
    argv = ["--config", str(place / "transformer.yaml"), f"output={tmp_path}", "training.max_bad_steps=1"]
    assert train_here("transformer", [*argv, "optimizer.learning_rate=1e38", "training.max_steps=50"]) == 2
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "failed" and "bad steps in a row" in status["reason"]
    assert status["reason"] in capsys.readouterr().err


def test_status_while_running(place, tmp_path):
    assert train_here("transformer", ["--config", str(place / "transformer.yaml"), f"output={tmp_path}"]) == 0
    status = json.loads((tmp_path / "status.json").read_text())
    assert (
        status["state"] == "finished" and status["step"] == status["total_steps"] == 4 and status["pid"] == os.getpid()
    )
