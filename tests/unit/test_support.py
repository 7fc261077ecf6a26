"""What tests rely on: points at which processes stand, and skips that name what to install."""

import signal
import subprocess
import sys

import pytest
from support import needs
from support.points import Points, wait_for
from support.processes import DEVNULL, script_environment, start_script

WRITER = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: print("noted", file=open(sys.argv[1] + ".signal", "w")))
for number in range(3):
    open(f"{sys.argv[1]}.{number}", "w")
"""


@pytest.mark.parametrize("fresh", [False, True])
def test_a_process_stands_until_the_test_lets_it_go_on(tmp_path, fresh):
    points = Points(tmp_path / "points", {"second": ("open", r"/file\.\d w", 2), "never": ("open", r"/other")})
    environment = script_environment(**points.environment)
    process = start_script("-c", WRITER, tmp_path / "file", environment=environment, stderr=DEVNULL, fresh=fresh)
    assert points.wait("second", process) == [process.pid]
    assert (tmp_path / "file.0").exists() and not (tmp_path / "file.1").exists()
    assert not points.standing("second.signalled")
    process.send_signal(signal.SIGTERM)
    points.wait("second.signalled", process)
    assert not (tmp_path / "file.1").exists()
    points.release("second")
    assert process.wait(100) == 0 and (tmp_path / "file.2").exists() and (tmp_path / "file.signal").exists()
    assert not points.standing("never")


def test_waiting_for_a_process_that_has_ended_fails():
    with subprocess.Popen([sys.executable, "-S", "-c", "raise SystemExit(3)"]) as process:
        with pytest.raises(AssertionError, match="has ended before the moon: 3"):
            wait_for(lambda: False, process, what="the moon")
        assert wait_for(lambda: 7, process) == 7


def test_what_is_missing_is_one_line(monkeypatch):
    monkeypatch.setattr(needs, "is_there", lambda name: name == "curl")
    assert needs.missing("curl") == needs.missing() == ""
    assert needs.missing("g++", "curl", "libaio") == "needs g++, libaio: apt-get install g++ libaio-dev"
    assert needs.missing("root", "ip") == "needs root, ip: apt-get install iproute2; run the tests as root"
    monkeypatch.setenv("IBQ_ALL_TESTS", "0")
    with pytest.raises(pytest.skip.Exception, match=r"needs g\+\+: apt-get install g\+\+"):
        needs.require("curl", "g++")
    monkeypatch.setenv("IBQ_ALL_TESTS", "1")
    with pytest.raises(pytest.fail.Exception, match=r"IBQ_ALL_TESTS=1: needs g\+\+"):
        needs.require("curl", "g++")
    needs.require("curl")


def test_every_need_has_a_remedy():
    for names in (needs.SLURM, needs.NVME, needs.BROWSER, needs.SMALL_DISK):
        assert set(names) <= {*needs.PACKAGES, *needs.REMEDIES}
