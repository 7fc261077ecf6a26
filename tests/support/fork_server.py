"""The parent of the scripts that tests start: it has imported what takes seconds, once, and forks for each of them.

    python tests/support/fork_server.py CONTROL ROOT [MODULE ...]

CONTROL is the number of an inherited socket; see support/processes.py, its only user. Without modules: HEAVY. The
parent has computed nothing and has one thread, so that a child is as a new process that has just imported the same
modules.
"""

import contextlib
import functools
import gc
import importlib
import json
import os
import random
import runpy
import selectors
import signal
import socket
import sys
import types
from collections.abc import Sequence
from pathlib import Path

# What runs of both stages import, first or last: torch._dynamo with the first step of an optimizer.
HEAVY = ("torch", "torch._dynamo", "torch.distributed.fsdp", "torch.utils.tensorboard", "torchvision.transforms.v2")
HEAVY += (
    "scipy.linalg",
    "webdataset",
    "ibq.train_ar",
    "ibq.train_tokenizer",
    "ibq.evaluation.generation",
    "torch._inductor.compile_fx",
)


def preload(root: str, modules: Sequence[str]) -> None:
    """Import the modules, those of the project from `root`, and leave sys.path as it was."""
    sys.path.insert(0, root)
    for name in modules or HEAVY:
        importlib.import_module(name)
    sys.path.remove(root)
    if not modules:
        remember_cpu_info()
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, "an import has started threads, which a fork would lose"
    gc.collect()
    gc.freeze()  # children share these pages as long as nothing counts references in them


def remember_cpu_info() -> None:
    """Ask once: each of DeepSpeed's CPU optimizers would start a process for it, which takes more than a second."""
    with contextlib.suppress(ImportError):
        cpuinfo = importlib.import_module("cpuinfo")
        cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
        cpuinfo.get_cpu_info()


def serve(control: socket.socket) -> dict:
    """Fork for every request; returns, with the request, in the children only."""
    selector = selectors.DefaultSelector()
    selector.register(control, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is control:
                if (request := fork(control, selector)) is not None:
                    return request
            else:
                report_end(selector, key)


def fork(control: socket.socket, selector: selectors.BaseSelector) -> dict | None:
    """Read a request and fork for it: its content in the child. The parent ends with the tests."""
    data, (*fds,), _, _ = socket.recv_fds(control, 1 << 20, 4)
    if not data:
        sys.exit()
    status = socket.socket(fileno=fds.pop(0))
    if (pid := os.fork()) == 0:
        for key in selector.get_map().values():
            if key.fileobj is not control:
                os.close(key.fileobj)
                key.data[1].close()
        for used in (status, control, selector):
            used.close()
        return json.loads(data) | {"fds": fds}
    for fd in fds:
        os.close(fd)
    status.send(str(pid).encode())
    selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, status))
    return None


def report_end(selector: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
    """Tell how a child has ended."""
    pid, status = key.data
    selector.unregister(key.fileobj)
    os.close(key.fileobj)
    _, how = os.waitpid(pid, 0)
    with contextlib.suppress(BrokenPipeError):
        status.send(str(os.waitstatus_to_exitcode(how)).encode())
    status.close()


def become(request: dict, path: list[str]) -> tuple[str, str]:
    """Take over what a new process would start with; (source, name of its file) of the script."""
    if request["new_session"]:
        os.setsid()
    for number, fd in enumerate(request["fds"]):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    random.seed()
    sys.modules["numpy"].random.seed()
    if "TEST_POINTS" in os.environ:
        runpy.run_path(str(Path(__file__).with_name("standing") / "sitecustomize.py"))
    first, *arguments = request["command"]
    added = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if first == "-c":
        source, *arguments = arguments
        sys.argv, sys.path = ["-c", *arguments], ["", *added, *path]
        return source, "<string>"
    sys.argv, sys.path = [first, *arguments], [str(Path(first).resolve().parent), *added, *path]
    return Path(first).read_text(), first


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: it is for the tests; they end this by its socket
    path = sys.path[1:]
    preload(sys.argv[2], sys.argv[3:])
    control = socket.socket(fileno=int(sys.argv[1]))
    control.send(b"ready")
    request = serve(control)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGQUIT, signal.SIGHUP):  # which the background and nohup have the tests ignore
        signal.signal(number, signal.SIG_DFL)
    source, name = become(request, path)
    main = types.ModuleType("__main__")
    if name != "<string>":
        main.__file__ = name
    sys.modules["__main__"] = main
    exec(compile(source, name, "exec"), main.__dict__)
