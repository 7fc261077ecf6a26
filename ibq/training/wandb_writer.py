"""Weights & Biases as a writer: beside the training, which it never stops or slows."""

import contextlib
import json
import os
import queue
import threading
import time
import uuid
from pathlib import Path

from torch import Tensor

import yaml
from ibq.files import write_text
from ibq.progress import say
from ibq.training.writers import Values, WandbConfig

FILES = ("wandb", "wandb.json")  # in a run's folder: W&B's own files; the run's id there, and what it has been told
AXIS = "step"
MOST_WAITING = 1_000  # rows and pictures
REACH_S, CLOSE_S = 15.0, 40.0  # for the server's first answer, and for what is left at the end


def has_key() -> bool:
    """Whether an API key is found, in the environment or in W&B's own files; whether it is right is for the server."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return bool(_wandb().login(prompt=False))
    except Exception:  # there is one, which could not be verified
        return True


def first_line(error: Exception) -> str:
    """What an error says, without what it goes on to say."""
    return str(error).partition("\n")[0]


def _wandb():
    """The package, which unless told otherwise prints nothing and does not report to its makers."""
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    return wandb


class WandbWriter:
    """Tells W&B of a run from a thread of its own, every time under the id that the run's folder keeps.

    A run that was killed comes again to steps that W&B knows, and W&B takes nothing back: rows up to the last step that
    it was told of are left out. Where the server does not answer at the start, it writes into the folder, as offline.
    """

    def __init__(self, folder: Path, config: WandbConfig, config_text: str):
        self._folder, self._config, self._config_text = folder, config, config_text
        self._notes = folder / FILES[1]
        told = json.loads(self._notes.read_text()) if self._notes.exists() else {}
        self._id, self._told = told.get("id") or uuid.uuid4().hex[:12], told.get("step", -1)
        self._rows: queue.Queue[tuple[int, Values] | None] = queue.Queue(MOST_WAITING)
        self._wandb = _wandb()  # here: a process that is forked during an import could wait for it for ever
        self._lost = False  # whether a row was
        self._thread = threading.Thread(target=self._work, args=(self._told,), name="wandb", daemon=True)
        self._thread.start()

    def write(self, step: int, values: Values) -> None:
        """Hand a row over; where W&B is so slow that too many wait, it is left out."""
        if step > self._told and self._thread.is_alive():
            try:
                self._rows.put_nowait((step, values))
            except queue.Full:
                if not self._lost:
                    self._warn(f"W&B takes rows too slowly; some from step {step} on will be missing there")
                self._lost = True

    def close(self) -> None:
        """Wait for what is left, for a while; then it stays in the run's folder."""
        until = time.monotonic() + CLOSE_S
        with contextlib.suppress(queue.Full):
            self._rows.put(None, timeout=CLOSE_S)
        self._thread.join(max(until - time.monotonic(), 0))
        if self._thread.is_alive():
            self._warn(f"W&B has not taken everything; `wandb sync {self._folder / FILES[0]}/*run-*` sends the rest")

    def _warn(self, problem: str) -> None:
        say(f"WARNING: {self._folder}: {problem}")

    # --- In the thread ---

    def _work(self, told: int) -> None:
        try:
            self._note(told)  # the id first: the next start must go on under it
            run = self._begin()
            last = told
            while (row := self._rows.get()) is not None:
                step, values = row
                if step > last > told:  # whose rows are all handed over
                    self._note(told := last)
                run.log({AXIS: step, **{name: self._shown(value) for name, value in values.items()}})
                last = step
            self._note(last)
            run.finish()
        except Exception as error:  # whatever it is, the training goes on
            self._warn(f"W&B is told nothing more ({type(error).__name__}: {first_line(error)})")

    def _begin(self):
        """The run, new or gone on with; offline if the server does not answer."""
        if self._config.mode == "online":
            try:
                return self._init("online")
            except Exception as error:
                places = f"into {self._folder / FILES[0]}, from where `wandb sync` sends it"
                self._warn(f"W&B cannot be reached ({first_line(error)}); it is written {places}")
                self._wandb.teardown()  # of the service, for which the run's id would be in use
        return self._init("offline")

    def _init(self, mode: str):
        run = self._wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            group=self._config.group,
            id=self._id,
            name=self._folder.name,
            dir=str(self._folder),
            resume="allow",
            mode=mode,
            config=yaml.safe_load(self._config_text),
            settings=self._wandb.Settings(
                silent=True, console="off", disable_code=True, init_timeout=REACH_S, finish_timeout=CLOSE_S / 2
            ),
        )
        # W&B's own count of rows knows nothing of training steps that come again.
        run.define_metric(AXIS)
        run.define_metric("*", step_metric=AXIS)
        return run

    def _note(self, told: int) -> None:
        with contextlib.suppress(OSError):  # a full disk: at worst, some rows come twice
            write_text(self._notes, json.dumps({"id": self._id, "step": told}) + "\n")

    def _shown(self, value: float | Tensor):
        return self._wandb.Image(value.permute(1, 2, 0).cpu().numpy()) if isinstance(value, Tensor) else value
