"""The planner's arithmetic of heads and plain norms against what PyTorch counts and allocates."""

import pytest
import torch
from support import ROOT
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ibq.config import load_section
from ibq.engine.zero_setup import model_size
from ibq.models.heads import BitsHeadConfig, FactorisedHeadConfig, MaskedBitsHeadConfig, PlainHeadConfig
from ibq.models.transformer import Transformer, TransformerConfig
from ibq.models.transformer_blocks import Head
from ibq.scaling.hardware import GPUS
from ibq.scaling.layouts import Layout, Training
from ibq.scaling.memory import peak_memory
from ibq.scaling.networks import transformer_network
from ibq.scaling.plan import Machine, TransformerStage, layouts, rules
from ibq.scaling.transformer import (
    Numerics,
    block_kept,
    head_saved,
    inner_config,
    recomputed_blocks,
    root_saved,
    transformer_flops,
    transformer_parameters,
)
from ibq.scaling.transformer import model_size as planned_size

BATCH = 5
SMALL = {"vocab_size": 256, "num_classes": 5, "tokens_per_side": 4, "depth": 3, "heads": 4, "width": 64}
CASES = {
    "plain norms": {"adaln": False},
    "factorised": {"head": FactorisedHeadConfig(layers=3)},
    "factorised, plain norms": {"head": FactorisedHeadConfig(sub_codes=(4, 8, 8)), "adaln": False},
    "bits": {"head": BitsHeadConfig()},
    "masked bits": {"head": MaskedBitsHeadConfig()},
    "narrow masked bits": {"head": MaskedBitsHeadConfig(width=32, layers=1), "adaln": False},
}
PRECISIONS = {
    "float32": Numerics(stream=4, compute=4, root=4, device="cpu"),
    "autocast": Numerics(stream=4, compute=2, root=4, casts=True, device="cpu"),
    "bfloat16": Numerics(stream=2, compute=2, root=2, device="cpu"),
}


def textbook_loss(hidden, weight, targets):
    return F.cross_entropy(F.linear(hidden, weight), targets, reduction="none")


def counted(config: TransformerConfig) -> tuple[int, int]:
    """FLOPs of a forward and of its backward pass in the textbook form."""
    with torch.device("meta"):
        model = Transformer(config)
        for module in model.modules():
            if isinstance(module, Head):
                module.loss = textbook_loss
        codes, classes = torch.zeros(BATCH, config.num_tokens, dtype=torch.int64), torch.zeros(BATCH, dtype=torch.int64)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            loss = model(codes, classes).mean()
            forward = counter.get_total_flops()
            loss.backward()
            return forward, counter.get_total_flops() - forward


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_parameters_and_flops(settings):
    config = TransformerConfig(**SMALL, **settings)
    flops = transformer_flops(config)
    assert counted(config) == (BATCH * flops.forward, BATCH * flops.backward)
    with torch.device("meta"):
        model = Transformer(config)
    built = sum(p.numel() for p in model.parameters())
    assert transformer_parameters(config) == sum(TransformerStage(config).parameters().values()) == built
    assert planned_size(config) == model_size(model)


def test_recomputed_flops_of_the_inner_transformer():
    settings = {"head": FactorisedHeadConfig(layers=2), "adaln": False}
    plain, again = (TransformerConfig(**SMALL, **settings, gradient_checkpointing=on) for on in (False, True))
    found = counted(again)[1] - counted(plain)[1]
    assert found == BATCH * (transformer_flops(again).recomputed - transformer_flops(plain).recomputed)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CASES)
def test_what_is_saved(name, precision):
    """Of the small tensors of bits and of a masked head not all are in the table."""
    config = TransformerConfig(**{**SMALL, "tokens_per_side": 8}, **CASES[name])
    model, kind = Transformer(config), PRECISIONS[precision]
    model = model.bfloat16() if precision == "bfloat16" else model
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {tuple(p.shape) for p in model.parameters()} | {tuple(p.shape[::-1]) for p in model.parameters()}
    kept = {}

    def pack(tensor):
        is_copy = precision == "autocast" and tensor.dtype == torch.bfloat16 and tuple(tensor.shape) in shapes
        if tensor.untyped_storage().data_ptr() not in own and not tensor.is_complex() and not is_copy:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
        model(torch.zeros(BATCH, 64, dtype=torch.int64), torch.zeros(BATCH, dtype=torch.int64))
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    tensors = [*root_saved(config, kind), *head_saved(config, kind)]
    for part in filter(None, (config, inner_config(config))):
        for recomputed in recomputed_blocks(part):
            tensors += block_kept(part, kind, recomputed=recomputed)
    planned = BATCH * sum(tensor.bytes for tensor in tensors)
    assert found == pytest.approx(planned, rel=0.03 if "bits" in name else 2e-3)


@pytest.mark.parametrize("size", ["b", "l", "xl", "xxl"])
def test_a_factorised_head_of_262144_codes_takes_little(size):
    """Of the plan of one GPU and the same micro-batch: at most 0.7 of the plain head's memory, and fewer FLOPs."""
    config = load_section(TransformerConfig, ROOT / f"yaml/{size}_262144.yaml", "model")
    plain = load_section(TransformerConfig, ROOT / f"yaml/{size}.yaml", "model", ["vocab_size=262144"])
    assert config.head.kind == "factorised" and config.digits == (64, 4096) and plain.head == PlainHeadConfig()
    training = Training(precision="bf16", micro_batch=8, batch_size=8)
    layout, peaks = Layout(kind="local", gpus=1), []
    for model in (config, plain):
        peaks.append(
            peak_memory(transformer_network(model, layout, training), rules(layout, training), accumulated=False).total
        )
    if size == "b":
        flops = [transformer_flops(model) for model in (plain, config)]
        assert (flops[0].textbook + flops[0].recomputed) / (flops[1].textbook + flops[1].recomputed) > 1.5
        assert peaks[0] < 0.7 * peaks[1]
    assert peaks[0] < peaks[1]


def test_the_plan_offers_no_tensor_parallelism():
    stage = TransformerStage(TransformerConfig(**SMALL, head=BitsHeadConfig()))
    found = list(layouts(stage, Machine(gpus=4, gpu=GPUS["h100"])))
    assert all(layout.tensor == 1 for layout in found) and any(layout.kind == "zero" for layout in found)
