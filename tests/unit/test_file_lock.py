"""Locks of files: two runs in one folder, the folder of a process, one that fetches while others wait."""

import multiprocessing
import os
import time

import pytest

from ibq.files import lock


def in_another_process(work, *arguments):
    """What `work` gives in a process that is forked from this one."""
    ours, theirs = multiprocessing.Pipe()
    child = os.fork()
    if child == 0:
        theirs.send(work(*arguments))
        os._exit(0)
    os.waitpid(child, 0)
    return ours.recv()


def locks(path, of_process):
    with open(path, "w") as file:
        return lock(file, of_process=of_process)


@pytest.mark.parametrize("of_process", [False, True])
def test_one_process_has_the_lock_until_it_closes_the_file(tmp_path, of_process):
    path = tmp_path / "lock"
    with open(path, "w") as file:
        assert lock(file, of_process=of_process)
        assert not in_another_process(locks, path, of_process)
    assert in_another_process(locks, path, of_process)


def test_a_second_opening_in_the_same_process_does_not_get_it(tmp_path):
    with open(tmp_path / "lock", "w") as file:
        assert lock(file)
        assert not locks(tmp_path / "lock", of_process=False)


@pytest.mark.parametrize("of_process", [False, True])
def test_a_forked_worker_holds_the_lock_unless_it_is_of_the_process(tmp_path, of_process):
    path = tmp_path / "lock"
    reader, writer = os.pipe()
    with open(path, "w") as file:
        assert lock(file, of_process=of_process)
        worker = os.fork()
        if worker == 0:
            os.close(writer)
            os.read(reader, 1)  # until the other end is closed
            os._exit(0)
    try:
        assert in_another_process(locks, path, of_process) == of_process
    finally:
        os.close(writer)
        os.waitpid(worker, 0)
    assert in_another_process(locks, path, of_process)


def test_who_waits_gets_it_when_the_other_is_done(tmp_path):
    path = tmp_path / "lock"
    file = open(path, "w")  # noqa: SIM115 (closed while another waits)
    assert lock(file)
    waiting = os.fork()
    if waiting == 0:
        file.close()  # what was forked with it would keep it locked
        with open(path, "w") as other:
            os._exit(0 if lock(other, wait=True) else 1)
    time.sleep(0.2)
    assert os.waitpid(waiting, os.WNOHANG) == (0, 0)
    file.close()
    _, status = os.waitpid(waiting, 0)
    assert status == 0
