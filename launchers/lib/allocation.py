"""Where a job's ranks run: the nodes of a Slurm allocation, or this machine."""

import importlib.util
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ibq.config import UserError

ENDED_AT_ONCE_S = 60.0  # that Slurm has to end a job after it has been requeued


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command that runs as several ranks, or once on each node."""

    command: tuple[str, ...]  # the interpreter first
    nodes: int
    ranks_per_node: int
    logs: Path | None = None  # folder for a file of each rank; None: the job's own output


class Allocation(Protocol):
    """Nodes on which steps can be run."""

    name: str  # of the job, in the names of files
    nodes: tuple[str, ...]
    ranks_per_node: int
    restart: int  # how often the job has been requeued

    def start(self, step: Step) -> list[subprocess.Popen]:
        """Start a step; the processes to wait for, whose highest exit code is the step's."""

    def requeue(self) -> bool:
        """Have the job started again from the queue; False where that is not this program's to do."""


class SlurmAllocation:
    """The nodes of the Slurm job that this process is the batch script of; each rank is a task of `srun`.

    UserError for a heterogeneous job.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ):
        if int(environment.get("SLURM_HET_SIZE", "1")) > 1:  # of which the other variables name the first part alone
            raise UserError("a heterogeneous job (`:`, #SBATCH hetjob): a run takes equal nodes; ask by --nodes")
        self._environment = environment
        self.job = environment["SLURM_JOB_ID"]
        array = environment.get("SLURM_ARRAY_JOB_ID")
        self.name = f"{array}_{environment['SLURM_ARRAY_TASK_ID']}" if array else self.job
        self.nodes = tuple(_said("scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]).split())
        self.ranks_per_node = tasks_per_node(environment)
        self.restart = int(environment.get("SLURM_RESTART_COUNT", "0"))

    def start(self, step: Step) -> list[subprocess.Popen]:
        """See `Allocation`. The tasks get their signals from Slurm itself: nothing stands in between."""
        srun = srun_prefix(self, step.nodes, step.ranks_per_node)
        if step.logs is not None:
            step.logs.mkdir(parents=True, exist_ok=True)
            srun += [f"--output={step.logs}/rank-%t.log", "--open-mode=append"]
        environment = {**self._environment, "MASTER_ADDR": self.nodes[0]}
        return [subprocess.Popen([*srun, *step.command], env=environment)]

    def state(self) -> str:
        """RUNNING, or what else has become of the job."""
        found = re.search(r"JobState=(\w+)", _said("scontrol", "--oneliner", "show", "job", self.job))
        return found[1] if found else ""

    def requeue(self) -> bool:
        """See `Allocation`. A job that Slurm is ending, for a requeue or for good, is left to it."""
        if self.state() != "RUNNING":
            return False
        done = subprocess.run(["scontrol", "requeue", self.job], check=False)
        if done.returncode:
            return False
        time.sleep(ENDED_AT_ONCE_S)  # Slurm ends this process meanwhile
        return True


class LocalAllocation:
    """This machine, without a scheduler; each rank is a process."""

    def __init__(self, ranks: int):
        self.name = f"local-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        self.nodes = ("localhost",)
        self.ranks_per_node = ranks
        self.restart = 0

    def start(self, step: Step) -> list[subprocess.Popen]:
        """See `Allocation`."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = []
        for rank in range(step.ranks_per_node):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(step.ranks_per_node)}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            out = None
            if step.logs is not None:
                step.logs.mkdir(parents=True, exist_ok=True)
                out = open(step.logs / f"rank-{rank}.log", "ab")  # noqa: SIM115 (the process writes to it)
            environment = {**os.environ, **(own if step.ranks_per_node > 1 else {})}
            processes.append(
                subprocess.Popen(step.command, env=environment, stdout=out, stderr=out, start_new_session=True)
            )
            if out is not None:
                out.close()
        return processes

    def requeue(self) -> bool:
        """See `Allocation`: there is no queue; the same command goes on."""
        return False


def current_allocation(ranks: int | None) -> Allocation:
    """The Slurm allocation that this process runs in, or else this machine with so many ranks."""
    if "SLURM_JOB_ID" in os.environ and "SLURM_STEP_NUM_TASKS" not in os.environ:
        return SlurmAllocation()
    return LocalAllocation(ranks or 1)


def tasks_per_node(environment: Mapping[str, str]) -> int:
    """Ranks on each node: `--ntasks-per-node`, or as Slurm has laid `--ntasks`, or one for each GPU, or one.

    UserError where nodes differ. The project's scripts say nothing of tasks: Slurm holds on to a number of tasks, and
    with it to the number of nodes, when it requeues a job that has lost a node (seen with 22.05).
    """
    if given := environment.get("SLURM_NTASKS_PER_NODE"):
        return int(given)
    if "SLURM_NTASKS" not in environment:
        return int(environment.get("SLURM_GPUS_ON_NODE", "1"))
    counts = {int(text) for text in re.findall(r"(\d+)(?:\(x\d+\))?", environment["SLURM_TASKS_PER_NODE"])}
    if len(counts) > 1:
        raise UserError("#SBATCH: the nodes have different numbers of tasks; give --ntasks-per-node, not --ntasks")
    return counts.pop()


def srun_prefix(allocation: SlurmAllocation, nodes: int | None = None, ranks_per_node: int | None = None) -> list[str]:
    """srun for a command that runs as so many ranks, by default one for each GPU of all nodes."""
    nodes, own = nodes or len(allocation.nodes), allocation.ranks_per_node
    ranks = ranks_per_node or own
    srun = ["srun", "--unbuffered", "--kill-on-bad-exit=1", "--wait=60"]
    srun += [f"--nodes={nodes}", f"--ntasks={nodes * ranks}", f"--ntasks-per-node={ranks}"]
    # Since Slurm 22.05 srun does not take the cores of a task from the job.
    cores = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_PER_GPU")
    return [*srun, f"--cpus-per-task={int(cores) * own // ranks}"] if cores else srun


def torchrun_command(allocation: Allocation, nodes: int, command: Sequence[str], save_s: float) -> tuple[str, ...]:
    """A command for one task on each node, which starts the node's ranks by torchrun.

    They have `save_s` seconds to save after a signal.
    """
    python, *rest = command
    port = _slurm_port() + 1 if "SLURM_JOB_ID" in os.environ else 29_500
    options = ["--nnodes", str(nodes), "--nproc-per-node", str(allocation.ranks_per_node), "--rdzv-backend", "c10d"]
    options += ["--rdzv-endpoint", f"{allocation.nodes[0]}:{port}", "--rdzv-id", allocation.name]
    # It passes on what it is told to, and kills ranks that still save after a while: both where this version knows how.
    own = {
        "--signals-to-handle": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2",
        "--shutdown-timeout": f"{save_s:.0f}",
    }
    known = torchrun_source()
    options += [word for option, value in own.items() if f'"{option}"' in known for word in (option, value)]
    return (python, "-m", "torch.distributed.run", *options, *rest)


def torchrun_source() -> str:
    """The text of torchrun, to see which options it has: to import PyTorch would take seconds."""
    package = importlib.util.find_spec("torch")
    try:
        return (Path(package.origin).parent / "distributed/run.py").read_text()
    except (OSError, AttributeError, TypeError):
        return ""


def deepspeed_command(allocation: Allocation, nodes: int, command: Sequence[str], hostfile: Path) -> tuple[str, ...]:
    """The same by the deepspeed launcher, without ssh, from a hostfile that is written here."""
    hostfile.parent.mkdir(parents=True, exist_ok=True)
    slots = allocation.ranks_per_node
    hostfile.write_text("".join(f"{node} slots={slots}\n" for node in allocation.nodes[:nodes]))
    python, *rest = command
    port = _slurm_port() + 2 if "SLURM_JOB_ID" in os.environ else 29_500
    launch = [str(Path(python).with_name("deepspeed")), "--hostfile", str(hostfile), "--no_ssh", "--node_rank"]
    before, after = shlex.join(launch), ["--master_addr", allocation.nodes[0], "--master_port", str(port), *rest]
    return ("bash", "-c", f'exec {before} "${{SLURM_NODEID:-0}}" {shlex.join(after)}')


def _said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        print(f"{shlex.join(command)}: {error}", file=sys.stderr)
        return ""


def _slurm_port() -> int:
    from ibq.meeting import slurm_port  # reads PyTorch, for which --help should not wait

    return slurm_port(os.environ)
