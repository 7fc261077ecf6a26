"""Plan a run before it is paid for: memory per GPU, communication, tokens per second and days, layout by layout.

python tools/plan.py --config yaml/xxl.yaml --gpus 96 --gpu h100
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import field, fields, make_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ibq.config import UserError, exit_on_user_error, load_config
from ibq.config_yaml import read_layers
from ibq.engine.configs import (
    EngineConfig,
    FsdpEngineConfig,
    LocalEngineConfig,
    ZeroEngineConfig,
    check_tensor_parallel,
)
from ibq.files import write_text
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.models.transformer import TransformerConfig
from ibq.scaling.hardware import GIB, GPUS, Gpu
from ibq.scaling.layouts import Layout, Training
from ibq.scaling.networks import TokenizerLosses
from ibq.scaling.plan import Machine, Stage, TokenizerStage, TransformerStage, layouts, plan, zero_layout
from ibq.training.ar_config import ARRunConfig
from ibq.training.tokenizer_config import TokenizerRunConfig
from tools.lib.scaling.plan_table import Answer, as_json, as_text

IMAGENET = 1_281_167
EPILOG = """\
The config is that of a training run (ibq/train_ar.py or ibq/train_tokenizer.py); its data is not opened, and
key.path=value after the options changes it, as there. Every layout is shown with the micro-batch of the config, then
with the largest micro-batch that fits and divides the batch. The config's own engine is marked with *.

Memory is that of the fullest moment of a step, from the table of tensors that each layer saves. Time rests on --mfu, an
assumption: the share of the GPU's dense bf16 rate at which all FLOPs run, those of recomputation too. Communication
of data parallelism runs beside the computation and counts where it takes longer; the rest is waited for.

examples:
  python tools/plan.py --config yaml/xxl.yaml --gpus 96 --gpu h100
  python tools/plan.py --config yaml/xxl.yaml --gpus 8 --gpu a100-80 model.gradient_checkpointing=true
  python tools/plan.py --config yaml/tokenizer_262144.yaml --gpus 64 --gpu a100-40 --json plan.json
  python tools/plan.py --config yaml/b.yaml --gpus 4 --gpu-memory-gib 24 --gpu-tflops 165
"""


LOOKED_AT = ("precision", "ema_decay", "model", "loss", "optimizer", "training", "engine")  # of a run's settings


def _plan_of(run: type) -> type:
    """The settings of a run of which those that say nothing of its size may have any value, or none."""
    hints = get_type_hints(run)
    found = []
    for own in fields(run):
        same = {"default": own.default, "default_factory": own.default_factory}
        seen = own.name in LOOKED_AT
        found.append((own.name, hints[own.name] if seen else Any, field(**same if seen else {"default": None})))
    return make_dataclass(run.__name__, found, frozen=True, kw_only=True)


TransformerPlan, TokenizerPlan = _plan_of(ARRunConfig), _plan_of(TokenizerRunConfig)


def read_config(path: str, overrides: Sequence[str]) -> TransformerPlan | TokenizerPlan:
    """The config, of the stage that its keys belong to; ConfigError or UserError for one that cannot be read."""
    models = {TransformerPlan: TransformerConfig, TokenizerPlan: TokenizerConfig}
    own = {plan: {field.name for field in fields(model)} for plan, model in models.items()}
    sections = [layer.value for layer in read_layers(Path(path))]
    said = {key for section in sections if "model" in section for key in section["model"].value or ()}
    said |= {text.partition("=")[0].removeprefix("model.") for text in overrides if text.startswith("model.")}
    both = own[TransformerPlan] & own[TokenizerPlan]
    matching = [plan for plan, keys in own.items() if said & (keys - both)]
    if len(matching) != 1:
        raise UserError(
            f"{path}: model: these keys do not tell a transformer from a tokenizer; give one of its sizes, such as "
            "model.depth or model.resolution"
        )
    return load_config(matching[0], path, overrides)


def stage_of(config: TransformerPlan | TokenizerPlan) -> Stage:
    """What is trained."""
    if isinstance(config, TransformerPlan):
        return TransformerStage(config.model)
    gan, perceptual = config.loss.gan, config.loss.perceptual
    losses = TokenizerLosses(discriminator=gan.discriminator if gan.enabled else None, perceptual=perceptual.weight > 0)
    return TokenizerStage(config.model, losses)


def layout_of(engine: EngineConfig, stage: Stage, machine: Machine) -> Layout:
    """The layout of a config's engine on these GPUs; UserError where it cannot be used or the numbers do not divide."""
    common = {"gpus": machine.gpus, "gpus_per_node": machine.gpus_per_node}
    match engine:
        case LocalEngineConfig():
            return Layout(kind="local", **common)
        case ZeroEngineConfig():
            return zero_layout(engine, stage, machine)
        case FsdpEngineConfig():
            ranks = None
            if engine.shard == "hybrid":
                on_node = min(machine.gpus, machine.gpus_per_node)
                explicit = replace(engine, shard_ranks=engine.shard_ranks or max(1, on_node // engine.tensor_parallel))
                ranks = explicit.mesh_sizes(machine.gpus)[1]
            else:
                engine.mesh_sizes(machine.gpus)
            share = ranks or machine.gpus // engine.tensor_parallel
            return Layout(
                kind="fsdp",
                shard_ranks=ranks,
                offload_optimizer=engine.offload,
                tensor=engine.tensor_parallel,
                sequence=engine.sequence_parallel,
                reduces_each=engine.reduce == "each",
                reshards=engine.reshards(share),
                **common,
            )


def check(config: TransformerPlan | TokenizerPlan, stage: Stage, own: Layout, machine: Machine) -> None:
    """UserError for a run that these GPUs cannot make."""
    training = config.training
    if training.batch_size % (own.data * training.micro_batch):
        raise UserError(
            f"--gpus {machine.gpus}: the batch of {training.batch_size} images does not divide into micro-batches of "
            f"{training.micro_batch} on {own.data} ranks; change --gpus, training.batch_size or training.micro_batch"
        )
    if own.tensor == 1:
        return
    sizes = stage.tensor_sizes()
    if not sizes:
        raise UserError("engine.tensor_parallel: a tokenizer cannot be split; set it to 1")
    tokens = stage.common_tokens if own.sequence else None
    check_tensor_parallel(own.tensor, heads=sizes["heads"], kv_heads=sizes["key and value heads"], tokens=tokens)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; UserError for impossible numbers."""
    first, *_ = __doc__.splitlines()
    parser = argparse.ArgumentParser(
        description=first, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="YAML file of a training run")
    add("--gpus", type=int, required=True, metavar="N", help="GPUs in all")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs of a machine (default: %(default)s)")
    add("--gpu", choices=[*GPUS], default="h100", help="(default: %(default)s)")
    add("--gpu-memory-gib", type=float, metavar="X", help="memory of another GPU")
    add("--gpu-tflops", type=float, metavar="X", help="its dense bf16 rate in TFLOP/s")
    add("--mfu", type=float, default=0.4, metavar="X", help="share of that rate; an assumption (default: %(default)s)")
    add("--reserve-gib", type=float, default=4.0, metavar="X", help="memory left free (default: %(default)s)")
    add("--images", type=int, default=IMAGENET, metavar="N", help="of an epoch (default: ImageNet's %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write everything here")
    add("overrides", nargs="*", metavar="key.path=value", help="changes of the config")
    arguments = parser.parse_args(argv)
    for name in ("gpus", "gpus_per_node", "gpu_memory_gib", "gpu_tflops", "images"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')}: {value} is not positive; give a number above 0")
    if not 0 < arguments.mfu <= 1:
        raise UserError(f"--mfu: {arguments.mfu} is not a share; give a number above 0 and up to 1, such as 0.4")
    if arguments.reserve_gib < 0:
        raise UserError(f"--reserve-gib: {arguments.reserve_gib} is negative; give 0 or more")
    return arguments


def machine_of(arguments: argparse.Namespace) -> Machine:
    """The GPUs that the options describe."""
    gpu: Gpu = GPUS[arguments.gpu]
    if arguments.gpu_memory_gib is not None:
        gpu = replace(gpu, name="other GPU", memory_gib=arguments.gpu_memory_gib)
    if arguments.gpu_tflops is not None:
        gpu = replace(gpu, name="other GPU", flops=1e12 * arguments.gpu_tflops)
    return Machine(
        gpu=gpu,
        gpus=arguments.gpus,
        gpus_per_node=arguments.gpus_per_node,
        reserve=arguments.reserve_gib * GIB,
        mfu=arguments.mfu,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Plan as the command line says."""
    arguments = parse(argv)
    machine = machine_of(arguments)
    config = read_config(arguments.config, arguments.overrides)
    stage, run = stage_of(config), config.training
    own = layout_of(config.engine, stage, machine)
    check(config, stage, own, machine)
    training = Training(
        precision=config.precision,
        micro_batch=run.micro_batch,
        batch_size=run.batch_size,
        moments=0 if config.optimizer.kind == "sgd" else 8,
        ema=config.ema_decay is not None,
    )
    choices = [*layouts(stage, machine)]
    choices = [own if choice.name == own.name else choice for choice in choices]
    choices = choices if own in choices else [*choices, own]
    choices = [choice for choice in choices if run.batch_size % choice.data == 0]
    rows = plan(stage, training, machine, choices)
    steps = run.total_steps(arguments.images / run.batch_size)
    facts = {"source": arguments.config, "stage": stage, "training": training, "machine": machine}
    answer = Answer(**facts, rows=rows, own=own, steps=steps)
    print(as_text(answer))
    if arguments.json is not None:
        write_text(arguments.json, as_json(answer))


if __name__ == "__main__":
    exit_on_user_error(main)
