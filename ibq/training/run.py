"""What the entry scripts share: the command line, the engines, the run folder."""

import argparse
import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from ibq import dist
from ibq.config import UserError, dump_config, load_config
from ibq.engine.base import Engine, EngineSettings, OptimizerConfig
from ibq.engine.build import build_engine
from ibq.engine.configs import EngineConfig
from ibq.engine.heartbeat import Heartbeat
from ibq.files import lock, remove
from ibq.meeting import meet, telling_others
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.progress import say
from ibq.training import bad_samples, provenance, startup, wandb_writer
from ibq.training.checkpoint import checkpoints_in
from ibq.training.launcher import watch_launcher
from ibq.training.loop import train
from ibq.training.micro_batch import resolve_micro_batch
from ibq.training.run_data import RunData
from ibq.training.start_from import run as start_from
from ibq.training.start_from.config import StartConfig
from ibq.training.start_from.fit import Fit
from ibq.training.start_from.places import Source
from ibq.training.startup import StartUp, TimedBlueprint
from ibq.training.stopping import STATUS_FILE
from ibq.training.task import Task

# Everything that a run writes into its folder; --fresh removes these and nothing else.
RUN_FILES = ("config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "best", STATUS_FILE, bad_samples.FILE,
             provenance.FILE, provenance.PACKAGES_FILE, startup.FILE, start_from.FILE, *wandb_writer.FILES)  # fmt: skip
LOCK_FILE = ".lock"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
RESTART_COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The parsed command line of an entry script."""

    config: object
    source: str  # the config file, for error messages
    fresh: bool


def parse_arguments(kind: type, description: str, example: str, argv: Sequence[str] | None = None) -> Arguments:
    """Read `--config FILE [key=value ...] [--fresh]` into a config of class `kind`."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file; see yaml/")
    parser.add_argument("--fresh", action="store_true", help="start over: remove what an earlier run left in `output`")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings over the file's, such as training.batch_size=64",
    )
    # The deepspeed launcher adds --local_rank; the rank is read from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args(argv)
    config = load_config(kind, arguments.config, arguments.overrides)
    return Arguments(config=config, source=arguments.config, fresh=arguments.fresh)


@dataclass(frozen=True, kw_only=True)
class Command:
    """What an entry script is told to do, on which device, and the clock of its start."""

    config: Any
    source: str  # the config file, for error messages
    fresh: bool
    device: torch.device
    start_up: StartUp
    heart: Heartbeat

    @classmethod
    @contextlib.contextmanager
    def begin(cls, kind: type, description: str, example: str, argv: Sequence[str] | None) -> Iterator["Command"]:
        """Read the command line (`parse_arguments`), set PyTorch up, and join the other ranks.

        An error in this context ends the others too.
        """
        start_up = StartUp()
        watch_launcher()
        with telling_others():
            arguments = parse_arguments(kind, description, example, argv)
            with naming(arguments.source):
                arguments.config.log.check()
            set_up_torch(training=True)
            dist.own_device(arguments.config.device)
        heartbeat = arguments.config.heartbeat
        meeting = meet(heartbeat.start_within_s)
        with Heartbeat(heartbeat, meeting) as heart:
            device = dist.setup(arguments.config.device, meeting)
            yield cls(**vars(arguments), device=device, start_up=start_up, heart=heart)

    def bind(self, data: RunData, tokenizer: TokenizerConfig | None = None) -> None:
        """Set how a run's data is batched; UserError when batch, micro-batch and world size do not fit.

        `tokenizer`: the frozen one of a run that makes its codes itself, which takes memory too.
        """
        training = self.config.training
        try:
            with naming(self.source):
                fresh = starts_over(self.fresh)
                micro_batch = resolve_micro_batch(self.config, self.device, fresh=fresh, tokenizer=tokenizer)
            data.bind(training.batch_size, micro_batch, training.validation_images, self.device)
        except ValueError as error:
            section = "data" if str(error).startswith("streams:") else "training"
            raise UserError(f"{self.source}: {section}.{error}") from error
        if data.order.size is None and training.max_steps is None:
            problem = "training.epochs: the size of unindexed data is not known; give training.max_steps instead"
            raise UserError(f"{self.source}: {problem}")

    def check_schedule(self, schedule: Callable[[int], object]) -> None:
        """UserError before the run starts if its schedule cannot be computed."""
        try:
            schedule(0)
        except ValueError as error:
            raise UserError(f"{self.source}: schedule.{error}") from error

    def part(self, name: str) -> contextlib.AbstractContextManager[None]:
        """This context belongs to a part of the start."""
        return self.start_up.part(name)

    def engine(
        self,
        name: str,
        build: Callable[[], nn.Module],
        data: RunData,
        config: EngineConfig,
        *,
        optimizer: OptimizerConfig,
        ema_decay: float | None,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Engine:
        """The engine that trains the module of `build` on batches of `data`; `ema_decay` None keeps no average."""
        blueprint = TimedBlueprint(name=name, build=build, seed=self.config.seed, start_up=self.start_up)
        settings = EngineSettings(
            optimizer=optimizer,
            device=self.device,
            precision=self.config.precision,
            accumulation=data.batching.accumulation,
            ema_decay=ema_decay,
            ema_warmup=self.config.ema_warmup,
            memory_format=memory_format,
        )
        with naming(self.source):
            return build_engine(config, blueprint, settings)

    def start(self, open_fit: Callable[[StartConfig], tuple[Source, Fit]]) -> start_from.Start:
        """Where the run begins; UserError, before anything is written, where it cannot. `open_fit` as in `Start`."""
        start = start_from.Start(self.config.start, open_fit)
        if not self._goes_on():
            with self.part("model"), naming(f"{self.source}: start_from"):
                start.check()
        return start

    def _goes_on(self) -> bool:
        """Whether the run's folder holds checkpoints that it will go on from; the same on every rank."""
        anew = starts_over(self.fresh)
        found = checkpoints_in(Path(self.config.output) / "checkpoints") and not anew
        return bool(dist.largest(int(bool(found))))

    def train(self, task: Task, data: RunData, title: str, start: start_from.Start) -> int:
        """Train in the run's folder as the config says, and leave the process group; the exit code."""
        config = self.config
        resolved = replace(config, training=replace(config.training, micro_batch=data.batching.micro_batch))
        try:
            with run_folder(config.output, self.fresh) as folder:
                code = train(
                    task,
                    data,
                    folder=folder,
                    config=config.training,
                    checkpoint=config.checkpoint,
                    log_config=config.log,
                    heart=self.heart,
                    config_text=dump_config(resolved),
                    total_steps=config.training.total_steps(data.steps_per_epoch),
                    seed=config.seed,
                    device=self.device,
                    title=title,
                    start_up=self.start_up,
                    start=start,
                )
        finally:
            for engine in task.engines.values():  # a process of several ends without the interpreter's clean-up
                engine.close()
        dist.shutdown()
        return code


@contextlib.contextmanager
def run_folder(output: str, fresh: bool) -> Iterator[Path]:
    """The run folder, emptied if `fresh`, and locked against a second run; every rank calls it.

    A restart by torchrun or Slurm repeats the command line and must not wipe what it is to go on from: it ignores
    `fresh`.
    """
    folder, locked, problem = Path(output), None, ""
    wanted, fresh = fresh, starts_over(fresh)
    if wanted and not fresh and dist.is_main():
        say("--fresh: ignored, since this is a restart of the run, which goes on from its last checkpoint")
    if dist.is_main():
        try:
            locked = _lock(folder)
            if fresh:
                remove(folder, RUN_FILES)
        except UserError as error:
            problem = str(error)
    if problem := dist.text_from_main(problem):
        raise UserError(problem)
    try:
        yield folder
    finally:
        if locked is not None:
            locked.close()


def starts_over(fresh: bool) -> bool:
    """Whether `--fresh` is given and this is no restart of the run; every rank calls it."""
    # The counts of torchrun's agents differ: the host on which a rank died has counted, the others have not.
    return fresh and not dist.largest(max(int(os.environ.get(count, "0")) for count in RESTART_COUNTS))


def _lock(folder: Path) -> IO:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output: '{folder}' is a file; give a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK_FILE, "w")  # noqa: SIM115 (it is open as long as the run)
    except OSError as error:
        raise UserError(f"output: '{folder}' cannot be written ({error}); give another folder") from error
    with contextlib.suppress(OSError):  # a file system without locks
        if not lock(file, of_process=True):  # workers may outlive a run that is killed
            file.close()
            raise UserError(f"output: another run is writing to '{folder}'; wait for its end, or give another")
    return file


def check_seed_and_average(seed: int, ema_decay: float | None) -> None:
    """Raise ValueError for a negative seed or a decay of the averaged weights outside [0, 1)."""
    if seed < 0:
        raise ValueError(f"seed: must not be negative, got {seed}")
    if ema_decay is not None and not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay: must lie in [0, 1), got {ema_decay}")


@contextlib.contextmanager
def naming(source: str) -> Iterator[None]:
    """Errors of the user in this context also name the file or key that they come from."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def set_up_torch(*, training: bool) -> None:
    """Process-wide settings of an entry point.

    Denormals make softmax tails several times slower on x86. TF32 stays off for matrix products: the quantizer and its
    look-up want fp32, and what should be fast runs in bf16. Tools want the same result every time; training may try
    which convolution is fastest.
    """
    if training:
        keep_freed_memory()
    torch.set_flush_denormal(True)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = training
    torch.backends.cudnn.deterministic = not training


def keep_freed_memory() -> None:
    """Let freed memory stay with this process, for the next tensor: a training step asks for the same again and again.

    Otherwise the C library returns every large block to the system, which clears it page by page when it is next used:
    a tenth of a step on a CPU. Does nothing where there is no glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            mallopt(parameter, 2**31 - 1)
