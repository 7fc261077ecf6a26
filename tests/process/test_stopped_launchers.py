"""Commands with a launcher are stopped in every usual way: one checkpoint, a true status, and no process is left."""

import contextlib
import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Sequence
from pathlib import Path

import pytest
from support import ENVIRONMENT, ROOT
from support.points import Points, wait_for
from support.processes import HANG_S, PIPE, hear_signals, script_environment, start_script
from support.training import make_workplace, scalars

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("deepspeed"))


class Command:
    """The deepspeed command, or another that calls it, perhaps in a terminal of its own; it would train for days."""

    def __init__(self, place: Path, output: Path, *before: str, terminal: bool = False, more: Sequence[str] = ()):
        self.output = output
        settings = [f"output={output}", "training.max_steps=1000000", "training.micro_batch=4", "training.log_every=5"]
        settings += ["training.validate_every=null", "checkpoint.save_every=1000000", "engine={kind: local}", *more]
        command = [*before, "ibq/train_ar.py", "--config", str(place / "transformer.yaml"), *settings]
        self.terminal, theirs = pty.openpty() if terminal else (None, os.open(os.devnull, os.O_RDWR))
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=ENVIRONMENT | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=self._take_terminal if terminal else hear_signals,
        )
        os.close(theirs)

    def wait_for_steps(self) -> None:
        """Until it trains."""
        logged = self.output / "metrics.jsonl"
        wait_for(lambda: self.read() or (logged.exists() and "loss/total" in scalars(self.output)), self.process)

    @staticmethod
    def _take_terminal() -> None:
        hear_signals()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def read(self) -> None:
        """Read what is said in the terminal, or the others would wait."""
        if self.terminal is not None and select.select([self.terminal], [], [], 0)[0]:
            with contextlib.suppress(OSError):  # nobody is there any more
                os.read(self.terminal, 65536)

    def ended(self) -> dict:
        """What the run says of itself when no process of it is left."""
        wait_for(lambda: self.read() or not processes_of(self.output), what="the end of all processes")
        return json.loads((self.output / "status.json").read_text())

    def check(self, reason: str) -> None:
        """Everything has ended, after one checkpoint."""
        status = self.ended()
        assert status["state"] == "stopped" and status["reason"] == reason
        names = [path.name for path in (self.output / "checkpoints").iterdir()]
        assert names == [f"step-{status['step']:08d}"]


def environment_of(pid: int) -> dict[str, str]:
    text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    return dict(line.partition("=")[::2] for line in text.split("\0"))


def processes_of(output: Path) -> list[int]:
    """What still runs of a command with this output: it, its launchers and its ranks."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):  # it has just ended
            state = (path / "stat").read_text().rpartition(")")[2].split()[0]
            if state not in "ZX" and str(output) in (path / "cmdline").read_bytes().decode(errors="replace"):
                found.append(int(path.name))
    return found


@pytest.fixture
def start(place, tmp_path):
    """Starts a command, and leaves nothing of it behind if the test fails."""
    started = []

    def start(*command: str, terminal: bool = False, more: Sequence[str] = ()) -> Command:
        started.append(output := tmp_path / f"run{len(started)}")
        command = Command(place, output, *command, terminal=terminal, more=more)
        if not more:
            command.wait_for_steps()
        return command

    yield start
    for output in started:
        for pid in processes_of(output):
            os.kill(pid, signal.SIGKILL)


def deepspeed(*options: str) -> list[str]:
    return [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", *options]


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
COMMANDS = {"deepspeed": deepspeed(), "torchrun": TORCHRUN}
CODES = {"deepspeed": 2, "torchrun": 1}


@pytest.mark.parametrize(
    ("launcher", "number", "code"),
    [
        ("deepspeed", "SIGTERM", -signal.SIGTERM),
        ("deepspeed", "SIGKILL", -signal.SIGKILL),
        ("deepspeed", "SIGUSR2", -signal.SIGUSR2),
        ("torchrun", "SIGTERM", 1),
    ],
)
def test_the_command_alone_is_signalled(start, launcher, number, code):
    """It ends by its own rules; the ranks are told or notice, save and end."""
    command = start(*COMMANDS[launcher])
    command.process.send_signal(signal.Signals[number])
    assert command.process.wait(HANG_S) == code
    command.check("SIGTERM")


@pytest.mark.parametrize("launcher", COMMANDS)
def test_the_terminal_is_closed(start, launcher):
    command = start(*COMMANDS[launcher], terminal=True)
    os.close(command.terminal)
    command.terminal = None
    command.process.wait(HANG_S)
    command.check("SIGHUP")


@pytest.mark.parametrize(("launcher", "code"), [("deepspeed", -signal.SIGINT), ("torchrun", 1)])
def test_ctrl_c(start, launcher, code):
    command = start(*COMMANDS[launcher], terminal=True)
    os.write(command.terminal, b"\x03")
    assert wait_for(lambda: command.read() or command.process.poll(), what="the end of the command") == code
    command.check("SIGINT")


def test_a_rank_of_deepspeed_is_killed(start):
    """As for want of memory: the other one names it and ends, and the command with them."""
    command = start(*deepspeed())
    (rank,) = (pid for pid in processes_of(command.output) if environment_of(pid).get("RANK") == "1")
    os.kill(rank, signal.SIGKILL)
    assert command.process.wait(HANG_S) != 0
    status = command.ended()
    assert status["state"] == "failed" and "rank 1" in status["reason"] and "died" in status["reason"]


BAD_STEPS = ("training.max_bad_steps=1", "optimizer.learning_rate=1e38", "training.max_steps=50")


@pytest.mark.parametrize("launcher", COMMANDS)
@pytest.mark.parametrize("mistake", [("training.stepz=1",), BAD_STEPS], ids=["mistake", "bad steps"])
def test_what_only_the_user_can_mend(start, launcher, mistake):
    """The command ends with its own code for a failure; only the ranks' is 2."""
    command = start(*COMMANDS[launcher], more=mistake)
    assert command.process.wait(HANG_S) == CODES[launcher]
    if mistake == BAD_STEPS:
        status = command.ended()
        assert status["state"] == "failed" and "bad steps in a row" in status["reason"]
    else:
        assert not command.output.exists() and not processes_of(command.output)


@pytest.mark.parametrize(
    ("launcher", "number"), [("deepspeed", "SIGTERM"), ("torchrun", "SIGTERM"), ("torchrun", "SIGUSR2")]
)
def test_a_job_waits_for_its_ranks(start, launcher, number):
    """launchers/job.py ends when they have, with the code of the signal, whatever its launcher says."""
    job = [sys.executable, "launchers/job.py", "--launcher", launcher, "--ranks", "2", "--no-preflight", "--"]
    command = start(*job)
    command.process.send_signal(signal.Signals[number])
    assert command.process.wait(HANG_S) == 128 + signal.Signals[number]
    assert not processes_of(command.output)
    command.check(number)


def test_a_job_says_its_last_word_though_a_signal_comes(place, tmp_path):
    """Slurm ends a job that has lost a node in the moment in which srun ends."""
    points = Points(tmp_path / "points", {"end": ("open", r"attempts\.jsonl ")})
    job = ["launchers/job.py", "--ranks", "1", "--no-preflight", "--", "ibq/train_ar.py", "data.train=/nowhere"]
    settings = ("--config", place / "transformer.yaml", f"output={tmp_path / 'run'}")
    given = script_environment(**points.environment)
    process = start_script(*job, *settings, environment=given, stdout=PIPE, stderr=PIPE)
    (pid,) = points.wait("end", process)
    os.kill(pid, signal.SIGTERM)
    points.release("end", "end.signalled")
    said = "".join(process.communicate(timeout=HANG_S))
    assert process.returncode == 2 and "ended with exit code 2" in said, said
