"""Sampling codes from the transformer: cached decoding, classifier-free guidance, top-k and top-p."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ibq.models.transformer import Transformer

LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How codes are drawn.

    `guidance_scale` s gives the logits uncond + s * (cond - uncond) (arXiv 2207.12598); 1.0 is no guidance
    and costs half. `temperature` 0 takes the likeliest code; `top_k` 0 and `top_p` 1.0 are off.
    `rows_per_block` images are decoded together, the last block padded: more is faster per image and takes
    more memory; another number may round differently. Errors: ValueError for values out of range.
    """

    guidance_scale: float = 2.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    rows_per_block: int = 16

    def __post_init__(self):
        if not 0.0 <= self.guidance_scale < float("inf"):
            raise ValueError(f"guidance_scale: {self.guidance_scale} is out of range; use 1 (off) or more")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: {self.temperature} is out of range; use 0 (greedy) or more")
        if self.rows_per_block < 1:
            raise ValueError(f"rows_per_block: {self.rows_per_block} is out of range; use at least 1")
        _check_filter(self.top_k, self.top_p)


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits [..., V] with -inf where top-k, then top-p (nucleus, arXiv 1904.09751) filtering removes a code.

    Top-k keeps all that are at least the k-th largest (ties stay). Top-p keeps the likeliest codes up to and
    including the one with which they exceed the probability p, so at least one; of equal logits the lower
    code comes first.
    Errors: ValueError for a negative top_k or a top_p outside [0, 1].
    """
    _check_filter(top_k, top_p)
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        before = ordered.softmax(-1).cumsum(-1).roll(1, dims=-1)
        before[..., 0] = 0.0  # the likeliest code always stays
        removed = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before > top_p)
        logits = logits.masked_fill(removed, -torch.inf)
    return logits


@torch.no_grad()
def sample_codes(
    transformer: Transformer,
    classes: Sequence[int],
    seeds: Sequence[int],
    config: SamplerConfig,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Draw one image's codes per class and seed, [N, h, w] int64 on the CPU.

    An image depends on weights, class, seed and `config` only (on one device, in one precision), never on
    the images it is drawn with: blocks have a fixed number of rows, and every image has its own noise. Runs
    on the device of the weights, under the caller's autocast, in eval mode (the mode is restored).
    `progress` is called with (images done, images) after every block.
    Errors: ValueError for classes or seeds out of range, or not one seed per class.
    """
    _check_request(transformer, classes, seeds)
    was_training = transformer.training
    transformer.eval()
    try:
        blocks = [torch.empty(0, transformer.config.tokens, dtype=torch.int64, device="cpu")]
        for start in range(0, len(classes), config.rows_per_block):
            stop = min(start + config.rows_per_block, len(classes))
            blocks.append(_sample_block(transformer, classes[start:stop], seeds[start:stop], config))
            if progress is not None:
                progress(stop, len(classes))
    finally:
        transformer.train(was_training)
    side = transformer.config.tokens_per_side
    return torch.cat(blocks).unflatten(1, (side, side))


def _sample_block(
    transformer: Transformer, classes: Sequence[int], seeds: Sequence[int], config: SamplerConfig
) -> Tensor:
    """Codes [n, T] of up to `rows_per_block` images, decoded in exactly that many rows."""
    rows, device = config.rows_per_block, transformer.head.weight.device
    guided = config.guidance_scale != 1.0
    rows_of_classes = [int(label) for label in classes] + [transformer.null_class] * (rows - len(classes))
    if guided:
        rows_of_classes += [transformer.null_class] * rows
    condition = transformer.condition(torch.tensor(rows_of_classes, device=device))
    cache = transformer.new_cache(len(rows_of_classes), _compute_dtype(transformer), device)
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    codes = torch.empty(rows, transformer.config.tokens, dtype=torch.int64, device=device)
    previous = None
    for position in range(transformer.config.tokens):
        logits = transformer.decode_step(previous, condition, cache, position)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if guided:
            cond, uncond = logits.chunk(2)
            logits = uncond + config.guidance_scale * (cond - uncond)
        codes[:, position] = drawn = _draw(logits, generators, config)
        previous = drawn.repeat(2) if guided else drawn
    return codes[: len(classes)].cpu()


def _draw(logits: Tensor, generators: Sequence[torch.Generator], config: SamplerConfig) -> Tensor:
    """One code per row of logits [R, V]; rows without a generator are padding and get the likeliest one."""
    if config.temperature == 0:
        return logits.argmax(-1)
    logits = filter_logits(logits / config.temperature, config.top_k, config.top_p)
    # argmax(p / e) with exponential e draws from p; on log scale small probabilities do not underflow.
    noise = torch.ones(logits.shape, device="cpu", pin_memory=logits.is_cuda)
    for row, generator in zip(noise, generators, strict=False):
        row.exponential_(generator=generator)
    noise = noise.to(logits.device, non_blocking=True).clamp_min(torch.finfo(noise.dtype).tiny)
    return (logits - noise.log()).argmax(-1)


def _compute_dtype(transformer: Transformer) -> torch.dtype:
    """The precision that keys and values come in: that of autocast where it is on, else of the weights."""
    weight = transformer.head.weight
    if weight.dtype == torch.float32 and torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def _check_request(transformer: Transformer, classes: Sequence[int], seeds: Sequence[int]) -> None:
    if len(classes) != len(seeds):
        raise ValueError(f"seeds: {len(seeds)} for {len(classes)} classes; give one seed per image")
    for label in classes:
        if not 0 <= label <= transformer.null_class:
            raise ValueError(
                f"classes: {label} is out of range; use 0 to {transformer.null_class - 1}, "
                f"or {transformer.null_class} for no class"
            )
    for seed in seeds:
        if not 0 <= seed <= LARGEST_SEED:
            raise ValueError(f"seeds: {seed} is out of range; use 0 to {LARGEST_SEED}")


def _check_filter(top_k: int, top_p: float) -> None:
    if top_k < 0:
        raise ValueError(f"top_k: {top_k} is negative; use 0 (off) or more")
    if not 0.0 <= top_p <= 1.0:
        raise ValueError(f"top_p: {top_p} is not a probability; use 0 to 1 (off)")
