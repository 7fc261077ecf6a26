"""Peak memory of training steps under each engine, case after case.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/workers/plan_worker.py CASES

CASES is a JSON file: name -> {model, engine, precision, micro_batch, accumulation}, where a model with a `resolution`
is a tokenizer; CASES.RANK gets name -> bytes.
"""

import gc
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from support.peak_memory import peak_of_step

from ibq import dist
from ibq.config import exit_on_user_error, parse_config
from ibq.engine.base import EngineSettings, GroupHyper, OptimizerConfig
from ibq.engine.blueprint import Blueprint
from ibq.engine.build import build_engine
from ibq.engine.configs import FsdpEngineConfig, LocalEngineConfig, ZeroEngineConfig
from ibq.models.discriminator import PatchDiscriminator, PatchDiscriminatorConfig
from ibq.models.perceptual import PerceptualConfig, build_perceptual
from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.models.transformer import Transformer, TransformerConfig
from ibq.training.metrics import Stopwatch
from ibq.training.tokenizer_config import GanConfig, TokenizerLossConfig
from ibq.training.tokenizer_task import TokenizerTask

KINDS = {"local": LocalEngineConfig, "fsdp": FsdpEngineConfig, "zero": ZeroEngineConfig}
HYPER = {name: GroupHyper(learning_rate=1e-4) for name in ("decay", "no_decay")}


def engine_of(case: dict, name: str, build: Callable, kind: str | None = None, ema: float | None = 0.999):
    settings = EngineSettings(
        optimizer=OptimizerConfig(kind="adamw", clip_norm=1.0),
        device=torch.device("cpu"),
        precision=case["precision"],
        accumulation=case["accumulation"],
        ema_decay=ema,
    )
    described = {"kind": kind} if kind else case["engine"]
    config = parse_config(KINDS[described["kind"]], described)
    engine = build_engine(config, Blueprint(name=name, build=build, seed=0), settings)
    engine.module.train()
    return engine


def transformer_step(case: dict, engines: list) -> Callable[[], object]:
    config = parse_config(TransformerConfig, case["model"])
    engine = engine_of(case, "transformer", lambda: Transformer(config))
    engines.append(engine)
    codes = torch.randint(config.vocab_size, (case["micro_batch"], config.num_tokens))
    classes = torch.randint(config.num_classes, (case["micro_batch"],))

    def step():
        for _ in range(case["accumulation"]):
            with engine.micro_batch():
                engine.backward(engine(codes, classes).mean())
        engine.step(HYPER)

    return step


def tokenizer_step(case: dict, engines: list) -> Callable[[], object]:
    config = parse_config(TokenizerConfig, case["model"])
    discriminator = PatchDiscriminatorConfig(channels=16)
    tokenizer = engine_of(case, "tokenizer", lambda: Tokenizer(config))
    other = engine_of(case, "discriminator", lambda: PatchDiscriminator(discriminator), kind="local", ema=None)
    engines += [tokenizer, other]
    perceptual = PerceptualConfig(weights="random")
    task = TokenizerTask(
        tokenizer,
        other,
        TokenizerLossConfig(perceptual=perceptual, gan=GanConfig(discriminator=discriminator)),
        perceptual=build_perceptual(perceptual),
        learning_rate=lambda step: 1e-4,
    )
    shape = (case["micro_batch"], 3, config.resolution, config.resolution)
    labels = torch.zeros(case["micro_batch"], dtype=torch.int64)
    batches = [(torch.randint(256, shape, dtype=torch.uint8), labels) for _ in range(case["accumulation"])]
    return lambda: task.step(0, batches, Stopwatch(torch.device("cpu")))


def measure(case: dict) -> int:
    engines: list = []
    prepare = tokenizer_step if "resolution" in case["model"] else transformer_step
    gc.collect()
    gc.freeze()
    peak = peak_of_step(lambda: prepare(case, engines))
    for engine in engines:
        if hasattr(engine, "close"):
            engine.close()
    return peak


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.setup("cpu")
    path = Path(sys.argv[1])
    peaks = {}
    for name, case in json.loads(path.read_text()).items():
        peaks[name] = measure(case)
        path.with_name(f"{path.name}.{dist.rank()}").write_text(json.dumps(peaks))
    dist.shutdown()


if __name__ == "__main__":
    exit_on_user_error(main)
