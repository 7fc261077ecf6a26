"""Plan a run before it is paid for: what fits which GPUs, and memory, communication, days and money.

python tools/plan.py --config yaml/short/tokenizer_16384.yaml
python tools/plan.py --config yaml/xxl.yaml --gpus 96 --gpu h100
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import field, fields, make_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ibq.config import UserError, exit_on_user_error, load_config
from ibq.config_yaml import read_layers
from ibq.engine.configs import check_tensor_parallel
from ibq.files import write_text
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.models.transformer import TransformerConfig
from ibq.scaling.hardware import GIB, GPUS, PRICED, Gpu
from ibq.scaling.layouts import Layout
from ibq.scaling.plan import Machine, Stage, layout_of, layouts, micro_batch_within, plan
from ibq.scaling.survey import propose
from ibq.training.ar_config import ARRunConfig
from ibq.training.micro_batch import stage_of, training_of
from ibq.training.tokenizer_config import TokenizerRunConfig
from tools.lib.scaling.plan_table import Answer, as_json, as_text
from tools.lib.scaling.survey_table import Survey, survey_as_json, survey_as_text

COUNTS = (1, 4, 8)  # GPUs, where their number is not given
PRICE_HELP = f"USD per GPU hour (default: an assumption for each kind, of {PRICED})"
IMAGENET = 1_281_167
EPILOG = """\
The config is that of a training run (ibq/train_ar.py or ibq/train_tokenizer.py); its data is not opened, and
key.path=value after the options changes it, as there.

Without --gpus: the engine, micro-batch and recomputation to take on 1, 4 and 8 GPUs of every kind, days and money.
With it: every layout with the micro-batch of the config, then with the largest micro-batch that fits and divides the
batch; recomputation is the config's, and its own engine is marked with *.

Memory is that of the fullest moment of a step, from the table of tensors that each layer saves. Time rests on --mfu, an
assumption: the share of the GPU's dense bf16 rate at which all FLOPs run, those of recomputation too. Communication
of data parallelism runs beside the computation and counts where it takes longer; the rest is waited for. Money is days
times --price, for the steps alone.

examples:
  python tools/plan.py --config yaml/short/b.yaml --price 2.5
  python tools/plan.py --config yaml/short/b.yaml --gpu h100 --gpu 4090 --price h100=2.2 --price 4090=0.35
  python tools/plan.py --config yaml/xxl.yaml --gpus 96 --gpu h100
  python tools/plan.py --config yaml/xxl.yaml --gpus 8 --gpu a100-80 model.gradient_checkpointing=true
  python tools/plan.py --config yaml/tokenizer_262144.yaml --gpus 64 --gpu a100-40 --json plan.json
  python tools/plan.py --config yaml/b.yaml --gpus 4 --gpu-memory-gib 48 --gpu-tflops 181 --price 0.8
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


def check(config: TransformerPlan | TokenizerPlan, stage: Stage, own: Layout, machine: Machine) -> None:
    """UserError for a run that these GPUs cannot make."""
    batch, micro_batch = config.training.batch_size, config.training.micro_batch
    micro_batch = 1 if micro_batch == "auto" else micro_batch
    if batch % (own.data * micro_batch):
        raise UserError(
            f"--gpus {machine.gpus}: the batch of {batch} images does not divide into micro-batches of "
            f"{micro_batch} on {own.data} ranks; change --gpus, training.batch_size or training.micro_batch"
        )
    if own.tensor == 1:
        return
    sizes = stage.tensor_sizes()
    if not sizes:
        raise UserError("engine.tensor_parallel: this model cannot be split; set it to 1")
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
    add("--gpus", type=int, metavar="N", help="GPUs in all (default: what to take on 1, 4 and 8)")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs of a machine (default: %(default)s)")
    add("--gpu", choices=[*GPUS], action="append", help="may be repeated without --gpus (default: all; with it h100)")
    add("--gpu-memory-gib", type=float, metavar="X", help="memory of another GPU")
    add("--gpu-tflops", type=float, metavar="X", help="its dense bf16 rate in TFLOP/s")
    add("--price", action="append", default=[], metavar="X", help=f"{PRICE_HELP}; or KIND=X, repeatedly")
    add("--mfu", type=float, metavar="X", help="share of that rate; an assumption (default: as measured on one H100)")
    add("--reserve-gib", type=float, default=4.0, metavar="X", help="memory left free (default: %(default)s)")
    add("--images", type=int, default=IMAGENET, metavar="N", help="of an epoch (default: ImageNet's %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write everything here")
    add("overrides", nargs="*", metavar="key.path=value", help="changes of the config")
    arguments = parser.parse_args(argv)
    for name in ("gpus", "gpus_per_node", "gpu_memory_gib", "gpu_tflops", "images"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')}: {value} is not positive; give a number above 0")
    if arguments.mfu is not None and not 0 < arguments.mfu <= 1:
        raise UserError(f"--mfu: {arguments.mfu} is not a share; give a number above 0 and up to 1, such as 0.4")
    if arguments.reserve_gib < 0:
        raise UserError(f"--reserve-gib: {arguments.reserve_gib} is negative; give 0 or more")
    if arguments.gpus is not None and len(arguments.gpu or ()) > 1:
        raise UserError("--gpu: with --gpus one kind is looked at; give --gpu once")
    return arguments


def kinds_of(arguments: argparse.Namespace) -> list[Gpu]:
    """The kinds of GPU that the options describe, with their prices; UserError for a price that is none."""
    given = arguments.gpu or (["h100"] if arguments.gpus is not None else [*GPUS])
    kinds, other = [GPUS[name] for name in dict.fromkeys(given)], {}
    if arguments.gpu_memory_gib is not None:
        other["memory_gib"] = arguments.gpu_memory_gib
    if arguments.gpu_tflops is not None:
        other["flops"] = 1e12 * arguments.gpu_tflops
    if other:  # the bandwidths are those of a kind
        base = kinds[0] if arguments.gpu or arguments.gpus is not None else GPUS["h100"]
        kinds = [replace(base, name="other GPU", price=None, **other)]
    prices = {}
    for text in arguments.price:
        kind, _, number = text.rpartition("=")
        if kind and kind not in GPUS:
            raise UserError(f"--price: {text}: no such kind; write X or KIND=X with one of {', '.join(GPUS)}")
        try:
            prices[kind] = float(number)
        except ValueError:
            prices[kind] = -1.0
        if not 0 <= prices[kind] < math.inf:
            raise UserError(f"--price: {text}: is no price; give USD per GPU hour, such as 2.5 or h100=2.5")
    return [replace(gpu, price=prices.get(gpu.name, prices.get("", gpu.price))) for gpu in kinds]


def main(argv: Sequence[str] | None = None) -> None:
    """Plan as the command line says."""
    arguments = parse(argv)
    kinds = kinds_of(arguments)
    config = read_config(arguments.config, arguments.overrides)
    stage = stage_of(config)
    steps = config.training.total_steps(arguments.images / config.training.batch_size)
    assumed = {
        "gpus_per_node": arguments.gpus_per_node,
        "reserve": arguments.reserve_gib * GIB,
        "mfu": arguments.mfu or stage.measured_mfu,
    }
    common = {"source": arguments.config, "stage": stage, "steps": steps, "priced": bool(arguments.price)}
    if arguments.gpus is None:
        machines = [Machine(gpu=gpu, gpus=number, **assumed) for gpu in kinds for number in COUNTS]
        training = training_of(config, 1)
        proposals = [propose(stage, training, machine) for machine in machines]
        answer = Survey(**common, training=training, machines=machines, proposals=proposals)
        shown, written = survey_as_text(answer), survey_as_json(answer)
    else:
        answer = layouts_answer(config, Machine(gpu=kinds[0], gpus=arguments.gpus, **assumed), common)
        shown, written = as_text(answer), as_json(answer)
    print(shown)
    if arguments.json is not None:
        write_text(arguments.json, written)


def layouts_answer(config: TransformerPlan | TokenizerPlan, machine: Machine, common: Mapping[str, Any]) -> Answer:
    """The figures of every layout on these GPUs."""
    stage = common["stage"]
    own = layout_of(config.engine, stage, machine)
    check(config, stage, own, machine)
    training = training_of(config, 1)
    given = config.training.micro_batch
    rows = micro_batch_within(stage, own, training, machine.usable) or 1 if given == "auto" else given
    training = replace(training, micro_batch=rows)
    choices = [*layouts(stage, machine)]
    choices = [own if choice.name == own.name else choice for choice in choices]
    choices = choices if own in choices else [*choices, own]
    choices = [choice for choice in choices if training.batch_size % choice.data == 0]
    return Answer(**common, training=training, machine=machine, rows=plan(stage, training, machine, choices), own=own)


if __name__ == "__main__":
    exit_on_user_error(main)
