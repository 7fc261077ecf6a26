"""Ranks that die, freeze, hang or fail: the others end soon and say which it was; ranks that end well are not blamed.

Real processes under torchrun and without it; each scenario is one run of workers/heartbeat_worker.py.
"""

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support import ROOT
from support.points import HANG_S, Points, wait_for
from support.training import SCRIPTS, make_workplace
from test_kill_and_go_on import Run, compare
from workers.heartbeat_worker import work_as

# How soon silence is death counts only where a rank is frozen: elsewhere a busy machine must not be taken for it.
QUICK = {"every_s": 0.3, "dead_after_s": 300.0, "hang_after_s": None}
FROZEN = QUICK | {"dead_after_s": 10.0}
HANGS = QUICK | {"hang_after_s": 5.0}
SERVER = multiprocessing.get_context("forkserver")
TRAINED = 100  # steps of the real training
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is run, and what is done to it once both ranks are in the middle."""

    settings: dict = field(default_factory=dict)
    launcher: tuple[str, ...] | None = TORCHRUN  # None: plain processes, of which rank 0 keeps the store
    signal: int = 0
    to: int | str = 1  # a rank, or "agent"
    limit_s: float = HANG_S  # after which the run counts as endless


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of it."""

    codes: list[int] | None  # of the launcher or of the ranks; None: it did not end
    stderr: str
    pids: dict[int, int]
    files: dict[str, str]  # what the workers left behind

    def verdicts(self) -> set[str]:
        lines = [line for line in self.stderr.splitlines() if line.endswith("; all ranks end")]
        return {line.removeprefix("error: ").removesuffix("; all ranks end") for line in lines}


SCENARIOS = {
    "clean": Scenario(settings={"fault": "none", "config": QUICK | {"hang_after_s": 300.0}}),
    "early": Scenario(settings={"fault": "early", "rank": 1, "config": QUICK | {"dead_after_s": 5.0}}, launcher=None),
    "killed 1": Scenario(settings={"fault": "ready"}, signal=signal.SIGKILL),
    "killed 0": Scenario(settings={"fault": "ready"}, signal=signal.SIGKILL, to=0),
    "frozen 1": Scenario(settings={"fault": "ready", "config": FROZEN}, signal=signal.SIGSTOP),
    "agent killed": Scenario(settings={"fault": "ready"}, signal=signal.SIGKILL, to="agent"),
    "plain, killed 1": Scenario(settings={"fault": "ready"}, launcher=None, signal=signal.SIGKILL),
    "plain, killed 0": Scenario(settings={"fault": "ready"}, launcher=None, signal=signal.SIGKILL, to=0),
    "plain, frozen 0": Scenario(
        settings={"fault": "ready", "config": FROZEN}, launcher=None, signal=signal.SIGSTOP, to=0
    ),
    "hangs": Scenario(settings={"fault": "sleep", "rank": 1, "config": HANGS}, launcher=None),
    "hangs, no heartbeat": Scenario(
        settings={"fault": "sleep", "rank": 1, "config": None}, launcher=None, limit_s=2 * HANGS["hang_after_s"]
    ),
    "all hang": Scenario(settings={"fault": "everyone", "config": HANGS}, launcher=None),
    "raises": Scenario(settings={"fault": "raise", "rank": 1}, launcher=None),
    "user": Scenario(settings={"fault": "user"}, launcher=None),
    "restarted": Scenario(
        settings={"fault": "sleep", "rank": 0, "config": HANGS}, launcher=(*TORCHRUN, "--max-restarts", "1")
    ),
}


class Job:
    """The processes of a scenario: a launcher's, or one per rank, forked from one that has imported all it takes."""

    def __init__(self, scenario: Scenario, folder: Path):
        self.scenario, self.folder, self.log = scenario, folder, folder / "log"
        settings = {"config": QUICK} | scenario.settings
        if scenario.launcher is not None:
            worker = [str(ROOT / "tests/workers/heartbeat_worker.py"), str(folder), json.dumps(settings)]
            with open(self.log, "ab") as log:
                command = [sys.executable, *scenario.launcher, *worker]
                self.processes = [subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)]
            return
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.processes = []
        for rank in ("0", "1"):
            own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
            process = SERVER.Process(target=work_as, args=(own, self.log, folder, settings))
            process.start()
            self.processes.append(process)

    def codes(self) -> list[int | None]:
        """Exit codes so far."""
        return [
            process.poll() if isinstance(process, subprocess.Popen) else process.exitcode for process in self.processes
        ]

    def pids(self) -> dict[int, int]:
        """Of the ranks that are in the middle of the run."""
        found = {rank: self.folder / f"{rank}.pid" for rank in range(2)}
        texts = {rank: path.read_text() for rank, path in found.items() if path.exists()}
        return {rank: int(text) for rank, text in texts.items() if text.endswith("\n")}

    def play(self) -> Outcome:
        launched = [process for process in self.processes if isinstance(process, subprocess.Popen)]
        wait_for(lambda: len(self.pids()) == 2, *launched, what=f"both ranks; {self.log}")
        pids, limit_s = self.pids(), self.scenario.limit_s
        if self.scenario.signal:
            wait_for(lambda: len(list(self.folder.glob("*.heard"))) == 2, *launched, what="ranks that hear each other")
            victim = self.processes[0].pid if self.scenario.to == "agent" else pids[self.scenario.to]
            os.kill(victim, self.scenario.signal)
        ended = become(lambda: not any(map(alive, pids.values())) and None not in self.codes(), limit_s)
        if not ended:
            for process in self.processes:
                process.kill()
            for pid in filter(alive, pids.values()):  # a launcher that is killed leaves them behind
                os.kill(pid, signal.SIGKILL)
        files = {path.name: path.read_text() for path in self.folder.iterdir() if path != self.log}
        stderr = self.log.read_text(errors="replace")
        return Outcome(codes=self.codes() if ended else None, stderr=stderr, pids=pids, files=files)


def become(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether a condition becomes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, request, monkeypatch_module):
    """Scenario -> its outcome to come; some run at a time, since most of their time is waiting."""
    chosen = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    wanted = {name for item in request.session.items for name in getattr(item.function, "scenarios", ())} | chosen
    monkeypatch_module.setenv("OMP_NUM_THREADS", "1")
    monkeypatch_module.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    SERVER.set_forkserver_preload(["workers.heartbeat_worker"])
    with ThreadPoolExecutor(3) as pool:
        yield {
            name: pool.submit(lambda job, folder: Job(job, folder).play(), scenario, tmp_path_factory.mktemp("job"))
            for name, scenario in SCENARIOS.items()
            if name in wanted
        }


def plays(*names: str):
    """The scenarios that a test looks at."""

    def note(test):
        test.scenarios = names
        return test

    return note


def outcome(outcomes: dict[str, Future], name: str) -> Outcome:
    return outcomes[name].result(2 * HANG_S)


def who(found: Outcome, rank: int) -> str:
    return f"rank {rank} (host {os.uname().nodename}, process {found.pids[rank]})"


@pytest.mark.parametrize("name", ["clean", "early"])
def test_ranks_that_end_well_are_not_blamed(outcomes, name):
    found = outcome(outcomes, name)
    assert set(found.codes) == {0} and found.verdicts() == set(), found.stderr
    assert {"0.done", "1.done"} <= found.files.keys()
    assert not [file for file in found.files if file.endswith(("failure", "reason"))]


@pytest.mark.parametrize("name", ["killed 1", "killed 0", "plain, killed 1", "plain, killed 0"])
def test_a_killed_rank_is_named_at_once(outcomes, name):
    found, dead = outcome(outcomes, name), SCENARIOS[name].to
    assert found.codes is not None and any(found.codes), found
    (verdict,) = found.verdicts()
    assert verdict.startswith(f"{who(found, dead)} has died: ") and 'step 5, phase "forward"' in verdict
    assert who(found, 1 - dead) not in verdict
    # The survivor learns why its collective has failed, and writes down why the run has.
    assert found.files[f"{1 - dead}.failure"] == found.files[f"{1 - dead}.reason"] == verdict


@pytest.mark.parametrize("name", ["frozen 1", "plain, frozen 0"])
def test_a_frozen_rank_is_taken_for_dead(outcomes, name):
    """It does not close its sockets: the other would wait for the time-out of the process group, 30 minutes."""
    found, dead = outcome(outcomes, name), SCENARIOS[name].to
    assert found.codes is not None and any(found.codes), found
    (verdict,) = found.verdicts()
    assert verdict.startswith(f"{who(found, dead)} has died: ") and who(found, 1 - dead) not in verdict
    assert re.search(r"no sign of life for \d+ s", verdict) or "the store that it keeps: no answer for 10 s" in verdict
    assert found.files[f"{1 - dead}.failure"] == verdict


@plays("agent killed")
def test_the_ranks_of_a_dead_agent_end_too(outcomes):
    found = outcome(outcomes, "agent killed")
    assert found.codes == [-signal.SIGKILL], found
    (verdict,) = found.verdicts()
    assert verdict.startswith("torchrun's agent at ") and "rank" not in verdict.split(" has died")[0].split(",")[0]


@plays("hangs", "hangs, no heartbeat")
def test_a_rank_that_hangs_is_named(outcomes):
    found, control = outcome(outcomes, "hangs"), outcome(outcomes, "hangs, no heartbeat")
    assert found.codes is not None and any(found.codes), found
    (verdict,) = found.verdicts()
    assert verdict.startswith(f'{who(found, 1)} hangs at step 5, phase "data"') and who(found, 0) not in verdict
    assert found.files["0.failure"] == verdict
    assert "rank 1 waits here" in found.stderr and "time.sleep(1_000)" in found.stderr
    assert "rank 0 waits here" not in found.stderr
    # Without the heartbeat the same run does not end in this time.
    assert control.codes is None and control.verdicts() == set(), control


@plays("all hang")
def test_where_all_ranks_hang_none_is_blamed(outcomes):
    found = outcome(outcomes, "all hang")
    assert found.codes == [1, 1], found
    (verdict,) = found.verdicts()
    assert 'all ranks wait at the same place, step 5, phase "data"' in verdict and "process" not in verdict
    assert "rank 0 waits here" in found.stderr and "rank 1 waits here" in found.stderr


@plays("raises")
def test_a_rank_that_fails_tells_the_others_why(outcomes):
    found = outcome(outcomes, "raises")
    assert found.codes is not None and any(found.codes), found
    (verdict,) = found.verdicts()
    assert verdict == f'{who(found, 1)} has failed at step 5, phase "data": ValueError: a fault of its own'
    assert found.files["1.reason"] == "a fault of its own"
    assert found.files["0.reason"] == found.files["0.failure"] == verdict


@plays("user")
def test_an_error_that_all_ranks_share_stays_one_line_each(outcomes):
    found = outcome(outcomes, "user")
    assert found.codes == [2, 2] and found.verdicts() == set(), found.stderr
    assert found.stderr.count("error: the same on all ranks") == 2 and "Traceback" not in found.stderr
    assert not [file for file in found.files if file.endswith("failure")]


@plays("restarted")
def test_torchrun_restarts_a_run_that_hangs(outcomes):
    found = outcome(outcomes, "restarted")
    assert found.codes == [0] and {"0.done", "1.done"} <= found.files.keys(), found
    (verdict,) = found.verdicts()
    assert verdict.startswith(f"{who(found, 0)} hangs at ")


# The real training.


class TorchrunTraining(Run):
    """A training of two ranks under torchrun."""

    def __init__(self, place: Path, output: Path, *options: str, killed: bool = True):
        super().__init__(place, "transformer", output, 2)
        # There is a checkpoint to go on from, and the next one is begun.
        self.points = Points(output.with_suffix(".points"), {"later": ("os.mkdir", r"/\.tmp-step-00000050 ")})
        if not killed:
            self.points.release("later")
        command = [
            sys.executable,
            *TORCHRUN,
            *options,
            SCRIPTS[self.stage],
            *self.arguments(),
            f"training.max_steps={TRAINED}",
            "--fresh",
        ]
        with open(output.with_suffix(".log0"), "wb") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"} | self.points.environment
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        self.processes = [process]

    def kill_rank(self, rank: int) -> int:
        """Kill a rank where rank 0 stands; its process id."""
        self.points.wait("later", *self.processes)
        path = Path(f"/proc/{self.processes[0].pid}/task/{self.processes[0].pid}/children")
        variables = {
            int(pid): Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in path.read_text().split()
        }
        (found,) = (pid for pid, names in variables.items() if f"RANK={rank}".encode() in names)
        os.kill(found, signal.SIGKILL)
        self.points.release("later")
        return found

    def end(self) -> int:
        """The exit code of torchrun."""
        return self.processes[0].wait(HANG_S)

    def said(self) -> str:
        return self.output.with_suffix(".log0").read_text()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("training"))


@pytest.mark.slow
def test_torchrun_restarts_a_training_which_ends_like_an_undisturbed_one(place, tmp_path):
    undisturbed = TorchrunTraining(place, tmp_path / "undisturbed", killed=False)
    killed = TorchrunTraining(place, tmp_path / "killed", "--max-restarts", "2")
    pid = killed.kill_rank(1)
    assert [undisturbed.end(), killed.end()] == [0, 0], killed.said()
    assert f"rank 1 (host {os.uname().nodename}, process {pid}) has died" in killed.said()
    assert "has died" not in undisturbed.said() and "--fresh: ignored" in killed.said()
    compare(killed.output, undisturbed.output, TRAINED)


@pytest.mark.slow
def test_a_survivor_writes_down_that_rank_0_has_died(place, tmp_path):
    training = TorchrunTraining(place, tmp_path / "run")
    pid = training.kill_rank(0)
    assert training.end() == 1, training.said()
    status = json.loads((training.output / "status.json").read_text())
    assert status["state"] == "failed" and status["step"] >= 25
    assert status["reason"].startswith(f"rank 0 (host {os.uname().nodename}, process {pid}) has died: ")
