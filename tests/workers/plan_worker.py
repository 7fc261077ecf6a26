"""Peak memory of training steps under each engine, case after case.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/workers/plan_worker.py CASES

CASES is a JSON file: name -> {model, engine, precision, micro_batch, accumulation}; CASES.RANK gets name -> bytes.
"""

import json
import sys
import warnings
from pathlib import Path

import torch

from ibq import dist
from ibq.config import exit_on_user_error, parse_config
from ibq.engine import Blueprint, EngineSettings, OptimizerConfig, build_engine
from ibq.engine.base import GroupHyper
from ibq.engine.fsdp import FsdpEngineConfig
from ibq.engine.local import LocalEngineConfig
from ibq.engine.zero import ZeroEngine, ZeroEngineConfig
from ibq.models.transformer import Transformer, TransformerConfig
from ibq.scaling.measure import peak_of_step

KINDS = {"local": LocalEngineConfig, "fsdp": FsdpEngineConfig, "zero": ZeroEngineConfig}
HYPER = {name: GroupHyper(learning_rate=1e-4) for name in ("decay", "no_decay")}


def measure(case: dict) -> int:
    config = parse_config(TransformerConfig, case["model"])
    accumulation, rows = case["accumulation"], case["micro_batch"]
    engines = []

    def prepare():
        settings = EngineSettings(
            optimizer=OptimizerConfig(kind="adamw", clip_norm=1.0),
            device=torch.device("cpu"),
            precision=case["precision"],
            accumulation=accumulation,
            ema_decay=0.999,
        )
        blueprint = Blueprint(name="transformer", build=lambda: Transformer(config), seed=0)
        engine_config = parse_config(KINDS[case["engine"]["kind"]], case["engine"])
        build = ZeroEngine if case["engine"]["kind"] == "zero" else build_engine
        engine = build(engine_config, blueprint, settings)
        engine.module.train()
        engines.append(engine)
        codes = torch.randint(config.vocab_size, (rows, config.tokens))
        classes = torch.randint(config.num_classes, (rows,))

        def step():
            for _ in range(accumulation):
                with engine.micro_batch():
                    engine.backward(engine(codes, classes).mean())
            engine.step(HYPER)

        return step

    peak = peak_of_step(prepare)
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
