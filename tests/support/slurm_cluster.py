"""A real Slurm cluster of two nodes on this machine: two slurmd, each in network and mount namespaces of its own.

    with SlurmCluster(folder) as cluster:
        cluster.run("sbatch", "job.sh")

What it needs is needs.SLURM. Nothing outside `folder` is changed but a bridge and two
network namespaces, which `stop` removes, with every process that was started; a lock keeps clusters apart that use the
same addresses.
"""

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import time
from pathlib import Path

from support.points import HANG_S

NODES = ("n1", "n2")
NETWORK = "10.77.0"
BRIDGE = "ibqslurm"
TEXT = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
CONFIG = """\
ClusterName=ibq
SlurmctldHost={host}({network}.1)
SlurmctldPort=6917
SlurmdPort=6918
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=6
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdParameters=config_overrides
MailProg=/bin/true
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdTimeout=12
SlurmctldTimeout=60
KillWait=20
MinJobAge=3600
InactiveLimit=0
SchedulerParameters=sched_interval=2,bf_interval=2,requeue_setup_env_fail
JobRequeue=1
GresTypes=gpu
{nodes}
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


class SlurmCluster:
    """Starts the daemons on entry and stops everything on exit."""

    def __init__(self, folder: Path, cpus: int = 2):
        self.folder, self.cpus = folder, cpus
        self._lock = None
        self._processes: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "SlurmCluster":
        self._lock = open("/var/lock/ibq-slurm-cluster.lock", "w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    @property
    def environment(self) -> dict[str, str]:
        """For commands of this cluster."""
        own = {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
        return {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")} | own

    def run(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """A command's output; RuntimeError if it fails."""
        done = subprocess.run(command, cwd=cwd, env=self.environment | environment, timeout=HANG_S, **TEXT)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} gave {done.returncode}: {done.stdout}")
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says of a job, or of one task of an array (`7_0`)."""
        said = self.run("scontrol", "--oneliner", "show", "job", number)
        return dict(re.findall(r"(\w+(?:/\w+)?)=(\S*)", said.splitlines()[0]))

    def wait_for_job(self, number: str, states=("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"), timeout=HANG_S) -> str:
        """The state that a job has come to."""
        deadline = time.monotonic() + timeout
        while (state := self.job(number)["JobState"]) not in states:
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {number} is {state} after {timeout:g} s: {self.job(number)}")
            time.sleep(0.3)
        return state

    def kill_node(self, node: str) -> None:
        """As if its power were cut: slurmd, the steps and their processes."""
        inode = os.stat(f"/run/netns/{self._namespace(node)}").st_ino
        pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and _network(path) == inode]
        assert pids, node
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._processes.pop(f"slurmd-{node}").wait()

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        hosts = self.folder / "hosts"
        script = f"mount --bind {hosts} /etc/hosts && hostname {node} && exec slurmd -D -N {node}"
        enter = ["nsenter", f"--net=/run/netns/{self._namespace(node)}", "unshare", "--uts", "--mount"]
        self._spawn(f"slurmd-{node}", *enter, "sh", "-c", script)

    def wait_until_idle(self, timeout: float = HANG_S) -> None:
        """Until both nodes can take jobs."""
        deadline = time.monotonic() + timeout
        while True:
            done = subprocess.run(["sinfo", "-hN", "-o", "%N %T"], env=self.environment, **TEXT)
            if sorted(done.stdout.split("\n")) == ["", "n1 idle", "n2 idle"]:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"the nodes do not come up: {done.stdout}")
            time.sleep(0.3)

    def _start(self) -> None:
        self._remove_network()
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        self._configure()
        self._start_munge()
        _ip("link", "add", BRIDGE, "type", "bridge")
        _ip("addr", "add", f"{NETWORK}.1/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")
        self._spawn("slurmctld", "slurmctld", "-D", "-c")
        for number, node in enumerate(NODES, start=11):
            self._connect(node, f"{NETWORK}.{number}")
            self.start_node(node)
        self.wait_until_idle()

    def _configure(self) -> None:
        host = os.uname().nodename
        lines = [
            f"NodeName={node} NodeAddr={NETWORK}.{number} CPUs={self.cpus} RealMemory=8000 Gres=gpu:2 State=UNKNOWN"
            for number, node in enumerate(NODES, start=11)
        ]
        text = CONFIG.format(host=host, network=NETWORK, folder=self.folder, nodes="\n".join(lines))
        (self.folder / "slurm.conf").write_text(text)
        # GPUs that are none: the project's scripts ask for some, and the processes run on the CPU.
        (self.folder / "gres.conf").write_text("Name=gpu Count=2 File=/dev/zero,/dev/null\n")
        names = [f"{NETWORK}.{number} {node}" for number, node in enumerate(NODES, start=11)]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", f"{NETWORK}.1 {host}", *names, ""]))

    def _start_munge(self) -> None:
        """A munged of its own, with its own key, whose files only root can read."""
        key, socket = self.folder / "munge.key", self.folder / "munge.socket"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = [f"--{name}-file={self.folder}/munged.{name}" for name in ("pid", "log", "seed")]
        # --force: it minds that others may write to folders above the socket.
        self._spawn("munged", "munged", "-F", "--force", f"--key-file={key}", f"--socket={socket}", *files)
        deadline = time.monotonic() + HANG_S
        while not socket.exists():
            if time.monotonic() > deadline:
                raise TimeoutError((self.folder / "munged.out").read_text())
            time.sleep(0.05)

    def _connect(self, node: str, address: str) -> None:
        inside = ("-n", self._namespace(node))
        _ip("netns", "add", self._namespace(node))
        _ip("link", "add", f"{BRIDGE[:6]}-{node}", "type", "veth", "peer", "name", "e0", "netns", self._namespace(node))
        _ip("link", "set", f"{BRIDGE[:6]}-{node}", "master", BRIDGE, "up")
        _ip(*inside, "addr", "add", f"{address}/24", "dev", "e0")
        _ip(*inside, "link", "set", "e0", "up")
        _ip(*inside, "link", "set", "lo", "up")

    def _namespace(self, node: str) -> str:
        return f"{BRIDGE}-{node}"

    def _spawn(self, name: str, *command: str) -> None:
        with open(self.folder / f"{name}.out", "ab") as out:
            self._processes[name] = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )

    def stop(self) -> None:
        """End every process of the cluster and remove its network; also of one that has not come up."""
        if self._lock is None:
            return
        if "slurmctld" in self._processes:
            subprocess.run(["scancel", "--state=PENDING", "--user=root"], env=self.environment, timeout=30, check=False)
        for node in NODES:
            if f"slurmd-{node}" in self._processes:
                self.kill_node(node)
        for process in self._processes.values():
            process.kill()
            process.wait()
        self._remove_network()
        self._lock.close()
        self._lock = None

    def _remove_network(self) -> None:
        for node in NODES:
            _ip("netns", "del", self._namespace(node), check=False)
            _ip("link", "del", f"{BRIDGE[:6]}-{node}", check=False)
        _ip("link", "del", BRIDGE, check=False)


def _network(process: Path) -> int:
    try:
        return os.stat(process / "ns" / "net").st_ino
    except OSError:  # it has ended
        return 0


def _ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(
        ["ip", *arguments], check=check, stdout=subprocess.DEVNULL, stderr=None if check else subprocess.DEVNULL
    )
