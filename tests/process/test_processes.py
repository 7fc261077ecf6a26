"""A forked script finds what a new process finds, and ends as one does."""

import importlib
import json
import random
import signal
import subprocess

import pytest
from support.processes import (
    DEVNULL,
    PIPE,
    STDOUT,
    Forked,
    can_fork,
    run_ranks,
    run_script,
    script_environment,
    start_script,
)

pytestmark = pytest.mark.skipif(not can_fork(), reason="with CUDA every start is a new one")
STATE = """
import json, os, signal, sys
print(json.dumps({
    "argv": sys.argv, "path": sys.path, "name": __name__, "file": "__file__" in globals(), "folder": os.getcwd(),
    "environment": dict(os.environ), "main": sys.modules["__main__"].STATE, "stdin": sys.stdin.read(),
    "files": sorted(os.listdir("/proc/self/fd")), "threads": len(os.listdir("/proc/self/task")),
    "handlers": [str(signal.getsignal(number)) for number in range(1, 32)], "session": os.getsid(0) == os.getpid(),
    "group": os.getpgid(0) == os.getpid(), "buffered": [sys.stdout.line_buffering, sys.stderr.line_buffering],
}))
"""


@pytest.mark.parametrize("new_session", [False, True])
def test_a_fork_finds_what_a_new_process_finds(new_session):
    found = []
    for fresh in (False, True):
        own = script_environment(RANK="3", IBQ_X="a b")
        code = f"STATE = 5\n{STATE}"
        process = start_script(
            "-c", code, "one", "", environment=own, stdout=PIPE, start_new_session=new_session, fresh=fresh
        )
        assert isinstance(process, Forked) != fresh
        found.append(json.loads(process.communicate()[0]))
    assert found[0] == found[1] and found[0]["environment"]["RANK"] == "3" and found[0]["session"] == new_session


def test_a_script_is_not_the_parents(tmp_path):
    """Its random numbers are its own, and modules that it imports are found beside it."""
    code = "import random, numpy; print(random.random(), numpy.random.rand())"
    assert len({number for _ in range(3) for number in run_script("-c", code).stdout.split()}) == 6
    state = random.getstate()
    assert run_script("ibq/train_ar.py", "--help").stdout.startswith("usage: train_ar.py ")
    assert random.getstate() == state


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("pass", 0),
        ("import sys; sys.exit(3)", 3),
        ("import sys; sys.exit('a word')", 1),
        ("1 / 0", 1),
        ("import os; os._exit(7)", 7),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9),
        ("import os, signal; os.kill(os.getpid(), signal.SIGINT); signal.pause()", -2),
        ("import atexit, os; atexit.register(os._exit, 9)", 9),
    ],
)
def test_it_ends_as_a_new_process_does(code, expected):
    forked, new = (run_script("-c", code, fresh=fresh) for fresh in (False, True))
    assert forked.returncode == new.returncode == expected
    assert forked.stdout == new.stdout and forked.stderr.splitlines()[-1:] == new.stderr.splitlines()[-1:]


def test_signals_timeouts_and_streams():
    said = (
        "import os, sys; print('out', flush=True); print('err', file=sys.stderr, flush=True); os.kill(os.getpid(), 15)"
    )
    process = start_script("-c", said, stdout=PIPE, stderr=STDOUT)
    assert process.communicate() == ("out\nerr\n", None) and process.returncode == -signal.SIGTERM
    sleeps = start_script("-c", "import time; time.sleep(100)", stdout=DEVNULL)
    assert isinstance(sleeps, Forked) and sleeps.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        sleeps.wait(0.01)
    sleeps.kill()
    assert sleeps.communicate() == (None, None) and sleeps.returncode == -signal.SIGKILL
    with pytest.raises(subprocess.TimeoutExpired):
        run_script("-c", "import time; time.sleep(100)", timeout=0.1)


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET", "PYTHONWARNINGS"])
def test_what_an_import_would_see_makes_a_new_process(name):
    process = start_script("-c", "pass", environment=script_environment(**{name: "7"}))
    assert not isinstance(process, Forked) and process.wait() in (0, 1)


def test_what_the_tests_import_makes_none():
    """Some modules set variables when they are imported or first used; forks must not end with the first of these."""
    pytest.importorskip("deepspeed")
    importlib.import_module("torch._inductor.runtime.cache_dir_utils").cache_dir()
    process = start_script("-c", "pass")
    assert isinstance(process, Forked) and process.wait() == 0


def test_other_modules_make_a_new_process(tmp_path):
    (tmp_path / "torch.py").write_text("told = 'another'")
    done = run_script("-c", "import torch; print(torch.told)", PYTHONPATH=str(tmp_path))
    assert done.stdout == "another\n", done.stderr


def test_ranks_end_when_one_fails():
    hello = "import os; print(os.environ['RANK'], os.environ['WORLD_SIZE'])"
    assert run_ranks(3, "-c", hello).stdout == "0 3\n1 3\n2 3\n"
    fails = "import os, sys, time; time.sleep(0 if os.environ['RANK'] == '1' else 300); sys.exit(5)"
    assert run_ranks(2, "-c", fails).returncode == 5
