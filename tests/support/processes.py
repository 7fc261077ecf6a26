"""Starting the project's scripts as processes of their own: forked from one that has imported what takes seconds.

A forked start has its own arguments, environment, folder, streams, session and exit code, as a new one; what it does
not have is the wait for PyTorch. Where the environment differs in what matters to an import, the start is a new one;
where the start itself is what is tested, say `fresh=True`. IBQ_FRESH_STARTS=1 makes every start a new one.
"""

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT

import torch

from support import ENVIRONMENT, ROOT

# What may differ from the forking parent's: read when a script runs, not when modules are imported.
FREE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_")
# DeepSpeed, which reads DS_ACCELERATOR, is not imported yet.
FREE += ("SLURM_", "IBQ_", "PYTEST_", "PATH", "VIRTUAL_ENV", "DS_ACCELERATOR", "TEST_POINTS")
FREE += ("TORCHINDUCTOR_CACHE_DIR", "PYTORCH_NVML_BASED_CUDA_CHECK")  # set by PyTorch and DeepSpeed themselves
HANG_S = 600.0  # bounds a hang, on however busy a machine; no test waits for it
STANDING = Path(__file__).with_name("standing")  # see support/points.py
PYTHONPATH = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"


class Forked:
    """A script that was forked: what is used of subprocess.Popen."""

    def __init__(self, pid: int, status: socket.socket, pipes: list):
        self.pid, self.returncode = pid, None
        self._status, self._pipes = status, pipes

    def poll(self) -> int | None:
        """The exit code, once it has ended."""
        return self._read(0)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; subprocess.TimeoutExpired if it does not end in time."""
        if self._read(timeout) is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self.returncode

    def _read(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            said = self._status.recv(100)
            assert said, "the forking parent has ended"
            self.returncode = int(said)
            self._status.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str | None, str | None]:
        """What it wrote to stdout and to stderr, where that is PIPE, once it has ended."""
        self.wait(timeout)
        said = []
        for pipe in self._pipes:
            if pipe is not None:
                pipe.seek(0)
            said.append(None if pipe is None else pipe.read())
        return tuple(said)

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


class ForkServer:
    """A forking parent of this process, which has imported these modules alone, or what runs of both stages do."""

    def __init__(self, imported: Sequence[str] = ()):
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.environment = ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
        self.environment.pop("PYTHONPATH", None)
        self._lock, log = threading.Lock(), tempfile.TemporaryFile()  # noqa: SIM115 (closed with this process)
        command = [sys.executable, str(Path(__file__).with_name("fork_server.py")), str(theirs.fileno()), str(ROOT)]
        command += imported
        streams = {"stdin": DEVNULL, "stdout": DEVNULL, "stderr": log}
        self._process = subprocess.Popen(command, cwd=ROOT, env=self.environment, pass_fds=[theirs.fileno()], **streams)
        theirs.close()
        if not self._control.recv(100):
            log.seek(0)
            raise RuntimeError(f"the forking parent does not start: {log.read().decode()}")
        atexit.register(self.stop)

    def start(self, command: list[str], environment: dict[str, str], new_session: bool, streams: list[int]) -> tuple:
        """(pid, socket that tells the exit code) of a script that is forked with these numbers of open files."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = {"command": command, "environment": environment, "cwd": str(ROOT), "new_session": new_session}
        with self._lock, theirs:
            socket.send_fds(self._control, [json.dumps(request).encode()], [theirs.fileno(), *streams])
            return int(ours.recv(100)), ours

    def stop(self) -> None:
        self._control.close()
        self._process.wait()


@cache
def can_fork() -> bool:
    """Not with CUDA: what asks for it once cannot be forked any more."""
    wanted = os.environ.get("IBQ_FRESH_STARTS", "") in ("", "0")
    return wanted and hasattr(os, "pidfd_open") and not torch.cuda.is_available()


_starting, _servers = threading.Lock(), {}


def _server(imported: Sequence[str]) -> ForkServer:
    """That of this process, which starts with the first script."""
    with _starting:
        if tuple(imported) not in _servers:
            _servers[tuple(imported)] = ForkServer(imported)
        return _servers[tuple(imported)]


def _is_forkable(command: list[str], environment: dict[str, str], imported: Sequence[str]) -> bool:
    """Whether a fork is as a new process: a script of the project, and no difference that an import would see."""
    of_project = command[0].endswith(".py") and (ROOT / command[0]).resolve().is_relative_to(ROOT)
    if not can_fork() or not (of_project or command[0] == "-c"):
        return False
    known = {"", *PYTHONPATH.split(os.pathsep), str(STANDING)}
    if not {*environment.get("PYTHONPATH", "").split(os.pathsep)} <= known:
        return False
    theirs = _server(imported).environment
    different = {name for name in environment.keys() | theirs.keys() if environment.get(name) != theirs.get(name)}
    return all(name == "PYTHONPATH" or name.startswith(FREE) for name in different)


def start_script(
    *command: str | Path,
    environment: dict[str, str] | None = None,
    stdout=None,
    stderr=None,
    start_new_session: bool = False,
    fresh: bool = False,
    imported: Sequence[str] = (),
) -> Forked | subprocess.Popen:
    """Start a script of the repository, or `-c CODE`, in the repository's folder; `environment` is all of it (default:
    that of run_script), `imported` the modules that it may find imported, if not all. `stdout` and `stderr` are an open
    file, None, PIPE (for `communicate`, as text), DEVNULL or, for stderr, STDOUT.
    """
    words = [str(word) for word in command]
    environment = script_environment() if environment is None else environment
    if fresh or not _is_forkable(words, environment, imported):
        streams = {"stdout": stdout, "stderr": stderr, "text": True, "start_new_session": start_new_session}
        streams["preexec_fn"] = hear_signals
        return subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment, **streams)
    with open(os.devnull, "r+") as null:
        pipes = [tempfile.TemporaryFile("w+") if wanted == PIPE else None for wanted in (stdout, stderr)]  # noqa: SIM115
        files = [
            {None: number, PIPE: pipe, DEVNULL: null}.get(wanted, wanted)
            for number, wanted, pipe in zip((1, 2), (stdout, stderr), pipes, strict=True)
        ]
        files[1] = files[0] if stderr == STDOUT else files[1]
        numbers = [file if isinstance(file, int) else file.fileno() for file in (null, *files)]
        return Forked(*_server(imported).start(words, environment, start_new_session, numbers), pipes)


def hear_signals() -> None:
    """In a new process: of a terminal, what `nohup` and shells in the background have the tests ignore."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def script_environment(**own: str) -> dict[str, str]:
    """One thread, and the project and its tests to import from."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH} | own


def run_script(
    *command: str | Path,
    timeout: float = HANG_S,
    fresh: bool = False,
    imported: Sequence[str] = (),
    **environment: str,
) -> subprocess.CompletedProcess:
    """Run a Python script of the repository as a process of its own, on one thread."""
    how = {"environment": script_environment(**environment), "fresh": fresh, "imported": imported}
    process = start_script(*command, stdout=PIPE, stderr=PIPE, **how)
    try:
        said = process.communicate(timeout=timeout)
    except BaseException:
        process.kill()
        process.wait()
        raise
    return subprocess.CompletedProcess(command, process.returncode, *said)


def rank_environments(ranks: int) -> list[dict[str, str]]:
    """What a launcher would tell each of its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(ranks)}
    return [where | {"RANK": str(n), "LOCAL_RANK": str(n), "LOCAL_WORLD_SIZE": str(ranks)} for n in range(ranks)]


def run_ranks(
    ranks: int, *command: str | Path, timeout: float = HANG_S, **environment: str
) -> subprocess.CompletedProcess:
    """Run a script as that many processes of one job, as a launcher does: when one fails, the others are ended.

    The exit code is that of the first that failed; what they said, rank after rank.
    """
    processes = [
        start_script(*command, environment=script_environment(**environment, **own), stdout=PIPE, stderr=PIPE)
        for own in rank_environments(ranks)
    ]
    try:
        code = _first_failure(processes, time.monotonic() + timeout)
    finally:
        for process in processes:
            process.terminate()
    said = [_end(process) for process in processes]
    return subprocess.CompletedProcess(command, code, *("".join(stream) for stream in zip(*said, strict=True)))


def _first_failure(processes: list, deadline: float) -> int:
    """The exit code of the first process that fails; 0 once all have ended well."""
    while None in (codes := [process.poll() for process in processes]) and not any(codes):
        if time.monotonic() > deadline:
            raise subprocess.TimeoutExpired("a job of several ranks", deadline)
        time.sleep(0.01)
    return next(filter(None, codes), 0)


def _end(process, patience: float = 60) -> tuple[str, str]:
    """What a process said that has been asked to end."""
    try:
        return process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()
