"""Pixels of codes: in blocks of a fixed size, and on a GPU while the next codes are drawn."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from ibq.data.transforms import to_uint8, to_unit_range
from ibq.models.tokenizer import Tokenizer
from ibq.ops.backend import own_stream
from ibq.sampler import Precision

BLOCK = 16  # images that are decoded together


@torch.no_grad()
def decode_in_blocks(tokenizer: Tokenizer, codes: Tensor, block: int = BLOCK) -> Tensor:
    """uint8 images [N, 3, H, W] on the CPU of codes [N, h, w], decoded in padded blocks of a fixed size.

    Matrix products round differently for different batch shapes; in fixed blocks an image does not depend on its
    company.
    """
    return _decoded(tokenizer, codes, block).cpu()


@torch.no_grad()
def codes_of(tokenizer: Tokenizer, images: Tensor) -> Tensor:
    """Codes [N, h, w] on the CPU of uint8 images [N, 3, H, W], one at a time: none depends on its company."""
    device = next(tokenizer.parameters()).device
    return torch.cat([tokenizer.encode(to_unit_range(image[None]).to(device)).cpu() for image in images])


def pixels_of(
    blocks: Iterable[Tensor],
    tokenizer: Tokenizer,
    precision: Precision,
    timed: Callable[[], AbstractContextManager] = nullcontext,
) -> Iterator[np.ndarray]:
    """uint8 images [n, H, W, 3] of each block of codes [n, h, w], in order.

    On CUDA they are decoded on a stream of their own, and given once the next block's codes are on their way: so the
    host prepares work for the device, and writes files, while the device is busy. `timed` is entered around decoding.
    """
    device = next(tokenizer.parameters()).device
    if device.type != "cuda":
        for codes in blocks:
            with timed():
                images = _images(tokenizer, codes, precision)
            yield images.numpy()
        return
    stream, started = own_stream("pixels", device), deque()
    for drawn in blocks:
        codes = drawn.to(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        codes.record_stream(stream)
        with torch.cuda.stream(stream):
            with timed():
                images = _images(tokenizer, codes, precision)
            copied = torch.empty(images.shape, dtype=torch.uint8, pin_memory=True).copy_(images, non_blocking=True)
            started.append((copied, stream.record_event()))
        if len(started) > 1:
            yield _copied(*started.popleft())
    while started:
        yield _copied(*started.popleft())


def _copied(images: Tensor, done: torch.cuda.Event) -> np.ndarray:
    done.synchronize()
    return images.numpy()


@torch.no_grad()
def _images(tokenizer: Tokenizer, codes: Tensor, precision: Precision) -> Tensor:
    """[n, H, W, 3] on the device."""
    device = next(tokenizer.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=precision != "fp32"):
        return _decoded(tokenizer, codes, BLOCK).permute(0, 2, 3, 1).contiguous()


def _decoded(tokenizer: Tokenizer, codes: Tensor, block: int) -> Tensor:
    """[N, 3, H, W] on the device of the tokenizer."""
    device = next(tokenizer.parameters()).device
    height, width = (side * tokenizer.downsampling for side in codes.shape[1:])
    images = [torch.empty(0, tokenizer.config.in_channels, height, width, dtype=torch.uint8, device=device)]
    for start in range(0, len(codes), block):
        part = codes[start : start + block]
        padded = torch.cat([part, part[:1].expand(block - len(part), -1, -1)])
        images.append(to_uint8(tokenizer.decode(padded.to(device)))[: len(part)])
    return torch.cat(images)
