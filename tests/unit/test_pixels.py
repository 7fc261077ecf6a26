"""Pixels of codes: beside what draws them, and in blocks whose size is fixed."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from support.models import TOKENIZER

from ibq.config import parse_config
from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.ops.backend import image_format
from ibq.pixels import decode_in_blocks, pixels_of

SIZES = (5, 16, 1, 20)


def codes_and_tokenizer(device: str):
    torch.manual_seed(0)
    tokenizer = Tokenizer(parse_config(TokenizerConfig, TOKENIZER)).eval()
    tokenizer = tokenizer.to(device, memory_format=image_format(device)).requires_grad_(False)
    side = 16 // tokenizer.downsampling
    blocks = [torch.randint(tokenizer.quantizer.num_codes, (n, side, side), device=device) for n in SIZES]
    return blocks, tokenizer


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
        ),
    ],
)
def test_blocks_come_in_their_order(device, precision):
    blocks, tokenizer = codes_and_tokenizer(device)
    entered = []

    @contextmanager
    def timed():
        entered.append("in")
        yield
        entered.append("out")

    found = list(pixels_of(iter(blocks), tokenizer, precision, timed))
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        wanted = [decode_in_blocks(tokenizer, codes) for codes in blocks]
    assert entered == ["in", "out"] * len(SIZES)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == np.uint8 and ours.flags.c_contiguous
        assert np.array_equal(ours, theirs.permute(0, 2, 3, 1).numpy())


def test_no_block_and_an_empty_one():
    (codes, *_), tokenizer = codes_and_tokenizer("cpu")
    assert list(pixels_of([], tokenizer, "fp32")) == []
    assert [images.shape for images in pixels_of([codes[:0]], tokenizer, "fp32")] == [(0, 16, 16, 3)]
