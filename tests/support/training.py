"""Tiny data sets, tiny configs and reading what runs leave behind, for the tests of training."""

import importlib
import io
import json
import signal
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ibq.config import UserError, dump_config
from ibq.data.codes import CodesMeta, write_codes
from ibq.engine.state_files import StateReader
from ibq.tensor_file import write_tensors

SCRIPTS = {"tokenizer": "ibq/train_tokenizer.py", "transformer": "ibq/train_ar.py"}
CODES, SIDE, CLASSES = 32, 4, 3


def picture(number: int, size: int = 16) -> Image.Image:
    """A smooth picture that depends on its number alone."""
    noise = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_images(folder: Path, count: int = 40, validation: int = 8) -> None:
    """Shards train-0.tar, train-1.tar and val-0.tar of 16-pixel pictures in CLASSES classes."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {
        "train-0": range(count // 2),
        "train-1": range(count // 2, count),
        "val-0": range(count, count + validation),
    }
    for name, numbers in parts.items():
        members = {}
        for i in numbers:
            members[f"{i:04d}.png"] = png(picture(i))
            members[f"{i:04d}.cls"] = str(i % CLASSES).encode()
        write_shard(folder / f"{name}.tar", members)


def write_code_folder(folder: Path, count: int = 40, tokenizer: str = "test") -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(count) % CLASSES
    # Learnable: a class uses a third of the codes.
    codes = (rng.integers(0, CODES // CLASSES, (count, SIDE**2)) + labels[:, None] * (CODES // CLASSES)) % CODES
    meta = CodesMeta(num_codes=CODES, grid=(SIDE, SIDE), classes=[str(i) for i in range(CLASSES)], tokenizer=tokenizer)
    write_codes(folder, codes, labels, meta)


TOKENIZER_CONFIG = f"""
precision: fp32
device: cpu
ema_decay: 0.9
data: {{train: DATA/train-*.tar, validation: DATA/val-*.tar, workers: 0, in_memory: true}}
model:
  resolution: 16
  channels: 32
  channel_multipliers: [1, 1, 1]
  res_blocks: 1
  attention_resolutions: []
  latent_channels: 16
  quantizer: {{num_codes: {CODES}, dim: 16}}
loss:
  perceptual: {{weight: 0.0}}
  gan: {{start_step: 0, discriminator: {{channels: 8, layers: 2}}}}
optimizer: {{learning_rate: 1e-3, eps: 1e-3}}
training: {{max_steps: 4, batch_size: 8, micro_batch: 8, log_every: 1, validate_every: 2}}
checkpoint: {{save_every: 2}}
"""

TRANSFORMER_CONFIG = f"""
precision: fp32
device: cpu
ema_decay: 0.9
data: {{kind: codes, train: DATA/codes, validation: DATA/codes}}
model:
  vocab_size: {CODES}
  num_classes: {CLASSES}
  tokens_per_side: {SIDE}
  depth: 2
  heads: 2
  width: 32
  residual_dropout: 0.0
  ffn_dropout: 0.0
  token_dropout: 0.0
  class_dropout: 0.0
optimizer: {{kind: adamw, learning_rate: 1e-2, betas: [0.9, 0.95], weight_decay: 0.05, eps: 1e-3, clip_norm: 1.0}}
training: {{max_steps: 4, batch_size: 8, micro_batch: 8, log_every: 1, validate_every: 2}}
checkpoint: {{save_every: 2}}
"""
CONFIGS = {"tokenizer": TOKENIZER_CONFIG, "transformer": TRANSFORMER_CONFIG}


def make_workplace(folder: Path) -> Path:
    """A folder with data and the configs tokenizer.yaml and transformer.yaml."""
    write_images(folder / "data")
    write_code_folder(folder / "data" / "codes")
    for stage, text in CONFIGS.items():
        (folder / f"{stage}.yaml").write_text(text.replace("DATA", str(folder / "data")))
    return folder


def write_best(folder: Path, module: torch.nn.Module) -> None:
    """A `best` folder as a run writes it, with the weights of `module`."""
    folder.mkdir(parents=True)
    write_tensors(folder / "model.safetensors", module.state_dict())
    (folder / "config.yaml").write_text(dump_config(module.config))
    (folder / "info.json").write_text("{}")


class DeathError(Exception):
    """Of a run that is to die."""


@contextmanager
def dying_at(task: type, number: int) -> Iterator[None]:
    """Within it a run of this task dies at the beginning of the step of this number; it must."""
    step = task.step

    def dying(self, current, *arguments):
        if current == number:
            raise DeathError
        return step(self, current, *arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(DeathError):
        patch.setattr(task, "step", dying)
        yield


def train_here(stage: str, argv: list[str]) -> int:
    """Run an entry script's main in this process, on one thread; its exit code."""
    module = importlib.import_module(f"ibq.{Path(SCRIPTS[stage]).stem}")
    threads = torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}
    torch.set_num_threads(1)
    try:
        return module.main(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Name -> step -> value, from a run's metrics.jsonl; a scalar that is logged twice at a step fails."""
    result: dict[str, dict[int, float]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        step = row.pop("step")
        for name, value in row.items():
            series = result.setdefault(name, {})
            assert step not in series or name == "bad_steps", f"{name} is there twice at step {step}"
            series[step] = value
    return result


def checkpoint_tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a run's checkpoint, whole: ENGINE/PART/PARAMETER, and those that each rank keeps, rank-0/NAME."""
    checkpoint = folder / "checkpoints" / f"step-{step:08d}"
    tensors = {}
    for index in checkpoint.glob("*.index.json"):
        engine = index.name.removesuffix(".index.json")
        reader = StateReader(checkpoint, engine)
        tensors |= {f"{engine}/{part}/{n}": reader.full(part, n) for n in reader.shapes for part in reader.parts}
    assert tensors
    for file in checkpoint.glob("rank-*.safetensors"):
        tensors |= {f"{file.stem}/{name}": tensor for name, tensor in load_file(file).items()}
    return dict(sorted(tensors.items()))


def largest_difference(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], floor=1e-12) -> float:
    """The largest difference over all tensors, each relative to the largest value of its tensor (at least `floor`)."""
    assert actual.keys() == expected.keys()
    differences = [
        float((actual[name].double() - tensor.double()).abs().max()) / max(float(tensor.double().abs().max()), floor)
        for name, tensor in expected.items()
    ]
    return max(differences, default=0.0)
