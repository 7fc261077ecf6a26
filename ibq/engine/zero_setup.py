"""What a ZeRO engine needs before it starts: checks, DeepSpeed itself, its settings, the module, the NVMe folder."""

import atexit
import contextlib
import copy
import ctypes
import functools
import importlib
import io
import logging
import os
import shutil
import socket
import sys
import uuid
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from ibq import dist
from ibq.config import UserError
from ibq.engine.base import EngineSettings, OptimizerConfig
from ibq.engine.blueprint import Blueprint, in_pieces
from ibq.engine.compilation import units_of
from ibq.engine.configs import ModelSize, ZeroEngineConfig
from ibq.engine.groups import optimizer_groups
from ibq.engine.pieces import Piece, take, whole
from ibq.extras import install
from ibq.files import lock
from ibq.ops.backend import cxx_is_installed

PREFIX = "ibq-zero-"
SWAP_BUFFERS = 4  # of a sub-group on NVMe: master, gradient and two moments


# What DeepSpeed warns of in every run, and what is intended here.
EXPECTED = (
    "with an untested optimizer",
    "heavy write traffic",
    "Setting accelerator to CPU",
    "OVERFLOW! Skipping step",
)


def load_deepspeed(device: torch.device) -> Any:
    """The module `deepspeed` for this device, quiet but for warnings, in a process group of at least this process."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    for variable, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}.items():
        os.environ.setdefault(variable, str(value))
    prefer_own_ninja()
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # DeepSpeed calls these two at every step.
    deprecated = r"`torch.distributed.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
    warnings.filterwarnings("ignore", message=deprecated, category=FutureWarning)
    logger = logging.getLogger("DeepSpeed")
    if _unexpected not in logger.filters:
        logger.addFilter(_unexpected)
    dist.ensure_group()
    try:
        with silence():
            deepspeed = importlib.import_module("deepspeed")
    except ImportError as error:
        raise UserError(f"engine.kind: zero needs DeepSpeed ({error}); {install('train')}") from None
    logger.setLevel(logging.WARNING)
    # On the CPU it starts numactl to count, for every bucket of gradients that stage 3 reduces.
    accelerator = deepspeed.accelerator.get_accelerator()
    if not hasattr(accelerator.device_count, "cache_info"):
        accelerator.device_count = functools.cache(accelerator.device_count)
    # Its operators are compiled without debugging information, which takes two fifths of the time.
    builder = importlib.import_module("deepspeed.ops.op_builder.builder").OpBuilder
    builder.strip_empty_entries = lambda _, flags: [flag for flag in flags if flag not in ("", "-g")]
    with silence():
        # Its collectives in shared memory serve inference alone; compiling them needs g++ and most of a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=torch_dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    return deepspeed


def prefer_own_ninja() -> None:
    """Of a virtual environment that is used without having been activated: PyTorch takes the first on the PATH.

    There may be none; or one of the system, and versions such as 1.11 and 1.13 compile each other's results again.
    """
    own = Path(sys.prefix, "bin", "ninja")
    if sys.prefix != sys.base_prefix and own.exists() and shutil.which("ninja") != str(own):
        os.environ["PATH"] = f"{own.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def _unexpected(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in EXPECTED)


def silence() -> contextlib.AbstractContextManager:
    """What DeepSpeed prints without a logger, from Python, is dropped."""
    return contextlib.redirect_stdout(io.StringIO())


def build_operators(config: ZeroEngineConfig, optimizer: OptimizerConfig) -> None:
    """Compile what offloading needs; done once per machine, and each time loaded from the cache afterwards."""
    builders = importlib.import_module("deepspeed.ops.op_builder")
    wanted = {}
    if config.uses_nvme:
        if not builders.AsyncIOBuilder().is_compatible(verbose=False):  # which compiles a program
            wants, install = "libaio", "libaio-dev (libaio-devel)"
            if not cxx_is_installed():
                wants, install = f"{wants} and a C++ compiler", f"{install} and g++"
            raise UserError(f"engine: offloading to nvme needs {wants}; install {install}, or offload to cpu")
        wanted["NVMe offload"] = builders.AsyncIOBuilder
    if config.offload_optimizer != "none" and optimizer.kind != "sgd":
        wanted["the CPU optimizer"] = builders.CPUAdamBuilder
    for what, builder in wanted.items():
        try:
            dist.main_first(lambda builder=builder: builder().load(verbose=False))
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            if not cxx_is_installed():
                reason = "no C++ compiler was found"
            raise UserError(
                f"engine: DeepSpeed could not compile {what} ({reason}); install ninja and a C++ compiler (g++)"
            ) from error


# --- Memory and space ---


def model_size(module: nn.Module) -> ModelSize:
    """The size of a module whose parameters are whole."""
    numbers = [parameter.numel() for parameter in module.parameters()]
    units = [sum(parameter.numel() for parameter in unit.parameters()) for unit in units_of(module)]
    return ModelSize(total=sum(numbers), unit=max(units or numbers), largest=max(numbers))


def partition_numel(numbers: Iterable[int]) -> int:
    """Elements of this rank's partitions of parameters with so many elements, padding included."""
    return sum(-(-number // dist.world_size()) for number in numbers)


def nvme_bytes(config: ZeroEngineConfig, settings: EngineSettings, numel: int, frozen: int = 0) -> int:
    """Bytes on NVMe of a rank that holds `numel` elements of the parameters, of which so many are `frozen`."""
    size = 0
    if config.offload_optimizer == "nvme":  # masters, two moments, average
        size += (12 if settings.ema_decay is None else 16) * (numel - frozen)
    if config.offload_parameters == "nvme":
        size += (4 if settings.precision == "fp32" else 2) * numel
    return size


def check_nvme(config: ZeroEngineConfig, settings: EngineSettings, numel: int, frozen: int = 0) -> None:
    """Raise UserError where offloading to NVMe cannot work; nothing is written."""
    if not config.uses_nvme:
        return
    if settings.optimizer.kind == "sgd" and config.offload_optimizer == "nvme":
        raise UserError("engine.offload_optimizer: nvme needs adam or adamw; set optimizer.kind=adamw, or use cpu")
    if settings.device.type == "cuda" and config.deepspeed.get("aio", {}).get("use_gds"):
        raise UserError("engine.deepspeed: aio.use_gds is not supported; leave it out")
    path = Path(config.nvme_path)
    if not path.is_dir():
        raise UserError(f"engine.nvme_path: no folder {path}; create it, or name a folder on the NVMe disk")
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"engine.nvme_path: {path} is not writable; change its owner, or name another folder")
    ranks = dist.local_world_size()
    need, free = ranks * nvme_bytes(config, settings, numel, frozen), shutil.disk_usage(path).free
    if need > free:
        raise UserError(
            f"engine.nvme_path: {path} has {free / 2**30:.1f} GiB free, but the {ranks} processes of this machine need "
            f"{need / 2**30:.1f} GiB; free some, name another disk, or start more processes"
        )


class NvmeFolder:
    """A folder of this process alone, removed with it; those of processes that died are swept away.

    A lock on a file beside it, which the system drops with the process, says whether a folder is in use.
    """

    def __init__(self, parent: str):
        self._parent = Path(parent)
        self._sweep()
        while True:
            self._lock_path = self._parent / f"{PREFIX}{socket.gethostname()}-{uuid.uuid4().hex[:12]}.lock"
            self._lock = open(self._lock_path, "w")  # noqa: SIM115 (held for as long as the folder)
            # A sweep of another process may have come in between, and taken the file away.
            if lock(self._lock) and self._lock_path.exists():
                break
            self._lock.close()
        self.path = self._lock_path.with_suffix("")
        self.path.mkdir()
        atexit.register(self.remove)

    def _sweep(self) -> None:
        for path in self._parent.glob(f"{PREFIX}{socket.gethostname()}-*.lock"):
            try:
                with open(path, "r+") as file:
                    if lock(file):
                        shutil.rmtree(path.with_suffix(""), ignore_errors=True)
                        path.unlink()
            except OSError:
                continue  # another process sweeps, or another user's

    def remove(self) -> None:
        """Remove the folder with what is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock_path.unlink(missing_ok=True)
        self._lock.close()
        atexit.unregister(self.remove)


def check_direct_io(folder: Path) -> None:
    """Raise UserError where direct I/O does not work, for DeepSpeed's reads and writes then fail without a word."""
    module = importlib.import_module("deepspeed.ops.op_builder").AsyncIOBuilder().load(verbose=False)
    options = {"single_submit": False, "overlap_events": True, "intra_op_parallelism": 1}
    handle = module.aio_handle(block_size=2**20, queue_depth=8, **options)
    expected = torch.arange(2**18 + 256, dtype=torch.float32)  # not a multiple of large blocks, as parameters are not
    buffer = handle.new_cpu_locked_tensor(expected.numel(), expected)
    path = str(folder / "check")
    buffer.copy_(expected)
    handle.async_pwrite(buffer, path, 0)
    handle.wait()
    buffer.zero_()
    handle.async_pread(buffer, path, 0)
    handle.wait()
    same = torch.equal(buffer, expected)
    handle.free_cpu_locked_tensor(buffer)
    if not same:
        raise UserError(f"engine.nvme_path: direct I/O does not work in {folder.parent}; name a folder on a local disk")


@contextlib.contextmanager
def freed_at_once() -> Iterator[None]:
    """Within this context, memory of a MiB and more that is freed goes back to the system.

    glibc keeps blocks of up to 32 MiB, and DeepSpeed moves all parameters after they have been made: a model in bf16
    would be in memory twice for good.
    """
    threshold = -3  # M_MMAP_THRESHOLD
    try:
        set_option = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        set_option = lambda *_: 0  # noqa: E731
    set_option(threshold, 2**20)
    try:
        yield
    finally:
        set_option(threshold, 2**25)  # where glibc itself ends up in a process with large blocks


# --- DeepSpeed's settings ---


def deepspeed_settings(
    config: ZeroEngineConfig, settings: EngineSettings, model: ModelSize, folder: Path | None
) -> dict[str, Any]:
    """DeepSpeed's configuration for a model."""
    bf16 = settings.precision == "bf16" and config.stage > 0  # stage 0 keeps float32 weights under autocast
    averaged, kept = config.gradients_in(settings.precision, settings.accumulation, dist.world_size())
    result = {
        "train_micro_batch_size_per_gpu": 1,  # only products of it are used
        "gradient_accumulation_steps": settings.accumulation,
        "gradient_clipping": settings.optimizer.clip_norm or 0.0,
        "steps_per_print": 2**62,
        "zero_allow_untested_optimizer": True,  # plain SGD
        "zero_force_ds_cpu_optimizer": False,
        "timers": {"throughput": {"enabled": False}},  # waits for the device twice a step
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": kept},
        "communication_data_type": averaged,
        "zero_optimization": _zero_settings(config, settings.device, model, folder),
    }
    result = merge(result, config.deepspeed)
    offload = result["zero_optimization"].get("offload_optimizer", {})
    if offload.get("pipeline_read") or offload.get("pipeline_write"):
        raise UserError(
            "engine.deepspeed: pipelined swapping is not supported; leave out pipeline_read, pipeline_write"
        )
    if offload.get("ratio", 1.0) != 1.0:
        raise UserError("engine.deepspeed: offloading a part of the optimizer is not supported; leave out ratio")
    return result


def _zero_settings(
    config: ZeroEngineConfig, device: torch.device, model: ModelSize, folder: Path | None
) -> dict[str, Any]:
    cuda, sizes = device.type == "cuda", config.sizes(model, dist.world_size())
    zero = {
        "stage": config.stage,
        # Stage 3 with reduce-scatters lays each bucket out anew: a buffer before that would be one more copy.
        "contiguous_gradients": config.stage < 3,
        "overlap_comm": cuda and dist.world_size() > 1,
        "reduce_bucket_size": sizes.reduce_bucket_size,
        "allgather_bucket_size": sizes.allgather_bucket_size,
        "memory_efficient_linear": False,  # would replace torch.nn.functional.linear in the whole process
        "override_module_apply": False,
    }
    offload = {"nvme_path": str(folder) if folder else None, "pin_memory": cuda}
    if config.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": config.offload_optimizer, "buffer_count": SWAP_BUFFERS, **offload}
    if config.stage < 3:
        return zero
    on_nvme = config.offload_parameters == "nvme"
    zero |= {
        "sub_group_size": sizes.sub_group_size,
        # A parameter from NVMe occupies a buffer for as long as it is gathered: as few at a time as possible.
        "stage3_prefetch_bucket_size": 0 if on_nvme else sizes.prefetch_bucket_size,
        "stage3_max_live_parameters": 0 if on_nvme else sizes.max_live_parameters,
        "stage3_max_reuse_distance": 0 if on_nvme else sizes.reuse_distance,
        "stage3_param_persistence_threshold": sizes.persistent,
    }
    if config.offload_parameters != "none":
        buffers = {}
        if on_nvme:
            part = partition_numel([model.largest])
            buffers = {"buffer_size": part, "buffer_count": config.parameter_buffers, "max_in_cpu": 0}
        zero["offload_param"] = {"device": config.offload_parameters, **offload, **buffers}
    return zero


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, section by section."""
    result = copy.deepcopy(dict(base))
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merge(result[key], value) if both else copy.deepcopy(value)
    return result


# --- The module and its optimizer ---


class InitialWeights:
    """The initial value of every parameter, made again when it is needed if the blueprint can do that."""

    def __init__(self, blueprint: Blueprint):
        self._blueprint = blueprint
        self.module = blueprint.skeleton()
        self._values: dict[str, Tensor] | None = None
        if not in_pieces(self.module):
            self.module = blueprint.whole()
            self._values = {name: p.detach().clone() for name, p in self.module.named_parameters()}
        self.shapes = {name: tuple(p.shape) for name, p in self.module.named_parameters()}

    def __call__(self, name: str, piece: Piece, device: torch.device) -> Tensor:
        """The values [numel] of a piece of one parameter, float32 on a device."""
        if self._values is not None:
            return take(self._values[name], piece).to(device)
        return self._blueprint.initial(self.module, name, piece, device)


def materialize(
    initial: InitialWeights,
    dtype: torch.dtype,
    device: torch.device,
    convert: Callable[[nn.Parameter], None] | None,
    late: Collection[str] = (),
) -> nn.Module:
    """The module with its initial weights in `dtype`, one parameter at a time handed to `convert` (stage 3).

    Those of the parameters `late` are still to be given.
    """
    module = initial.module
    for name in initial.shapes:
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        old = owner.get_parameter(leaf)
        if name in late:
            values = torch.zeros(old.shape, dtype=dtype, device=device)
        else:
            values = initial(name, whole(old.shape), device).to(dtype).view(old.shape)
        new = nn.Parameter(values, requires_grad=old.requires_grad)
        setattr(owner, leaf, new)
        if convert is not None:
            convert(new)
    return module


def build_optimizer(
    module: nn.Module, shapes: Mapping[str, tuple[int, ...]], config: OptimizerConfig, on_cpu: bool
) -> torch.optim.Optimizer:
    """The optimizer that DeepSpeed wraps; `on_cpu`: its state is offloaded."""
    trained = ((name, p, len(shapes[name]) >= 2) for name, p in module.named_parameters() if p.requires_grad)
    listed = optimizer_groups(trained, config)
    if config.kind == "sgd":
        return torch.optim.SGD(listed, lr=0.0, fused=True)
    shared = {"lr": 0.0, "betas": config.betas, "eps": config.eps, "weight_decay": 0.0}
    if on_cpu:
        adam = importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam
        return adam(listed, adamw_mode=config.kind == "adamw", fp32_optimizer_states=True, **shared)
    kind = torch.optim.AdamW if config.kind == "adamw" else torch.optim.Adam
    return kind(listed, fused=True, **shared)
