"""Training, preemption, a dying node and a sweep on a real Slurm cluster of two nodes (`slurm_cluster.py`)."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, needs
from support.points import HANG_S, wait_for
from support.slurm_cluster import TEXT, SlurmCluster
from support.training import make_workplace, scalars

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.needs(*needs.SLURM),
]
STEPS, EVERY = 200, 20
# What the #SBATCH lines of the scripts ask for is more than two cores have.
SMALL = ["--gpus-per-node=1", "--cpus-per-gpu=1"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with SlurmCluster(tmp_path_factory.mktemp("cluster")) as started:
        yield started


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project, with data: jobs write logs and snapshots beside the code."""
    folder = tmp_path_factory.mktemp("project")
    for part in ("ibq", "launchers", "tools", "yaml", "slurm", "setup.cfg", "pyproject.toml"):
        source = ROOT / part
        ignore = shutil.ignore_patterns("__pycache__", "*.log", "code-*", "submitit", "pictures")
        (shutil.copytree(source, folder / part, ignore=ignore) if source.is_dir() else shutil.copy(source, folder))
    make_workplace(folder / "work")
    return folder


class Jobs:
    """Jobs of a test, which are cancelled at its end."""

    def __init__(self, cluster: SlurmCluster, project: Path):
        self.cluster, self.project, self.numbers = cluster, project, []

    def run(self, *command: str) -> str:
        """A command of the project, in the environment of the tests."""
        own = {"GLOO_SOCKET_IFNAME": "e0", "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1"}
        own["PATH"] = f"{Path(sys.executable).parent}:{self.cluster.environment['PATH']}"
        return self.cluster.run(*command, cwd=self.project, **own)

    def sbatch(self, *command: str) -> str:
        """The number of a job that `sbatch` has taken."""
        return self.note(self.run("sbatch", "--parsable", *SMALL, *command).strip())

    def note(self, number: str) -> str:
        """Remember a job."""
        self.numbers.append(number)
        return number

    def said(self, number: str) -> str:
        """The log of a job."""
        logs = [
            *self.project.glob(f"slurm/logs/*-{number}*.log"),
            *self.project.glob(f"slurm/logs/submitit/{number}_*.out"),
        ]
        return "\n".join(path.read_text() for path in logs)

    def complete(self, number: str, timeout: float = HANG_S) -> str:
        """Wait until a job has succeeded; its log."""
        state = self.cluster.wait_for_job(number, timeout=timeout)
        assert state == "COMPLETED", f"{state}: {self.said(number)}"
        return self.said(number)

    def cancel(self) -> None:
        """End what is left."""
        for number in self.numbers:
            subprocess.run(["scancel", number], env=self.cluster.environment, check=False, **TEXT)
        self.cluster.wait_until_idle()


@pytest.fixture
def jobs(cluster, project):
    cluster.wait_until_idle()
    found = Jobs(cluster, project)
    yield found
    found.cancel()


def settings(output: str, *overrides: str, ranks: int = 2) -> list[str]:
    """A command line over the tiny transformer; it takes the last --config."""
    argv = ["--config", "work/transformer.yaml", "data.train=work/data/codes", "data.validation=work/data/codes"]
    argv += [f"output=runs/{output}", f"training.max_steps={STEPS}", f"training.micro_batch={8 // ranks}"]
    return [*argv, "training.log_every=5", "training.validate_every=100", f"checkpoint.save_every={EVERY}", *overrides]


def losses(folder: Path) -> dict[int, float]:
    return scalars(folder)["loss/total"]


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


def wait_for_step(folder: Path, step: int) -> None:
    there = folder / "metrics.jsonl"
    wait_for(lambda: there.exists() and max(losses(folder), default=0) >= step, what=f"step {step} of {folder}")


@pytest.fixture(scope="module")
def undisturbed(cluster, project):
    """Folder and log of a run by the project's own script on both nodes, under FSDP2."""
    jobs = Jobs(cluster, project)
    number = jobs.sbatch("--nodes=2", "slurm/ar_b.sh", *settings("undisturbed", "engine.kind=fsdp"))
    try:
        return project / "runs" / "undisturbed", jobs.complete(number), number
    finally:
        jobs.cancel()


# --- (1) The project's scripts ---


def test_sbatch_trains_over_both_nodes(undisturbed, project):
    folder, said, number = undisturbed
    assert status(folder)["state"] == "finished" and status(folder)["step"] == STEPS
    assert "2 of 2 nodes (n1, n2), 1 ranks each, start 1" in said and "preflight: 2 ranks on 2 nodes" in said
    series = losses(folder)
    assert series[STEPS] < series[5] - 0.5
    logs = sorted(path.name for path in (folder / "logs" / number).glob("rank-*.log"))
    assert logs == ["rank-0.log", "rank-1.log"]
    [start] = [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]
    assert start["ranks"] == 2 and start["environment"]["SLURM_JOB_ID"] == number
    # The code is a copy.
    assert Path(start["code"]).parent == project / "runs" / "code"


def test_zero3_follows_fsdp(jobs, project, undisturbed):
    number = jobs.sbatch("--nodes=2", "slurm/ar_b.sh", *settings("zero", "engine={kind: zero, stage: 3}"))
    jobs.complete(number)
    ours, theirs = losses(project / "runs" / "zero"), losses(undisturbed[0])
    assert ours.keys() == theirs.keys()
    assert all(ours[step] == pytest.approx(theirs[step], rel=2e-3) for step in ours)


def test_torchrun_and_deepspeed_launchers(jobs, project, undisturbed):
    """Documented alternatives, by the job's own driver."""
    for launcher in ("torchrun", "deepspeed"):
        script = project / f"{launcher}.sh"
        script.write_text(
            "#!/bin/bash\n#SBATCH --nodes=2\n#SBATCH --output=slurm/logs/%x-%j.log\n"
            'source "${IBQ_CODE:-.}/slurm/job.sh"\n'
            f'exec python -u "$IBQ_CODE/launchers/job.py" --launcher {launcher} -- ibq/train_ar.py "$@"\n'
        )
        engine = "engine.kind=fsdp" if launcher == "torchrun" else "engine={kind: zero, stage: 2}"
        number = jobs.sbatch(str(script), *settings(launcher, engine, "training.max_steps=20"))
        jobs.complete(number)
        ours, theirs = losses(project / "runs" / launcher), losses(undisturbed[0])
        assert all(ours[step] == pytest.approx(theirs[step], rel=2e-2) for step in (5, 10))


# --- (2) submitit ---


def test_submitit(jobs, project, undisturbed):
    options = ["--nodes", "2", "--gpus-per-node", "1", "--cpus-per-gpu", "1", "--timeout-h", "1", "--partition", "all"]
    command = ["ibq/train_ar.py", *settings("submitit", "engine.kind=fsdp")]
    said = jobs.run(sys.executable, "launchers/slurm.py", *options, "--", *command)
    number = jobs.note(said.split("submitted as job ")[1].split(";")[0])
    jobs.complete(number)
    assert losses(project / "runs" / "submitit") == losses(undisturbed[0])


def test_submission_finds_mistakes(jobs, project):
    for more, words in (
        (["--partition", "nowhere"], ["no partition 'nowhere'", "all"]),
        (["--nodes", "0"], ["--nodes"]),
    ):
        command = [
            sys.executable,
            "launchers/slurm.py",
            "--gpus-per-node=1",
            *more,
            "--",
            "ibq/train_ar.py",
            *settings("mistake"),
        ]
        with pytest.raises(RuntimeError) as error:
            jobs.run(*command)
        assert "gave 2" in str(error.value) and all(word in str(error.value) for word in words)
    with pytest.raises(RuntimeError, match=r"gave 2.*dept: unknown key"):
        jobs.run("bash", "slurm/ar_b.sh", "model.dept=3")
    with pytest.raises(RuntimeError, match=r"gave 2.*Slurm would not take it.*partition"):
        jobs.run(
            "env", "SBATCH_PARTITION=nowhere", "bash", "slurm/ar_b.sh", *settings("mistake", "training.micro_batch=1")
        )
    assert not (project / "runs" / "mistake").exists()
    assert not jobs.cluster.run("squeue", "--noheader")


def test_queued_jobs_do_not_see_edits(jobs, project):
    own = ["env", "SBATCH_NODES=1", "SBATCH_HOLD=1", "SBATCH_GPUS_PER_NODE=1"]
    script = project / "slurm" / "tiny.sh"
    text = (project / "slurm" / "ar_b.sh").read_text()
    lines = [line for line in text.splitlines() if "per-node" not in line and "per-gpu" not in line]
    script.write_text("\n".join(line.replace("--nodes=4", "--nodes=1 --hold") for line in lines) + "\n")
    said = jobs.run(*own, "bash", "slurm/tiny.sh", *settings("snapshot", "training.max_steps=5", ranks=1))
    number = jobs.note(said.split("submitted as job ")[1].split(";")[0])
    entry = project / "ibq" / "train_ar.py"
    before = entry.read_text()
    try:
        entry.write_text("raise SystemExit(7)\n")
        jobs.run("scontrol", "release", number)
        jobs.complete(number)
    finally:
        entry.write_text(before)
    assert status(project / "runs" / "snapshot")["state"] == "finished"


# --- (3) Preemption ---


@pytest.mark.parametrize("how", ["signal", "requeue"])
def test_preempted_jobs_go_on(jobs, project, undisturbed, how):
    folder = project / "runs" / how
    number = jobs.sbatch(
        "--nodes=2", "slurm/ar_b.sh", *settings(how, "engine.kind=fsdp", "checkpoint.save_every=100000")
    )
    wait_for_step(folder, 50)
    if how == "signal":  # as at the time limit; and once more while it saves
        jobs.run("scancel", "--signal=USR2", number)
        jobs.run("scancel", "--signal=USR2", number)
    else:
        jobs.run("scontrol", "requeue", number)
    said = jobs.complete(number)
    assert jobs.cluster.job(number)["Restarts"] == "1"
    assert said.count("ended with exit code") == 1 and "start 2" in said
    assert losses(folder) == losses(undisturbed[0])
    rows = [json.loads(line) for line in (folder / "logs" / number / "attempts.jsonl").read_text().splitlines()]
    assert [row["code"] for row in rows] == [128 + (signal.SIGUSR2 if how == "signal" else signal.SIGTERM), 0]


def test_cancelled_jobs_stay_cancelled(jobs, project):
    number = jobs.sbatch("--nodes=2", "slurm/ar_b.sh", *settings("cancelled", "engine.kind=fsdp"))
    wait_for_step(project / "runs" / "cancelled", 10)
    jobs.run("scancel", number)
    assert jobs.cluster.wait_for_job(number) == "CANCELLED"
    jobs.cluster.wait_until_idle()  # nothing of it is left that could requeue it
    assert jobs.cluster.job(number)["JobState"] == "CANCELLED"
    assert status(project / "runs" / "cancelled")["state"] == "stopped"


def test_killed_processes_cost_a_start_each(jobs, project, undisturbed):
    """SIGKILL of one rank, as for want of memory, and then of srun: the others end, the job goes on from the queue."""
    folder = project / "runs" / "killed"
    number = jobs.sbatch("--nodes=2", "slurm/ar_b.sh", *settings("killed", "engine.kind=fsdp"))
    for step, variable, word in [(50, "SLURM_PROCID=1", "train_ar.py"), (120, "", "srun")]:
        wait_for_step(folder, step)
        for pid in processes_of_job(number, variable, word):
            os.kill(pid, signal.SIGKILL)
    said = jobs.complete(number)
    assert jobs.cluster.job(number)["Restarts"] == "2" and "start 3" in said
    assert "rank 1" in said and "has died" in said
    assert losses(folder) == losses(undisturbed[0])


def processes_of_job(number: str, variable: str, word: str) -> list[int]:
    """Processes of a job with a line in their environment and a word in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            environment = (path / "environ").read_bytes().decode(errors="replace").split("\0")
            words = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
            named = any(Path(part).name == word for part in words[:4])
            if f"SLURM_JOB_ID={number}" in environment and (not variable or variable in environment) and named:
                found.append(int(path.name))
    assert found, (number, variable, word)
    return found


# --- (4) A node dies ---


def test_a_node_dies(jobs, project, undisturbed):
    folder = project / "runs" / "node"
    number = jobs.sbatch("--nodes=1-2", "slurm/ar_b.sh", *settings("node", "engine.kind=fsdp"))
    wait_for_step(folder, 50)
    jobs.cluster.kill_node("n2")
    try:
        said = jobs.complete(number)
    finally:
        jobs.cluster.start_node("n2")
    assert "2 of 2 nodes (n1, n2)" in said and "1 of 1 nodes (n1)" in said
    assert "host n2" in said and "has died" in said
    assert status(folder)["state"] == "finished"
    ours, theirs = losses(folder), losses(undisturbed[0])
    assert ours.keys() == theirs.keys()  # one rank with twice the accumulation: the same batch, other roundings
    assert all(ours[step] == pytest.approx(theirs[step], rel=1e-3) for step in ours)
    assert any(ours[step] != theirs[step] for step in ours)


# --- (5) A sweep ---


def test_a_sweep_as_an_array(jobs, project):
    sweep = project / "work" / "sweep.yaml"
    sweep.write_text(
        "name: array\nscript: ibq/train_ar.py\nbase: work/transformer.yaml\nevaluation: null\noutput: runs/array\n"
        "overrides: [data.train=work/data/codes, data.validation=work/data/codes, training.max_steps=200,\n"
        "  training.validate_every=100, training.log_every=20, checkpoint.save_every=50]\n"
        "grid: {optimizer.learning_rate: [1e-3, 1e-2, 3e-2]}\n"
    )
    command = [
        sys.executable,
        "launchers/sweep.py",
        "--config",
        str(sweep),
        "--executor",
        "slurm",
        "--max-parallel",
        "2",
    ]
    own = {"SBATCH_GPUS_PER_NODE": "1", "SBATCH_CPUS_PER_GPU": "1", "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1"}
    own["PATH"] = f"{Path(sys.executable).parent}:{jobs.cluster.environment['PATH']}"
    environment = jobs.cluster.environment | own
    watch = subprocess.Popen(command, cwd=project, env=environment, **TEXT)
    try:
        wait_for_step(project / "runs" / "array" / "learning_rate=1e-3", 20)
        array = jobs.note(jobs.run("squeue", "--noheader", "--format=%F").split()[0])
        jobs.run("scancel", "--signal=KILL", "--batch", f"{array}_0")
        said, _ = watch.communicate(timeout=HANG_S)
    finally:
        watch.kill()
    assert watch.returncode == 0, said
    assert f"its job {array}_0 has ended" in said and "once more" in said and "3 of 3 runs done" in said
    results = json.loads((project / "runs" / "array" / "results.json").read_text())
    assert len(results["runs"]) == 3 and not results["missing"]
    again = subprocess.run(command, cwd=project, env=environment, timeout=HANG_S, **TEXT)
    assert again.returncode == 0 and "submitted" not in again.stdout
