"""The judgement over the ranks' beats alone, with a clock of the test."""

import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from support.points import wait_for

from ibq.engine.heartbeat import Heartbeat, HeartbeatConfig
from ibq.engine.watch import Beat, Process, Progress, Verdict, Watch


def beat(rank: int, count: int = 0, *, progress: Progress | None = None, done: bool = False, host: str = "a") -> Beat:
    process = Process(host, host, 100 + rank, "1")
    return Beat(rank=rank, process=process, count=count, progress=progress or Progress(), done=done)


def watch(beats: list[Beat], **settings) -> Watch:
    config = HeartbeatConfig(**{"dead_after_s": 10.0, "hang_after_s": 30.0} | settings)
    return Watch(config, 0, beats, look_s=1.0)


def live(judge: Watch, beats: list[Beat], silent: set[int], seconds: int, states: dict[int, str] | None = None):
    """Let time pass; all but the silent ranks go on beating. The first verdict."""
    for second in range(1, seconds + 1):
        judge.pass_time(1.0)
        now = [replace(old, count=old.count + second * (old.rank not in silent)) for old in beats]
        judge.observe(states or {}, now)
        if (verdict := judge.verdict()) is not None:
            return verdict, second
    return None, seconds


def test_silence_is_death_and_a_host_takes_its_ranks_along():
    beats = [beat(rank, host="ab"[rank // 2]) for rank in range(4)]
    verdict, seconds = live(watch(beats), beats, {2, 3}, 20)
    assert (verdict.kind, verdict.ranks, seconds) == ("dead", (2, 3), 11)
    assert live(watch(beats), beats, set(), 20) == (None, 20)
    assert live(watch(beats), beats, {0}, 20) == (None, 20)  # a rank does not judge itself
    gone, seconds = live(watch(beats), beats, set(), 20, {1: ""})
    assert (gone.ranks, seconds) == ((1,), 1) and gone.message.endswith("its process is gone")


def test_a_rank_that_is_done_neither_dies_nor_hangs():
    ended = [beat(0, progress=Progress(9, "x", 1, 9)), beat(1, done=True)]
    verdict, seconds = live(watch(ended), ended, {1}, 40, {1: ""})
    assert (verdict.kind, verdict.ranks, seconds) == ("hung", (0,), 31)


def test_time_in_which_the_watcher_itself_was_frozen_does_not_count():
    judge, beats = watch([beat(0), beat(1)]), [beat(0), beat(1)]
    judge.pass_time(1_000.0)
    assert judge.verdict() is None and not judge.silent()
    assert live(judge, beats, {1}, 20)[0].ranks == (1,)


def test_the_ranks_that_are_farthest_behind_are_named():
    places = [(5, "data", 1), (4, "optimizer", 3), (5, "forward", 2), (4, "optimizer", 3)]
    beats = [beat(rank, progress=Progress(*place, 50)) for rank, place in enumerate(places)]
    verdict, seconds = live(watch(beats), beats, set(), 40)
    assert (verdict.kind, verdict.ranks, seconds) == ("hung", (1, 3), 31)
    assert live(watch(beats, hang_after_s=None), beats, set(), 100)[0] is None
    assert Verdict.loads(verdict.dumps()) == verdict and Beat.loads(beats[1].dumps()) == beats[1]


def test_a_start_may_take_long():
    beats = [beat(0), beat(1, progress=Progress(5, "data", 1, 9))]
    assert live(watch(beats), beats, set(), 200) == (None, 200)


def test_progress_of_any_rank_keeps_the_run_alive():
    judge = watch([beat(0), beat(1)])
    for marks in range(100):
        judge.pass_time(1.0)
        judge.observe({}, [beat(0, marks), beat(1, marks, progress=Progress(3, "validation", 2, marks))])
        assert judge.verdict() is None


def test_a_store_whose_host_has_ended_well_is_missed_by_none():
    host = beat(0)
    assert watch([host, beat(1)]).store_lost("gone", None, host).ranks == (0,)
    assert watch([beat(0, done=True), beat(1)]).store_lost("gone", None, host) is None
    assert "agent at here:1" in watch([beat(0, done=True)]).store_lost("gone", "here:1", host).message


def test_a_phase_that_comes_again_is_progress_but_no_other_place():
    heartbeat = Heartbeat(HeartbeatConfig(), None)
    seen = []
    with heartbeat:
        for step, phase in [(0, "forward"), (0, "backward"), (0, "forward"), (0, "forward"), (1, "forward")]:
            heartbeat.mark(step, phase)
            seen.append(heartbeat._progress)
    assert seen == [
        Progress(0, "forward", 1, 1),
        Progress(0, "backward", 2, 2),
        Progress(0, "forward", 3, 3),
        Progress(0, "forward", 3, 4),
        Progress(1, "forward", 1, 5),
    ]
    assert heartbeat.explain(ValueError("x")) == "x" and not heartbeat._threads


def test_a_process_is_told_from_a_later_one_with_its_id():
    with subprocess.Popen(["sleep", "100"]) as child:
        process = replace_pid(Process.current(), child.pid)
        assert process.state() in "RSD"
        assert process._replace(born="1").state() == ""
        child.send_signal(signal.SIGSTOP)
        wait_for(lambda: process.state() == "T")
        child.kill()
        wait_for(lambda: process.state() == "")  # a zombie until it is waited for
        assert Path(f"/proc/{child.pid}").exists() and process.state() == ""


def replace_pid(process: Process, pid: int) -> Process:
    born = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return process._replace(pid=pid, born=born)


@pytest.mark.parametrize("settings", [{"every_s": 0}, {"dead_after_s": 4.9}, {"hang_after_s": 1.0}])
def test_settings_that_would_blame_healthy_ranks_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        HeartbeatConfig(**settings)
