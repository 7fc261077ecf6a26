"""Submit a run to Slurm by submitit, from the command line or from Python.

python launchers/slurm.py --nodes 12 --gpus-per-node 8 --timeout-h 24 -- ibq/train_ar.py --config yaml/xxl.yaml
python launchers/slurm.py --nodes 6-12 --partition gpu --dry-run -- ibq/train_ar.py --config yaml/xxl.yaml
python launchers/slurm.py --executor local --gpus-per-node 2 -- ibq/train_ar.py --config yaml/b.yaml

The code is copied at submission. In the job, as with `sbatch slurm/NAME.sh`, every GPU gets a task of srun; before the
time limit, on preemption and after failures that leave a newer checkpoint the job requeues itself. slurm/site.env holds
what is particular to the cluster. With --executor local the ranks are processes of this machine.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ibq.config import UserError, exit_on_user_error
from launchers.job import Job, SubmittedJob, job_of, parse_job, usable_nodes
from launchers.lib import ROOT
from launchers.lib.run_config import is_training_script, load_run
from launchers.lib.snapshot import take_snapshot
from tools.lib.options import add_settings, settings_of


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What is asked of Slurm."""

    # N, or MIN-MAX: the job goes on with fewer after a node has died
    nodes: str = field(default="1", metadata={"metavar": "N", "help": "N or MIN-MAX (default: 1)"})
    # Each gets a rank; 0: one rank on the CPUs of each node.
    gpus_per_node: int = field(default=8, metadata={"metavar": "N", "help": "0: a CPU rank on each node (default: 8)"})
    timeout_h: float = field(default=24.0, metadata={"metavar": "H", "help": "time limit in hours (default: 24)"})
    cpus_per_gpu: int | None = field(default=None, metadata={"metavar": "N", "help": "cores of each rank"})
    partition: str | None = field(default=None, metadata={"metavar": "NAME"})
    account: str | None = field(default=None, metadata={"metavar": "NAME"})
    qos: str | None = field(default=None, metadata={"metavar": "NAME"})
    name: str | None = field(default=None, metadata={"metavar": "NAME", "help": "of the job (default: of the config)"})
    signal_s: int = field(
        default=300, metadata={"metavar": "S", "help": "time to save in before the limit (default: 300)"}
    )
    more: tuple[str, ...] = field(
        default=(), metadata={"option": "--sbatch", "metavar": "NAME=VALUE", "help": "another option of sbatch"}
    )

    def __post_init__(self):
        if not re.fullmatch(r"[1-9]\d*(-[1-9]\d*)?", self.nodes):
            raise UserError(f"--nodes: {self.nodes!r} is no number of nodes; write 12, or 6-12 for at least 6")
        if int(self.nodes.partition("-")[0]) > self.largest:
            raise UserError(f"--nodes: {self.nodes!r} begins with the larger number; write the smaller one first")
        if self.gpus_per_node < 0 or self.timeout_h <= 0 or self.signal_s < 1:
            raise UserError("--gpus-per-node, --timeout-h and --signal-s must be positive")
        if self.signal_s >= 3600 * self.timeout_h:  # it would be told to stop at its start, and requeued for ever
            raise UserError(f"--signal-s: {self.signal_s} s are not left in {self.timeout_h:g} h; raise --timeout-h")
        for option in self.more:
            if "=" not in option:
                raise UserError(f"--sbatch: {option!r} is no option; write NAME=VALUE, such as constraint=h100")

    @property
    def largest(self) -> int:
        """Nodes at most."""
        return int(self.nodes.rpartition("-")[2])

    def parameters(self, name: str, code: Path) -> dict[str, Any]:
        """For submitit's Slurm executor."""
        own = {"job_name": f"ibq-{self.name or name}", "time": max(round(60 * self.timeout_h), 1), "qos": self.qos}
        own |= {"partition": self.partition, "account": self.account, "signal_delay_s": self.signal_s}
        own |= {"gpus_per_node": self.gpus_per_node or None, "stderr_to_stdout": True, "use_srun": False}
        more = {"nodes": self.nodes, "requeue": True}
        if self.gpus_per_node and self.cpus_per_gpu:
            more["cpus-per-gpu"] = self.cpus_per_gpu
        if not self.gpus_per_node:
            own |= {"ntasks_per_node": 1, "cpus_per_task": self.cpus_per_gpu}
        more |= dict(option.split("=", 1) for option in self.more)
        return {key: value for key, value in own.items() if value is not None} | {
            "additional_parameters": more,
            "setup": [f"export IBQ_WARNING_S={self.signal_s}", *setup(code)],
        }


def setup(code: Path) -> list[str]:
    """What the batch script does before Python starts."""
    lines = [f"cd {shlex.quote(str(ROOT))} || exit 2", f"export IBQ_CODE={shlex.quote(str(code))}"]
    lines += ['source "$IBQ_CODE/slurm/setup.sh"', 'export PYTHONPATH="$IBQ_CODE"']
    # `python -m` looks for modules in the current folder first; the job goes back to the project's.
    return [*lines, 'cd "$IBQ_CODE" || exit 2']


def submit(job: Job, resources: Resources, executor: Literal["slurm", "local"] = "slurm", folder: str = "slurm/logs"):
    """Check a job and submit it with a copy of the code; submitit's job (its `job_id`, `state`, `stdout()`).

    Errors: UserError for a config that does not load, a batch that does not divide, a partition that is not there.
    """
    import submitit

    check(job, resources, executor)
    code = take_snapshot()
    if executor == "local":
        local = submitit.LocalExecutor(folder=f"{folder}/submitit", python=local_python(code))
        local.update_parameters(timeout_min=60 * resources.timeout_h, signal_delay_s=resources.signal_s)
        return local.submit(job)
    slurm = submitit.SlurmExecutor(folder=f"{folder}/submitit", python="python")
    slurm.update_parameters(**resources.parameters(job_name(job), code))
    try:
        return slurm.submit(SubmittedJob(job))
    except submitit.core.utils.FailedJobError as error:  # in sbatch's own words
        said = [line for line in str(error).splitlines() if line.startswith("sbatch: error: ")] or [str(error)]
        raise UserError(f"Slurm does not take the job: {said[0].removeprefix('sbatch: error: ')}; see sinfo") from error


def local_python(code: Path) -> str:
    """Python behind the lines of `setup`, for submitit's local executor.

    Its own `setup` is read by /bin/sh, which need not be bash, and it hides the GPUs that it has not been told of.
    """
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = "unset CUDA_VISIBLE_DEVICES" if gpus is None else f"export CUDA_VISIBLE_DEVICES={shlex.quote(gpus)}"
    lines = [*setup(code), visible, f'exec {shlex.quote(sys.executable)} "$@"']
    return shlex.join(["bash", "-c", "\n".join(lines), "bash"])


def script_text(job: Job, resources: Resources) -> str:
    """The batch script that `submit` would hand to sbatch; needs no Slurm."""
    from submitit.slurm import slurm

    command = "python -u -m submitit.core._submit slurm/logs/submitit"
    parameters = resources.parameters(job_name(job), ROOT / "runs" / "code" / "HASH")
    return slurm._make_sbatch_string(command=command, folder=Path("slurm/logs/submitit"), **parameters)


def job_name(job: Job) -> str:
    """From the config's file name, or the script's."""
    configs = [after for text, after in zip(job.arguments, job.arguments[1:], strict=False) if text == "--config"]
    return Path(configs[-1] if configs else job.script).stem


def check(job: Job, resources: Resources, executor: str = "slurm") -> None:
    """UserError for what would fail in the job, as far as it can be known before."""
    if is_training_script(job.script):
        run = load_run(job.script, job.arguments)
        ranks_per_node = job.ranks or max(resources.gpus_per_node, 1)
        usable_nodes(run, resources.largest if executor == "slurm" else 1, ranks_per_node)
        warn_by(run.checkpoint.signal)
    site = ROOT / "slurm" / "site.env"
    done = subprocess.run(
        ["bash", "-c", "source slurm/setup.sh"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise UserError(said[-1].removeprefix("error: ") if said else f"{site}: cannot be read by bash")
    if executor == "slurm" and resources.partition:
        check_partition(resources.partition)


def warn_by(name: str) -> None:
    """Have submitit ask for the signal at which the ranks save; UserError where the user's variable says another."""
    given = os.environ.get("SUBMITIT_PREEMPT_SIGNAL", name)
    if name == "none":
        raise UserError("checkpoint.signal: none leaves Slurm's warning before the time limit unheard; set USR2")
    if given != name:
        raise UserError(
            f"SUBMITIT_PREEMPT_SIGNAL: {given} would end the ranks, which save at {name}; unset it, or set "
            f"checkpoint.signal={given}"
        )
    from submitit.core.job_environment import JobEnvironment

    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = JobEnvironment.USR_SIG = name  # here, and for submitit in the job


def check_partition(names: str) -> None:
    """UserError unless Slurm has such a partition, hidden or not, or all of several with commas between them."""
    if shutil.which("sinfo") is None:
        raise UserError("sinfo: there is no Slurm here; use --executor local, or see the script by --dry-run")
    done = subprocess.run(["sinfo", "--all", "--noheader", "--format=%R"], capture_output=True, text=True, check=False)
    known = sorted(set(done.stdout.split()))
    for name in names.split(","):
        if name not in known:
            raise UserError(f"--partition: Slurm has no partition {name!r}; choose of {', '.join(known) or 'none'}")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `Resources`, and of this command."""
    add_settings(parser, Resources)
    add = parser.add_argument
    add("--executor", choices=["slurm", "local"], default="slurm", help="(default: slurm)")
    add("--dry-run", action="store_true", help="check everything and print the batch script; nothing is submitted")


def main(argv: Sequence[str] | None = None) -> int:
    """Submit as the command line says."""
    arguments: argparse.Namespace = parse_job(argv, __doc__, add_options)
    resources = settings_of(Resources, arguments)
    local = arguments.executor == "local"
    job = job_of(arguments, ranks=max(arguments.gpus_per_node, 1) if local else None)
    if arguments.dry_run:
        check(job, resources, "local" if shutil.which("sinfo") is None else arguments.executor)
        print(script_text(job, resources), end="")
        return 0
    if not local and shutil.which("sbatch") is None:
        raise UserError("sbatch: there is no Slurm on this machine; use --executor local")
    submitted = submit(job, resources, arguments.executor)
    print(f"submitted as job {submitted.job_id}; its log: {submitted.paths.stdout}", flush=True)
    return wait_locally(submitted) if local else 0


def wait_locally(submitted: Any) -> int:
    """Wait for a job of the local executor; its exit code, or that of an interrupted one."""
    from submitit.core.utils import FailedJobError, UncompletedJobError

    try:
        return int(submitted.result() or 0)
    except (FailedJobError, UncompletedJobError):
        print(f"the job has failed; see {submitted.paths.stderr} and {submitted.paths.stdout}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        submitted.cancel()
        return 130


if __name__ == "__main__":
    exit_on_user_error(main)
