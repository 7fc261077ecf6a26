"""Small models that several test files need, and their settings."""

import torch
from torch import Tensor

from ibq.decoding import Decoder
from ibq.models.transformer import Condition, Grid, Transformer, TransformerConfig
from support.training import CLASSES, CODES, SIDE

SMALL = {"vocab_size": 50, "num_classes": 5, "tokens_per_side": 4, "depth": 2, "heads": 4, "width": 32}
VARIANTS = {
    "plain": {},
    "grouped": {"kv_heads": 2},
    "one_kv_head": {"kv_heads": 1},
    "shared": {"shared_adaln": True},
    "shared_grouped": {"shared_adaln": True, "kv_heads": 2},
    "random": {"order": "random"},
}


def small_transformer(seed: int = 0, **overrides) -> Transformer:
    """A small transformer with every parameter random, so that every part matters."""
    transformer = Transformer(TransformerConfig(**(SMALL | overrides)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
            if "norm" in name and name.endswith("norm.weight"):
                parameter.add_(1.0)
    return transformer.eval()


def decoder_inputs(decoder: Decoder, condition: Condition, codes: Tensor, grid: Grid) -> list[Tensor]:
    """What every step takes for given codes [R, T] of a grid."""
    targets, inputs = decoder.target_rows(grid), [condition.embedding]
    if targets is not None:
        inputs = [condition.embedding + targets[0]]
    for position, previous in enumerate(codes.unbind(1)[:-1]):
        inputs.append(torch.empty_like(inputs[0]))
        decoder.embed(previous, targets, position, inputs[-1][None])
    return inputs


# Settings of models that go with the data of support/training.py.
TOKENIZER = {
    **{"resolution": 16, "channels": 32, "channel_multipliers": [1, 1, 1], "res_blocks": 1, "latent_channels": 16},
    **{"attention_resolutions": [], "quantizer": {"kind": "ibq", "num_codes": CODES, "dim": 16}},
}
TRANSFORMER = {
    "vocab_size": CODES,
    "num_classes": CLASSES,
    "tokens_per_side": SIDE,
    "depth": 2,
    "heads": 2,
    "width": 32,
}
