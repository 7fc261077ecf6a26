"""Starting runs without Slurm at hand: ranks from its variables, preflight, snapshots, batch scripts, requeues."""

import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT
from support.points import HANG_S, wait_for
from support.processes import run_script
from support.training import make_workplace, scalars

from ibq import meeting
from ibq.config import ConfigError, UserError, exit_on_user_error
from ibq.training import provenance, stopping
from launchers import job, slurm
from launchers.lib import allocation, executor, run_config, snapshot, submit

PARTS = ("ibq", "launchers", "tools", "yaml", "slurm", "setup.cfg", "pyproject.toml")
LAUNCHERS_OWN = re.compile(r"(SLURM|IBQ|SBATCH|SUBMITIT)_|(RANK|LOCAL_RANK|WORLD_SIZE|MASTER_ADDR|MASTER_PORT)$")


def clean_environment(**own: str) -> dict[str, str]:
    """The environment without what launchers set."""
    kept = {name: value for name, value in os.environ.items() if not LAUNCHERS_OWN.match(name)}
    kept |= {"OMP_NUM_THREADS": "1", "VIRTUAL_ENV": sys.prefix}
    kept["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return kept | own


@pytest.fixture(scope="module")
def no_slurm(tmp_path_factory) -> str:
    """A PATH on which there is no Slurm."""
    folder = tmp_path_factory.mktemp("bin")
    for name in ("bash", "cat", "date", "env", "git", "ls", "mkdir", "mv", "rm", "sh", "uname"):
        (folder / name).symlink_to(shutil.which(name))
    (folder / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (folder / "python").chmod(0o755)
    assert shutil.which("sbatch", path=str(folder)) is None
    return str(folder)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project with data in `work`: launchers write beside the code."""
    folder = tmp_path_factory.mktemp("project")
    ignore = shutil.ignore_patterns("__pycache__", "logs", "pictures")
    for part in PARTS:
        source = ROOT / part
        (shutil.copytree(source, folder / part, ignore=ignore) if source.is_dir() else shutil.copy(source, folder))
    (folder / "slurm" / "logs").mkdir()
    make_workplace(folder / "work")
    return folder


@pytest.fixture(scope="module")
def place(project) -> Path:
    return project / "work"


# --- Ranks from Slurm's variables ---

TASK = {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "2",
}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("localhost", "localhost"),
        ("node03", "node03"),
        ("a,b,c", "a"),
        ("node[03-07,12],login", "node03"),
        ("node[12,03-07]", "node12"),
        ("node[3]", "node3"),
        ("node[003-120]", "node003"),
        ("gpu-node-[1-2]", "gpu-node-1"),
        ("rack[1-2]node[01-10]", "rack1node01"),
        ("rack[1,3]-gpu[09-10],x", "rack1-gpu09"),
        ("node[1-2]-ib.cluster.org,other", "node1-ib.cluster.org"),
        ("tux1.example.org,tux[2-3]", "tux1.example.org"),
    ],
)
def test_the_first_host_of_a_list(nodes, first):
    assert meeting.first_host(nodes) == first


def test_ranks_of_a_task():
    expected = {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "MASTER_ADDR": "gpu07"}
    assert meeting.slurm_task(TASK) == expected | {"MASTER_PORT": str(meeting.slurm_port(TASK))}
    own = meeting.slurm_task(TASK | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5"})
    assert own["MASTER_ADDR"] == "10.0.0.1" and own["MASTER_PORT"] == "5"


@pytest.mark.parametrize(
    "environment",
    [
        TASK | {"WORLD_SIZE": "2", "RANK": "0"},  # torchrun's, in a task for each node
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # a batch script
        TASK | {"SLURM_STEP_NUM_TASKS": "1"},
        {},
    ],
    ids=["torchrun", "batch script", "alone", "no Slurm"],
)
def test_what_is_no_rank_of_slurm(environment):
    assert meeting.slurm_task(environment) == {}


def test_ports_of_what_may_meet_on_a_node():
    ports = {
        meeting.slurm_port({"SLURM_JOB_ID": str(j), "SLURM_STEP_ID": str(step), "SLURM_RESTART_COUNT": str(restart)})
        for j in (999, 1000, 1001)
        for step in (0, 1)
        for restart in (0, 1, 2)
    }
    assert len(ports) == 3 * 2 * 3 and ports <= set(meeting.PORTS)
    large = {meeting.slurm_port({"SLURM_JOB_ID": str(j)}) for j in range(2**31, 2**31 + 2000)}
    assert len(large) == 2000 and large <= set(meeting.PORTS)


@pytest.mark.slow
def test_two_ranks_by_slurms_variables_alone(place, tmp_path):
    command = [sys.executable, "ibq/train_ar.py", "--config", str(place / "transformer.yaml")]
    command += [f"output={tmp_path / 'run'}", "training.micro_batch=4"]
    own = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_ID": "0"}
    own |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JWT": "a secret", "SLURM_RESTART_COUNT": "0"}
    ranks = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=clean_environment(**own, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=HANG_S)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    [start] = [json.loads(line) for line in (tmp_path / "run/starts.jsonl").read_text().splitlines()]
    assert start["ranks"] == 2 and start["environment"]["SLURM_STEP_NUM_TASKS"] == "2"
    assert "a secret" not in json.dumps(start)
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "finished"
    assert len(list((tmp_path / "run/checkpoints/step-00000004").glob("transformer-*.safetensors"))) == 2


# --- Preflight ---


@pytest.fixture(scope="module")
def preflights(tmp_path_factory):
    """What every rank of every case answered, and the folder of the ranks."""
    folder = tmp_path_factory.mktemp("preflight")
    for name in ("shared", "other"):
        (folder / name).mkdir()
    (folder / "link").symlink_to(folder / "shared")
    (folder / "file").write_text("")
    here, soon = str(folder / "shared"), ["--wait-s", "15"]
    cases = {
        "good": {},
        "alone": {"ranks": 1},
        "beside it": {"folders": [here, here, str(folder / "link")]},
        "missing": {"absent": [1], "options": [*soon, "--hosts", "n1,n2,n3"]},
        "two nodes missing": {"ranks": 8, "absent": [2, 3, 4, 6, 7], "options": [*soon, "--hosts", HOSTS]},
        "rank 0 missing": {"absent": [0], "options": ["--wait-s", "3"]},
        "another folder": {"folders": [here, here, str(folder / "other")], "options": soon},
        "rank 0 has another": {"folders": [str(folder / "other"), here, here], "options": soon},
        "unwritable": {"folders": [here, str(folder / "file" / "below"), here], "options": soon},
        "clock": {"clock": {"1": 100}},
        "clock of rank 0": {"clock": {"0": -100}},
        "clock by a little": {"clock": {"2": 2}},
        "killed": {"killed": 1, "options": soon},
        "stopped": {"stopped": 2, "options": soon},
        "rank 0 killed": {"killed": 0, "options": soon},
        "dies after its hello": {"mute": 2, "options": soon},
    }
    for case in cases.values():
        case.setdefault("ranks", 3)
        case.setdefault("folders", [here] * case["ranks"])
    (folder / "cases.json").write_text(json.dumps(cases))
    done = run_script("tests/workers/preflight_worker.py", str(folder / "cases.json"), TORCH_CPP_LOG_LEVEL="FATAL")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), folder


HOSTS = "n1,n1,n2,n2,n3,n3,n4,n4"
HERE = re.escape(os.uname().nodename)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["good", "beside it", "clock by a little"])
def test_preflight_of_good_nodes(preflights, name):
    found = preflights[0][name]
    assert [found[rank][0] for rank in ("0", "1", "2")] == [0, 0, 0], found
    assert re.match(r"preflight: 3 ranks on 1 nodes in \d+\.\d s; all see the folder, .* GB/s a rank\n$", found["0"][1])
    assert found["1"][1] == found["2"][1] == ""
    alone = preflights[0]["alone"]["0"]
    assert alone[:2] == [0, "preflight: the folder can be written; there is one rank\n"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", "rank 1 on n2: did not start within 15 s"),
        # Each node once, and n3 by the rank that is missing there.
        ("two nodes missing", "ranks 2, 3 on n2: did .* s; rank 4 on n3: did .* s; ranks 6, 7 on n4: did .* s"),
        ("another folder", f"rank 2 on {HERE}: has another .*/shared than rank 0"),
        ("rank 0 has another", f"ranks 1, 2 on {HERE}: has another .*/other than rank 0"),
        ("unwritable", rf"rank 1 on {HERE}: cannot write to .*/file/below \(Not a directory\)"),
        ("clock", rf"rank 1 on {HERE}: its clock is \+(99|10\d)\.\d s off"),
        ("clock of rank 0", rf"rank 0 on {HERE}: its clock is -(9\d|10\d)\.\d s off"),
        ("killed", f"rank 1 on {HERE}: ended in the all-reduce, or hangs there"),
        ("stopped", f"rank 2 on {HERE}: ended in the all-reduce, or hangs there"),
        ("dies after its hello", f"rank 2 on {HERE}: came and does not answer any more"),
    ],
)
def test_preflight_names_who_is_at_fault(preflights, name, words):
    answers = dict(preflights[0][name])
    verdict = answers["0"][1]
    assert re.fullmatch(f"preflight failed: {words}\n", verdict), answers
    harmed = [rank for rank, (code, _, _) in answers.items() if code < 0]
    assert harmed == {"killed": ["1"], "stopped": ["2"], "dies after its hello": ["2"]}.get(name, [])
    for rank, (code, said, _) in answers.items():
        assert rank in harmed or (code == 1 and said == (verdict if rank == "0" else "")), answers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"), [("rank 0 missing", "does not reach rank 0 at"), ("rank 0 killed", "has lost rank 0 at")]
)
def test_preflight_without_rank_0(preflights, name, words):
    others = {rank: answer for rank, answer in preflights[0][name].items() if rank != "0"}
    assert len(others) == 2
    for rank, (code, said, _) in others.items():
        assert code == 1 and said.count("\n") == 1, others
        assert said.startswith(f"preflight failed: rank {rank} on {os.uname().nodename} {words} 127.0.0.1:")


@pytest.mark.slow
def test_preflight_leaves_nothing_and_ends(preflights):
    answers, folder = preflights
    assert sorted(path.name for path in folder.rglob("*")) == ["cases.json", "file", "link", "other", "shared"]
    assert not any(late for case in answers.values() for _, _, late in case.values())


@pytest.mark.slow
def test_a_preflight_by_hand(tmp_path):
    """By torchrun, whose agent keeps the store; and with rank 0 missing: one line, without a stack."""
    options = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run_script(*options, "launchers/lib/preflight.py", "--folder", str(tmp_path), "--device", "cpu")
    assert done.returncode == 0 and "preflight: 2 ranks on 1 nodes" in done.stdout, done.stderr
    where = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    # Anew: it tells PyTorch to keep quiet before it imports it.
    lost = run_script("launchers/lib/preflight.py", "--folder", str(tmp_path), "--wait-s", "1", fresh=True, **where)
    assert lost.returncode == 1 and "rank 1 on" in lost.stderr and lost.stderr.count("\n") == 1


def test_files_of_killed_preflights_are_removed(tmp_path):
    from ibq.engine import preflight

    old, young = tmp_path / ".preflight-old", tmp_path / ".preflight-young"
    for folder in (old, young):
        folder.mkdir()
        (folder / "rank-0").write_text("")
    os.utime(old, (0, 0))
    preflight._remove_old(tmp_path)
    assert not old.exists() and young.exists()


# --- Snapshots ---


@pytest.fixture
def small(tmp_path) -> Path:
    """A small project."""
    root = tmp_path / "small"
    for name in ("ibq/train.py", "yaml/b.yaml", "slurm/logs/job.log", "ibq/__pycache__/train.pyc", "ibq/pictures/x"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "notes.txt").write_text("mine")
    return root


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_same_code_same_snapshot(small):
    (small / "ibq" / ".#train.py").symlink_to("someone@somewhere.42")  # an editor's lock
    copy = snapshot.take_snapshot(small)
    assert copy == snapshot.take_snapshot(small) and copy.parent == small / "runs" / "code"
    assert files_of(copy) == {"ibq/train.py", "yaml/b.yaml", snapshot.SNAPSHOT_FILE}
    (small / "slurm/logs/job.log").write_text("more")
    (small / "notes.txt").write_text("more")
    assert snapshot.take_snapshot(small) == copy
    (small / "ibq/train.py").write_text("another")
    edited = snapshot.take_snapshot(small)
    assert edited != copy and (copy / "ibq/train.py").read_text() == "ibq/train.py"
    (small / "ibq/train.py").rename(small / "ibq/run.py")
    assert snapshot.take_snapshot(small) not in (copy, edited), "a name counts"
    assert not list((small / "runs/code").glob(".tmp*"))


def test_a_half_made_snapshot_is_none(small, monkeypatch):
    (small / "runs/code" / snapshot.code_hash(small) / "ibq").mkdir(parents=True)  # by a copy that was killed, say
    copy2 = shutil.copy2

    def edited_meanwhile(source, target):
        copy2(source, target)
        Path(target).write_text("typing")

    monkeypatch.setattr(snapshot.shutil, "copy2", edited_meanwhile)
    (small / "yaml/c.yaml").write_text("")
    with pytest.raises(UserError, match="edited while it was copied"):
        snapshot.take_snapshot(small)
    assert not list((small / "runs/code").glob(".tmp*"))


def test_a_snapshot_knows_its_revision(small):
    def git(*arguments: str) -> str:
        own = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", "-C", small, *own, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    def said() -> dict:
        return json.loads((snapshot.take_snapshot(small) / snapshot.SNAPSHOT_FILE).read_text())

    assert said() == {"from": str(small), "revision": None, "edited": None}
    git("init", "--quiet")
    (small / ".gitignore").write_text("runs/\n")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    (small / "ibq/train.py").write_text("2")
    assert said() == {"from": str(small), "revision": git("rev-parse", "HEAD"), "edited": True}
    git("commit", "--quiet", "-a", "-m", "second")
    (small / "ibq/more.py").write_text("3")
    git("add", ".")
    git("commit", "--quiet", "-m", "third")
    assert said() == {"from": str(small), "revision": git("rev-parse", "HEAD"), "edited": False}
    assert provenance.git_state(snapshot.take_snapshot(small)) == {
        "revision": git("rev-parse", "HEAD"),
        "edited": False,
    }


@pytest.mark.slow
def test_a_snapshot_works_on_its_own(project, tmp_path):
    copy = snapshot.take_snapshot(project, tmp_path / "code")
    script = copy / "ibq" / "train_ar.py"
    program = (
        "import atexit, runpy, sys\n"
        "files = lambda: [m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'ibq' and m.__file__]\n"
        "atexit.register(lambda: print('\\n'.join(['FILES', *files()])))\n"
        f"sys.argv = [{str(script)!r}, '--help']\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    # PYTHONPATH is another's: the project of the tests.
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=clean_environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said, _, files = done.stdout.partition("FILES\n")
    assert "--config" in said and len(files.splitlines()) > 20
    assert all(Path(file).is_relative_to(copy) for file in files.splitlines()), files


# --- Batch scripts by submitit: options and mistakes ---


def text_of(no_slurm, monkeypatch, capsys, *arguments: str) -> str:
    """What --dry-run prints, where there is no Slurm."""
    monkeypatch.setenv("PATH", no_slurm)
    monkeypatch.setenv("VIRTUAL_ENV", sys.prefix)
    assert slurm.main([*arguments, "--dry-run", "--", "ibq/train_ar.py", "--config", f"{ROOT}/yaml/xxl.yaml"]) == 0
    return capsys.readouterr().out


def test_a_dry_run_shows_the_script(no_slurm, monkeypatch, capsys):
    options = ["--nodes", "8-12", "--gpus-per-node", "8", "--timeout-h", "36", "--cpus-per-gpu", "12"]
    options += ["--partition", "gpu", "--account", "me", "--qos", "high", "--signal-s", "600"]
    text = text_of(no_slurm, monkeypatch, capsys, *options, "--sbatch", "constraint=h100")
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    for wanted in ("nodes=8-12", "gpus-per-node=8", "time=2160", "cpus-per-gpu=12", "partition=gpu", "account=me",
                   "qos=high", "signal=USR2@600", "requeue", "open-mode=append", "constraint=h100",
                   "job-name=ibq-xxl"):  # fmt: skip
        assert f"#SBATCH --{wanted}" in lines, text
    assert not any("ntasks" in line for line in lines), "Slurm holds on to a number of tasks when a node has died"
    assert 'source "$IBQ_CODE/slurm/setup.sh"' in text and "export IBQ_WARNING_S=600\n" in text
    assert re.search(r'cd "\$IBQ_CODE" \|\| exit 2\n+(#.*\n|export .*\n)*python -u -m submitit.core._submit', text), (
        text
    )
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_the_signal_is_that_of_the_run(no_slurm, monkeypatch, capsys):
    """From the config alone: a variable that says another would end the ranks without a checkpoint."""
    monkeypatch.delenv("SUBMITIT_PREEMPT_SIGNAL", raising=False)
    for name in ("USR1", "USR2"):
        monkeypatch.setenv("PATH", no_slurm)
        assert slurm.main(["--dry-run", *RUN, f"checkpoint.signal={name}"]) == 0
        assert f"#SBATCH --signal={name}@300" in capsys.readouterr().out
        monkeypatch.delenv("SUBMITIT_PREEMPT_SIGNAL")
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "USR1")
    with pytest.raises(UserError, match="SUBMITIT_PREEMPT_SIGNAL: USR1 would end the ranks, which save at USR2"):
        slurm.main(["--dry-run", *RUN])
    run = run_config.load_run("ibq/train_ar.py", [*RUN[2:], "checkpoint.signal=USR1"])
    with pytest.raises(UserError, match=r"ar_2b.sh: --signal=USR2 would end the ranks, which save at USR1"):
        submit.check_signal(run, f"{ROOT}/slurm/ar_2b.sh")


def test_a_dry_run_without_gpus(no_slurm, monkeypatch, capsys):
    text = text_of(no_slurm, monkeypatch, capsys, "--nodes", "2", "--gpus-per-node", "0", "--cpus-per-gpu", "6")
    assert "gpu" not in "".join(line for line in text.splitlines() if line.startswith("#SBATCH"))
    assert "#SBATCH --ntasks-per-node=1" in text and "#SBATCH --cpus-per-task=6" in text
    assert "#SBATCH --time=1440" in text and "partition" not in text and "account" not in text
    assert "#SBATCH --time=1\n" in text_of(no_slurm, monkeypatch, capsys, "--timeout-h", "0.001", "--signal-s", "1")


RUN = ["--", "ibq/train_ar.py", "--config", f"{ROOT}/yaml/xxl.yaml"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes", "0", *RUN], "--nodes: '0' is no number of nodes; write 12, or 6-12"),
        (["--nodes", "x", *RUN], "--nodes: 'x' is no number of nodes"),
        (["--nodes", "2-", *RUN], "--nodes: '2-' is no number of nodes"),
        (["--nodes", "12-8", *RUN], "--nodes: '12-8' begins with the larger number"),
        (["--timeout-h", "0", *RUN], "must be positive"),
        (["--gpus-per-node", "-1", *RUN], "must be positive"),
        (["--timeout-h", "0.05", *RUN], "--signal-s: 300 s are not left in 0.05 h"),
        (["--sbatch", "exclusive", *RUN], "--sbatch: 'exclusive' is no option; write NAME=VALUE"),
        (["--nodes", "1"], "no script is given; write -- ibq/train_ar.py"),
        (["--nodes", "1", "--"], "no script is given; write -- ibq/train_ar.py"),
        (["--", "--config", "yaml/xxl.yaml"], "--config: is no script of the project"),
        (["--", "ibq/train_arr.py"], "ibq/train_arr.py: is no script of the project, such as ibq/train_ar.py"),
        (["--", "ibq/train_ar.py"], "ibq/train_ar.py: the following arguments are required: --config; write --config"),
        ([*RUN[:-1], "yaml/none.yaml"], "none.yaml: file not found"),
        ([*RUN, "model.dept=3"], "model.dept: unknown key"),
        ([*RUN, "training.batch_size=7"], "training.batch_size"),
        ([*RUN, "checkpoint.signal=none"], "checkpoint.signal: none leaves Slurm's warning"),
        (RUN, "sbatch: there is no Slurm on this machine; use --executor local"),
        (["--partition", "gpu", *RUN], "sbatch: there is no Slurm on this machine; use --executor local"),
    ],
)
@pytest.mark.parametrize("dry", [False, True])
def test_mistakes_end_with_2_and_one_line(no_slurm, monkeypatch, capsys, arguments, words, dry):
    if dry and "no Slurm" in words:
        return  # a dry run needs none
    monkeypatch.setenv("PATH", no_slurm)
    monkeypatch.setenv("VIRTUAL_ENV", sys.prefix)
    if not dry and "no Slurm" not in words:  # else that would be the mistake that is found
        monkeypatch.setattr(slurm.shutil, "which", lambda name: name)
    assert_refused(monkeypatch, capsys, [*["--dry-run"][: int(dry)], *arguments], words)


def assert_refused(monkeypatch, capsys, arguments: list[str], words: str) -> None:
    """Exit code 2, one line, and not even a copy of the code."""
    monkeypatch.setattr(slurm, "take_snapshot", lambda: pytest.fail("a copy of the code was made"))
    with pytest.raises(SystemExit) as end:
        exit_on_user_error(lambda: slurm.main(arguments))
    said = capsys.readouterr()
    assert end.value.code == 2 and said.out == "", said
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and words in said.err


@pytest.mark.parametrize(
    ("site", "words"),
    [
        (None, "site.env does not exist; copy slurm/site.env there, or unset IBQ_SITE"),
        ('IBQ_VENV="nowhere\n', "site.env is no bash; mend the line that is named above"),
        (
            "IBQ_VENV=nowhere",
            "IBQ_VENV: there is no Python environment in 'nowhere'; 'source tools/lib/environment.sh'",
        ),
        ("IBQ_MODULES=cuda/99\nmodule() { return 1; }", "IBQ_MODULES: 'cuda/99' cannot be loaded"),
    ],
)
def test_mistakes_of_the_site_file(no_slurm, monkeypatch, capsys, tmp_path, site, words):
    if site is not None:
        (tmp_path / "site.env").write_text(site)
    monkeypatch.setenv("PATH", no_slurm)
    monkeypatch.setenv("IBQ_SITE", str(tmp_path / "site.env"))
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    assert_refused(monkeypatch, capsys, ["--dry-run", *RUN], words)
    done = subprocess.run(["bash", "slurm/ar_b.sh"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and words in done.stderr.splitlines()[-1]


def test_a_site_need_not_be_written_for_set_u(no_slurm, tmp_path):
    """... but a variable that a script wants and the site lacks is an error, not an empty setting."""
    text = (ROOT / "slurm/site.env").read_text()
    good, lacking = tmp_path / "good.env", tmp_path / "lacking.env"
    good.write_text(f'{text}\nexport X="$UNHEARD_OF:y"\n')
    lacking.write_text(text.replace("IBQ_CODES_TRAIN=", "IBQ_CODES_TRAINING="))
    own = {"PATH": no_slurm, "SLURM_JOB_ID": "1", "IBQ_CODE": ".", "VIRTUAL_ENV": "x"}
    stub = 'python() { echo "$X"; }; exec() { "$@"; }; set -- ; source slurm/ar_b.sh'
    for site, works in ((good, True), (lacking, False)):
        environment = clean_environment(**own, IBQ_SITE=str(site))
        done = subprocess.run(
            ["bash", "-c", stub], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert (done.returncode == 0) == (done.stdout == ":y\n") == works, done
    assert "IBQ_CODES_TRAIN: unbound variable" in done.stderr


@pytest.mark.slow
def test_a_mistake_in_earnest(project, no_slurm):
    """The commands themselves: nothing is written, nothing submitted."""
    before = files_of(project)
    environment = clean_environment(PATH=no_slurm, PYTHONDONTWRITEBYTECODE="1")
    for command, words in (
        (["python", "launchers/slurm.py", "--nodes", "0", *RUN], "--nodes: '0'"),
        (["bash", "slurm/ar_b.sh"], "sbatch: there is no Slurm on this machine; torchrun starts a run without it"),
        (["bash", "slurm/ar_2b.sh", "training.batch_size=1"], "the global batch 1 does not divide"),
    ):
        done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done
    assert files_of(project) == before


@pytest.mark.slow
def test_the_code_of_a_job_is_that_of_its_first_start(project, no_slurm, tmp_path):
    """`sbatch` copies only the script: the copy is made in the job, once for all its starts."""
    own = tmp_path / "project"
    for part in ("ibq", "launchers", "slurm"):
        shutil.copytree(project / part, own / part)
    (own / "launchers/job.py").write_text("import os\nprint(os.environ['IBQ_CODE'], os.environ['IBQ_PROJECT'])\n")
    environment = clean_environment(PATH=no_slurm, SLURM_JOB_ID="77")
    said = []
    for text in ("first", "edited"):
        (own / "ibq/note.py").write_text(f"# {text}\n")
        command = ["bash", "slurm/ar_b.sh"]
        done = subprocess.run(command, cwd=own, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        code, root = done.stdout.split()
        said.append((own / code / "ibq/note.py").read_text())
        assert Path(root) == own and Path(code).parent == own / "runs" / "code"
    assert said == ["# first\n", "# first\n"]
    assert snapshot.code_hash(own) != Path(code).name, "the edit would have made another copy"


# --- Without a scheduler ---

STEPS = 250


@pytest.fixture(scope="module")
def stopped_and_gone_on(project):
    """`--executor local` with two ranks, stopped by SIGUSR2 to one of them, and the same command once more."""
    options = ["--executor", "local", "--gpus-per-node", "2"]
    command = [sys.executable, "launchers/slurm.py", *options, "--", "ibq/train_ar.py", "--config"]
    command += ["work/transformer.yaml", "output=runs/local", f"training.max_steps={STEPS}", "training.micro_batch=4"]
    command += ["training.log_every=10", "training.validate_every=200", "checkpoint.save_every=100000"]
    environment = clean_environment(IBQ_TOKEN="hunter2", NCCL_X="kept", AWS_SECRET="hunter3")
    folder = project / "runs" / "local"
    first = subprocess.Popen(
        command,
        cwd=project,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    # The launcher gives the ranks a PYTHONPATH of its own, so that they cannot be made to stand.
    logged = folder / "metrics.jsonl"
    wait_for(lambda: logged.exists() and max(scalars(folder).get("loss/total", {0: 0})) >= 20, first)
    os.kill(json.loads((folder / "status.json").read_text())["pid"], signal.SIGUSR2)
    said, _ = first.communicate(timeout=HANG_S)
    status = json.loads((folder / "status.json").read_text())
    again = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=HANG_S)
    assert again.returncode == 0, again.stderr
    return first.returncode, said, status, folder


@pytest.mark.slow
def test_local_ranks_stop_and_go_on(project, stopped_and_gone_on):
    code, said, status, folder = stopped_and_gone_on
    assert code == 128 + signal.SIGUSR2, said
    assert status["state"] == "stopped" and status["reason"] == "SIGUSR2" and 0 < status["step"] < STEPS
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == [f"step-{status['step']:08d}", f"step-{STEPS:08d}"]
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    steps = list(scalars(folder)["loss/total"])
    assert steps == sorted(set(steps)) and steps[-1] == STEPS
    logs = sorted((folder / "logs").iterdir())
    assert len(logs) == 2 and all(file.name.startswith("local-") for file in logs)
    for log in logs:
        assert {path.name for path in log.iterdir()} == {"rank-0.log", "rank-1.log", "attempts.jsonl"}
    assert "SIGUSR2: saving once" in (logs[0] / "rank-0.log").read_text()
    rows = [json.loads((log / "attempts.jsonl").read_text()) for log in logs]
    assert [(row["code"], row["before"], row["after"]) for row in rows] == [(140, "", names[0]), (0, *names)]
    out = said.split("its log: ")[1].splitlines()[0]
    assert "preflight: 2 ranks on 1 nodes" in Path(out).read_text()
    assert not list(folder.glob(".preflight*"))


@pytest.mark.slow
def test_a_run_says_where_it_comes_from(project, stopped_and_gone_on):
    folder = stopped_and_gone_on[-1]
    text = (folder / "starts.jsonl").read_text()
    starts = [json.loads(line) for line in text.splitlines()]
    assert len(starts) == 2 and "hunter" not in text
    for start in starts:
        assert Path(start["code"]).parent == project / "runs" / "code" and start["revision"] is None
        assert start["command"][0] == sys.executable and start["command"][2:4] == ["--config", "work/transformer.yaml"]
        assert start["command"][1] == f"{start['code']}/ibq/train_ar.py"
        assert start["ranks"] == 2 and start["folder"] == str(project) and start["host"] == os.uname().nodename
        assert start["environment"]["NCCL_X"] == "kept" and start["environment"]["WORLD_SIZE"] == "2"
        assert not {"IBQ_TOKEN", "AWS_SECRET", "PATH", "HOME"} & start["environment"].keys()
    packages = (folder / "packages.txt").read_text().splitlines()
    assert packages == sorted(packages, key=str.lower)
    assert any(line.startswith("torch==") for line in packages) and all("==" in line for line in packages)


def test_what_may_be_secret_stays_out(monkeypatch):
    for name in ("IBQ_TOKEN", "IBQ_API_KEY", "SLURM_JWT", "DS_PASSWORD", "TORCH_AUTH", "WANDB_MODE", "MASTERMIND"):
        monkeypatch.setenv(name, "hunter2")
    for name in ("IBQ_SITE", "NCCL_DEBUG", "SLURM_JOB_ID", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "RANK"):
        monkeypatch.setenv(name, "kept")
    record = provenance.start_record(ROOT)
    assert "hunter2" not in json.dumps(record["environment"])
    assert list(record["environment"].values()).count("kept") == 6
    if (ROOT / ".git").exists():
        assert re.fullmatch("[0-9a-f]{40}", record["revision"]) and record["edited"] in (True, False)


def test_gpus_stay_visible_to_the_local_executor(monkeypatch):
    """submitit sets CUDA_VISIBLE_DEVICES to nothing for what asks for none."""
    for value, said in ((None, "None"), ("2,3", "2,3"), ("", "")):
        if value is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        monkeypatch.setenv("VIRTUAL_ENV", sys.prefix)
        command = [*shlex.split(slurm.local_python(ROOT)), "-c", "import os; print(os.getenv('CUDA_VISIBLE_DEVICES'))"]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout == f"{said}\n"


# --- What a job does with how its ranks end ---


class FakeAllocation:
    """Nodes that are not there; every step is a process that ends with the next code, perhaps after a checkpoint."""

    def __init__(self, nodes=1, ranks_per_node=2, ends=()):
        self.name, self.restart = "fake", 0
        self.nodes, self.ranks_per_node = tuple(f"n{i}" for i in range(nodes)), ranks_per_node
        self.ends, self.steps, self.requeued = list(ends), [], 0

    def start(self, step):
        self.steps.append(step)
        code, checkpoint = self.ends.pop(0)
        if checkpoint is not None:
            checkpoint.mkdir(parents=True)
        kill = f"os.kill(os.getpid(), {-code})" if code < 0 else f"sys.exit({code})"
        return [subprocess.Popen([sys.executable, "-S", "-c", f"import os, sys; {kill}"])]

    def requeue(self):
        self.requeued += 1
        return True


@pytest.fixture
def starts(place, tmp_path, monkeypatch):
    """A function: the codes and requeues of successive starts of a job whose ranks end so."""

    def run(*ends: tuple[int, str | None], **settings) -> list[tuple[int, int]]:
        checkpoints = tmp_path / "run" / "checkpoints"
        run.allocation = fake = FakeAllocation(
            ends=[(code, checkpoints / name if name else None) for code, name in ends]
        )
        monkeypatch.setattr(job, "current_allocation", lambda ranks: fake)
        arguments = ("--config", str(place / "transformer.yaml"), f"output={tmp_path / 'run'}")
        arguments = (*arguments, "training.micro_batch=4")
        found = []
        for _ in ends:
            before = fake.requeued
            one = job.Job(script="ibq/train_ar.py", arguments=arguments, preflight=False, **settings)
            found.append((one(), fake.requeued - before))
            fake.restart += 1
        return found

    return run


def test_done_and_mistaken_jobs_are_not_requeued(starts, capsys):
    assert starts((0, None), (2, None)) == [(0, 0), (2, 0)]
    said = capsys.readouterr().out
    assert "ibq/train_ar.py is done" in said and "only its user can mend that" in said


def test_stopped_jobs_are_requeued_however_often(starts):
    codes = [140, 143, -signal.SIGUSR2, -signal.SIGTERM, 138]
    assert starts(*[(code, None) for code in codes]) == [(code, 1) for code in (140, 143, 140, 143, 138)]


def test_stops_that_never_bring_a_checkpoint_end_it(starts, capsys, monkeypatch):
    monkeypatch.setattr(job, "MOST_STOPS", 3)
    ends = [(140, None), (140, "step-00000010"), (140, None), (143, None), (140, None)]
    assert [requeued for _, requeued in starts(*ends)] == [1, 1, 1, 1, 0]
    assert "3 starts without a new checkpoint: it is not requeued" in capsys.readouterr().out


def test_failures_are_requeued_while_they_bring_checkpoints(starts, tmp_path, capsys):
    ends = [(1, None), (1, None), (1, "step-00000010"), (137, None), (1, None), (1, None), (1, None)]
    found = starts(*ends, retries=3)
    assert found == [(1, 1), (1, 1), (1, 1), (137, 1), (1, 1), (1, 0), (1, 0)]
    assert "3 starts without a new checkpoint: it is not requeued" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run/logs/fake/attempts.jsonl").read_text().splitlines()]
    assert [row["after"] for row in rows[1:4]] == ["", "step-00000010", "step-00000010"]
    assert [row["start"] for row in rows] == list(range(7)) and rows[0]["nodes"] == ["n0"]


def test_torchrun_waits_for_a_save_as_long_as_the_last_ones(starts, tmp_path):
    """The time is in the run's own status, and stays there while this changes."""
    for seconds, given in ((None, "600"), (20.0, "600"), (450.0, "900")):
        if seconds is not None:
            stopping.write_status(tmp_path / "run", "running", 5, 10, save_seconds=seconds)
            stopping.write_status(tmp_path / "run", "failed", 6, 10, "no reason")
        starts((1, None), launcher="torchrun")
        command = starts.allocation.steps[-1].command
        if '"--shutdown-timeout"' in allocation.torchrun_source():
            assert command[command.index("--shutdown-timeout") + 1] == given
        else:
            assert "--shutdown-timeout" not in command
    assert stopping.read_status(tmp_path / "run")["save_seconds"] == 450.0


def test_a_stop_ends_a_row_of_failures(starts):
    assert [requeued for _, requeued in starts((1, None), (140, None), (1, None), (1, None), retries=2)] == [1, 1, 1, 0]
    assert starts((1, None), retries=1) == [(1, 0)]


def test_attempts_that_cannot_be_read_count_for_nothing(tmp_path):
    assert job.fruitless(tmp_path) == 0
    (tmp_path / job.ATTEMPTS_FILE).write_text('{"start": 0, "co')
    assert job.fruitless(tmp_path) == 0


def test_the_preflight_decides_whether_ranks_start(place, tmp_path, monkeypatch):
    arguments = ("--config", str(place / "transformer.yaml"), f"output={tmp_path / 'run'}", "training.micro_batch=2")
    for ends, steps in (([(1, None)], 1), ([(0, None), (0, None)], 2)):
        fake = FakeAllocation(nodes=2, ends=ends)
        monkeypatch.setattr(job, "current_allocation", lambda ranks, fake=fake: fake)
        job.Job(script="ibq/train_ar.py", arguments=arguments)()
        assert len(fake.steps) == steps
        check = fake.steps[0]
        assert (
            check.command[1].endswith("launchers/lib/preflight.py") and check.nodes == 2 and check.ranks_per_node == 2
        )
        assert check.command[-4:] == ("--hosts", "n0,n0,n1,n1", "--device", "cpu")
    assert fake.steps[1].command[1:4] == (str(ROOT / "ibq/train_ar.py"), *arguments[:2])


@pytest.mark.parametrize(
    ("nodes", "settings", "usable"),
    [
        (12, [], 12),  # 768 over 96
        (11, [], 6),  # micro-batches of 8: 88, 80, 72, 64 and 56 ranks do not divide 768
        (7, [], 6),
        (5, [], 4),
        (12, ["data.streams=64"], 4),
        (1, [], 1),
    ],
)
def test_the_largest_number_of_nodes_that_divides(nodes, settings, usable):
    run = run_config.load_run("ibq/train_ar.py", ["--config", f"{ROOT}/yaml/xxl.yaml", *settings])
    assert job.usable_nodes(run, nodes, 8) == usable


def test_no_number_of_nodes_divides():
    run = run_config.load_run("ibq/train_ar.py", ["--config", f"{ROOT}/yaml/xxl.yaml"])
    with pytest.raises(UserError, match=r"^training\.micro_batch"):
        job.usable_nodes(run, 3, 5)


def test_config_and_script_are_those_of_the_copy(monkeypatch, tmp_path):
    project, copy = tmp_path / "project", tmp_path / "copy"
    for folder in (project, copy):
        for name in ("yaml/b.yaml", "ibq/train_ar.py"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("")
    (project / "mine.yaml").write_text("")
    monkeypatch.setattr(executor, "ROOT", copy)
    monkeypatch.setattr(executor, "PROJECT", project)
    command = ["ibq/train_ar.py", "--config", "yaml/b.yaml", "output=yaml/b.yaml", "--config", "mine.yaml"]
    assert executor.in_code(command) == [
        f"{copy}/ibq/train_ar.py",
        "--config",
        f"{copy}/yaml/b.yaml",
        "output=yaml/b.yaml",
        "--config",
        "mine.yaml",
    ]
    monkeypatch.setattr(executor, "PROJECT", copy)
    assert executor.in_code(command) == command, "no copy"


@pytest.mark.parametrize(
    ("state", "answer", "requeued"),
    [("RUNNING", 0, True), ("RUNNING", 1, False), ("COMPLETING", 0, False), ("CANCELLED", 0, False), ("", 0, False)],
)
def test_slurm_is_left_alone_when_it_ends_a_job(tmp_path, monkeypatch, state, answer, requeued):
    calls = tmp_path / "calls"
    scontrol = tmp_path / "scontrol"
    said = f"JobId=5 JobName=x JobState={state} Reason=None" if state else "slurm_load_jobs error"
    scontrol.write_text(
        f'#!/bin/bash\necho "$@" >> {calls}\n'
        f'case "$*" in requeue*) exit {answer} ;; *hostnames*) echo n1; echo n2 ;; *) echo "{said}" ;; esac\n'
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(allocation, "ENDED_AT_ONCE_S", 0.0)
    found = allocation.SlurmAllocation({"SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_GPUS_ON_NODE": "8"})
    assert found.nodes == ("n1", "n2") and found.ranks_per_node == 8
    assert found.requeue() is requeued
    assert ("requeue 5" in calls.read_text()) == (state == "RUNNING")


@pytest.mark.parametrize(
    ("environment", "tasks"),
    [
        ({}, 1),
        ({"SLURM_GPUS_ON_NODE": "8"}, 8),
        ({"SLURM_NTASKS_PER_NODE": "4", "SLURM_GPUS_ON_NODE": "8"}, 4),
        ({"SLURM_NTASKS": "6", "SLURM_TASKS_PER_NODE": "3(x2)"}, 3),
        ({"SLURM_NTASKS": "2", "SLURM_TASKS_PER_NODE": "2"}, 2),
    ],
)
def test_ranks_on_each_node(environment, tasks):
    assert allocation.tasks_per_node(environment) == tasks


def test_nodes_with_different_numbers_of_tasks():
    with pytest.raises(UserError, match="different numbers of tasks; give --ntasks-per-node"):
        allocation.tasks_per_node({"SLURM_NTASKS": "5", "SLURM_TASKS_PER_NODE": "2(x2),1"})


def test_heterogeneous_jobs_are_refused():
    """Slurm's variables name the first part's nodes: the others would wait idle to the end (seen with 22.05)."""
    own = {
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_JOB_NODELIST_HET_GROUP_1": "n2",
        "SLURM_HET_SIZE": "2",
    }
    with pytest.raises(UserError, match=r"hetjob.*--nodes"):
        allocation.SlurmAllocation(own)


# --- The scripts that come with the project ---

SCRIPTS = sorted(file for file in (ROOT / "slurm").glob("*.sh") if file.name not in ("job.sh", "setup.sh"))
SBATCH_LINES = (r"requeue", r"signal=USR2@\d+", r"open-mode=append", r"output=slurm/logs/.*%[jA].*\.log",
                r"nodes=\d+(-\d+)?", r"gpus-per-node=\d+", r"time=\d+:\d\d:\d\d", r"job-name=ibq-.+")  # fmt: skip


def lacks(text: str) -> list[str]:
    """The #SBATCH lines that a script does not have, or has after its first command, where Slurm does not read them."""
    head = re.split(r"^[^#\n]", text, maxsplit=1, flags=re.MULTILINE)[0]
    return [line for line in SBATCH_LINES if not re.search(rf"^#SBATCH --{line}$", head, re.MULTILINE)]


def unset_variables(text: str, site: str) -> set[str]:
    """Variables of the site that a script uses and that slurm/site.env does not set."""
    used = set(re.findall(r"\$\{?(IBQ_\w+)(?!\w|:-)", text))
    return used - set(re.findall(r"^(?:export )?(IBQ_\w+)=", site, re.MULTILINE))


def test_the_checks_of_scripts_find_something():
    good = SCRIPTS[0].read_text()
    assert lacks(good) == []
    assert lacks(good.replace("#SBATCH --requeue\n", "")) == ["requeue"]
    assert lacks(good.replace("#SBATCH --requeue\n", "") + "#SBATCH --requeue\n") == ["requeue"]
    assert unset_variables('x "$IBQ_A" "${IBQ_B:-}" "$IBQ_C/${IBQ_D}"', "IBQ_A=1\nexport IBQ_C=2") == {"IBQ_D"}


@pytest.fixture(scope="module")
def command_of(tmp_path_factory):
    """A function: the arguments of Python that a script ends with, by bash itself, in a job or outside of one."""
    folder = tmp_path_factory.mktemp("stub")
    for name in ("bash", "cat", "env"):
        (folder / name).symlink_to(shutil.which(name))
    (folder / "python").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (folder / "python").chmod(0o755)

    def run(script: Path, *arguments: str, in_job: bool) -> list[str]:
        own = {"PATH": str(folder), "SLURM_ARRAY_TASK_ID": "3"}
        own |= {"SLURM_JOB_ID": "1", "IBQ_CODE": "."} if in_job else {}
        done = subprocess.run(
            ["bash", str(script.relative_to(ROOT)), *arguments],
            cwd=ROOT,
            env=clean_environment(**own),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0 and done.stderr == "", done.stderr
        return done.stdout.splitlines()

    return run


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.stem)
def test_scripts_are_in_order(script, command_of, capsys):
    text = script.read_text()
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    assert lacks(text) == [] and text.startswith("#!/bin/bash\n#SBATCH")
    site = (ROOT / "slurm/site.env").read_text()
    assert unset_variables(text, site) <= {"IBQ_CODE"}  # that is job.sh's
    driver, *own = command_of(script, "a b", "x=1", in_job=True)[1:]
    assert driver == "./launchers/job.py" and own[0] == "--" and own[-2:] == ["a b", "x=1"], "quotes are kept"
    assert (ROOT / own[1]).is_file()
    outside = command_of(script, "a b", "x=1", in_job=False)
    if script.stem == "sweep":
        assert outside == ["launchers/sweep.py", "--executor", "slurm", "a b", "x=1"]
    else:
        assert outside[:4] == ["launchers/lib/submit.py", f"slurm/{script.name}", "a b", "x=1"] and outside[4:] == own
    if own[1].startswith("tools/"):
        options = [text for text in own if text.startswith("--") and text != "--"]
        tool = importlib.import_module(own[1].removesuffix(".py").replace("/", "."))
        with pytest.raises(SystemExit):
            tool.parse(["--help"])
        known = re.findall(r"--[\w-]+", capsys.readouterr().out)
        assert options and set(options) <= set(known)


def nodes_of(text: str) -> list[int]:
    """The smallest and the largest number of nodes."""
    (nodes,) = re.findall(r"^#SBATCH --nodes=([\d-]+)$", text, re.MULTILINE)
    return [int(number) for number in nodes.split("-")]


@pytest.mark.parametrize(
    "script", [file for file in SCRIPTS if "ibq/train_" in file.read_text()], ids=lambda file: file.stem
)
def test_batches_divide_over_the_nodes_of_scripts(script, command_of, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, _, _, program, *arguments = command_of(script, in_job=True)
    run = run_config.load_run(program, arguments)
    assert "$" not in f"{run.data.train}{run.data.validation}" and run.data.train
    text = script.read_text()
    assert "#SBATCH --gpus-per-node=8\n" in text
    for nodes in {nodes_of(text)[0], nodes_of(text)[-1]}:
        run_config.check_run(run, 8 * nodes)
    with pytest.raises(UserError, match=r"^(training|data)\."):
        run_config.check_run(run, 8 * 5)
    with pytest.raises(ConfigError, match="unknown key"):
        run_config.load_run(program, [*arguments, "training.batchsize=3"])
