"""Ranks that find each other at the start, or learn which of them does not come: soon, in one line, with the remedy.

Ranks are started as by srun or by hand: no launcher ends the others.
"""

import os
import re
import signal
import socket
from datetime import timedelta

import pytest
from support.points import Points, wait_for
from support.processes import HANG_S, PIPE, rank_environments, script_environment, start_script
from support.training import make_workplace
from torch.distributed import TCPStore

pytestmark = pytest.mark.slow
SOON = "heartbeat.start_within_s=2"
HOST = os.uname().nodename


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("place"))


@pytest.fixture
def environments():
    return rank_environments(2)


@pytest.fixture
def start(place, tmp_path, environments):
    """Start a rank of two that trains, with settings and variables of its own; a None takes the variable away."""
    started = []

    def start_rank(rank: int, *settings: str, **own: str | None):
        given = script_environment(**environments[rank]) | own
        environment = {name: value for name, value in given.items() if value is not None}
        command = ["ibq/train_ar.py", "--config", str(place / "transformer.yaml"), f"output={tmp_path / 'run'}"]
        command += ["training.micro_batch=4", *settings]
        started.append(start_script(*command, environment=environment, stdout=PIPE, stderr=PIPE))
        return started[-1]

    yield start_rank
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture
def wait_until_1_asks(environments):
    """Wait until rank 1 is done with opening the store, and waits for rank 0's answers in it."""
    place = environments[0]["MASTER_ADDR"], int(environments[0]["MASTER_PORT"])

    def is_open() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(place) == 0

    def wait(*processes) -> None:
        wait_for(is_open, *processes, what="the store to open")
        store = TCPStore(*place, is_master=False, timeout=timedelta(seconds=HANG_S))
        wait_for(lambda: store.check(["ibq/asks/1"]), *processes, what="rank 1 to ask")

    return wait


def ended(process) -> tuple[int, str]:
    """(exit code, stderr), which must be a single line."""
    said = process.communicate(timeout=HANG_S)[1]
    assert said.count("\n") == 1, said
    return process.returncode, said.strip()


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_mistake_of_one_rank_ends_the_others(start, culprit):
    processes = [start(rank, *(["training.max_steps=-1"] if rank == culprit else [])) for rank in range(2)]
    answers = [ended(process) for process in processes]
    problem = "command line: training.max_steps: must be at least 1, got -1"
    assert answers[culprit] == (2, f"error: {problem}")
    assert answers[1 - culprit] == (2, f"error: rank {culprit} has ended at its start, host {HOST}: {problem}")


def test_a_mistake_of_all_ranks_stays_one_line_each(start):
    answers = {ended(process) for process in [start(rank, "training.max_steps=-1") for rank in range(2)]}
    assert answers == {(2, "error: command line: training.max_steps: must be at least 1, got -1")}


def test_who_does_not_come_is_named(start):
    code, said = ended(start(0, SOON))
    assert code == 1 and re.match(
        r"error: rank 1 of WORLD_SIZE=2 did not come to MASTER_ADDR=\S+ MASTER_PORT=\d+ ", said
    )


def test_rank_0_does_not_come(start):
    code, said = ended(start(1, SOON))
    assert code == 2 and re.match(
        r"error: MASTER_ADDR=127.0.0.1 MASTER_PORT=\d+: rank 1 reaches no store of rank 0", said
    )


def test_rank_0_is_killed_while_others_wait(start, wait_until_1_asks):
    """It waits for rank 2, which nobody starts."""
    first, second = (start(rank, WORLD_SIZE="3") for rank in range(2))
    wait_until_1_asks(first, second)
    first.kill()
    *_, said = second.communicate(timeout=HANG_S)[1].splitlines()  # PyTorch writes its stack above
    assert second.returncode == 1 and "has ended before all ranks had come" in said


def test_rank_0_ends_as_another_opens_its_store(start):
    """What listened when the other looked does not when it comes to use it."""
    with socket.create_server(("127.0.0.1", 0)) as store:
        store.settimeout(HANG_S)
        waiting = start(1, MASTER_PORT=str(store.getsockname()[1]))
        store.accept()[0].close()
    *_, said = waiting.communicate(timeout=HANG_S)[1].splitlines()
    assert waiting.returncode == 1 and "has ended before all ranks had come (its port is closed)" in said


def test_a_rank_that_dies_before_the_first_step_is_named(start, place, tmp_path):
    points = Points(tmp_path / "points", {"data": ("open", r"data/codes/meta\.json ")})
    processes = [start(0), start(1, **points.environment)]
    (pid,) = points.wait("data", *processes)
    os.kill(pid, signal.SIGKILL)
    said = processes[0].communicate(timeout=HANG_S)[1]
    assert processes[0].returncode == 1, said
    problem = (
        rf'rank 1 \(host {HOST}, process {pid}\) has died: last heard at step 0, phase "start"; its process is gone'
    )
    assert re.match(f"\nerror: {problem}; all ranks end\n", said), said


def test_an_error_before_the_first_step_is_told(start):
    processes = [start(0), start(1, "data.train=/nowhere")]
    said = [process.communicate(timeout=HANG_S)[1] for process in processes]
    assert processes[1].returncode == 2 and processes[0].returncode == 1
    assert f'error: rank 1 (host {HOST}, process {processes[1].pid}) has failed at step 0, phase "start": ' in said[0]
    assert "no codes in '/nowhere'" in said[0]


# --- Variables that a user or a script has set wrong ---


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set, but WORLD_SIZE=2 is; start the ranks by torchrun, "),
        ({"MASTER_PORT": None}, "MASTER_PORT is not set, but "),
        ({"RANK": None}, "RANK is not set, but "),
        ({"RANK": "2"}, "RANK=2 must be below WORLD_SIZE=2; "),
        ({"RANK": "-1"}, "RANK=-1 is no whole number; "),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two is no whole number; "),
        ({"WORLD_SIZE": None, "SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS=2 is set as in a task of srun, but "),
        ({"LOCAL_RANK": "a"}, "LOCAL_RANK=a is no whole number; "),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999 is no port; "),
        ({"MASTER_ADDR": "no.such.host.invalid"}, "MASTER_ADDR=no.such.host.invalid MASTER_PORT="),
    ],
)
def test_wrong_variables_are_named(start, variables, words):
    for process in [start(rank, SOON, **variables) for rank in range(2)]:
        code, said = ended(process)
        assert code == 2 and said.startswith(f"error: {words}"), said


def test_ranks_of_worlds_of_different_size(start):
    answers = [ended(process) for process in (start(0), start(1, WORLD_SIZE="4"))]
    for code, said in answers:
        assert code == 2 and "WORLD_SIZE=4 is another than that of rank 0; start the ranks by " in said, answers


def test_a_rank_that_waits_hears_ctrl_c(start, wait_until_1_asks):
    first, second = start(0, WORLD_SIZE="3"), start(1, WORLD_SIZE="3")
    wait_until_1_asks(first, second)
    second.send_signal(signal.SIGINT)
    assert second.wait(HANG_S) == 130


@pytest.mark.parametrize("rank", [0, 1])
def test_a_port_of_another_program(start, rank):
    """Rank 0 cannot open it; the others get no answer from what they reach."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        code, said = ended(start(rank, SOON, MASTER_PORT=port))
    assert code == 2 and said.startswith(f"error: MASTER_ADDR=127.0.0.1 MASTER_PORT={port}: "), said
    assert said.endswith("; give all ranks another MASTER_PORT"), said
