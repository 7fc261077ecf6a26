"""The planner's arithmetic against what PyTorch counts and allocates, and its command line."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ibq.config import load_config
from ibq.models.transformer import Transformer, TransformerConfig
from ibq.scaling.transformer import (
    Numerics,
    block_saved,
    head_saved,
    root_saved,
    transformer_flops,
    transformer_parameters,
)

YAML = Path(__file__).parent.parent / "yaml"
SMALL = {"vocab_size": 96, "num_classes": 5, "tokens_per_side": 4, "depth": 3, "heads": 4, "width": 64}
TRANSFORMERS = {
    "plain": {},
    "grouped": {"kv_heads": 2},
    "shared norms": {"shared_adaln": True, "tokens_per_side": 6},
}


def textbook_loss(hidden, weight, targets):
    return F.cross_entropy(F.linear(hidden, weight), targets, reduction="none")


def counted(call) -> tuple[int, int]:
    """FLOPs of a forward and of its backward pass."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = call()
        forward = counter.get_total_flops()
        loss.backward()
        return forward, counter.get_total_flops() - forward


@pytest.mark.parametrize("settings", TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_transformer_flops_are_those_of_the_textbook_form(settings):
    config = TransformerConfig(**{**SMALL, **settings})
    with torch.device("meta"):
        model = Transformer(config)
        model.head.loss = textbook_loss
        codes, classes = torch.zeros(2, config.tokens, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
        forward, backward = counted(lambda: model(codes, classes).mean())
    flops = transformer_flops(config)
    assert (forward, backward) == (2 * flops.forward, 2 * flops.backward)
    assert transformer_parameters(config) == sum(p.numel() for p in model.parameters())


SAVED = {"fp32": Numerics(stream=4, compute=4, root=4, device="cpu"), "autocast": Numerics(stream=4, compute=2, root=4, casts=True, device="cpu"), "bf16": Numerics(stream=2, compute=2, root=2, device="cpu")}

@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("precision", SAVED)
def test_saved(precision, dropout):
    names = ("residual_dropout", "ffn_dropout", "token_dropout")
    config = TransformerConfig(**{**SMALL, "tokens_per_side": 8, **dict.fromkeys(names, dropout)})
    model = Transformer(config)
    numerics = SAVED[precision]
    if precision == "bf16":
        model = model.bfloat16()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}
    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t
    B=5
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
        model(torch.zeros(B, config.tokens, dtype=torch.int64), torch.zeros(B, dtype=torch.int64))
    weights = {tuple(p.shape[::-1]) for p in model.parameters() if p.dim() == 2}
    total = 0
    for ptr, t in kept.items():
        if ptr in own or t.is_complex(): continue
        if numerics.casts and t.dtype == torch.bfloat16 and (tuple(t.shape) in weights) : continue
        total += t.untyped_storage().nbytes()
    expected = sum(s.bytes for s in block_saved(config, numerics)) * config.depth + sum(s.bytes for s in [*root_saved(config, numerics), *head_saved(config, numerics)])
    print(total, expected * B, total / expected / B)
    assert total == pytest.approx(expected * B, rel=0.005)
