"""Sampling codes from the transformer: cached decoding, classifier-free guidance, top-k and top-p."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ibq.decoding import Decoder
from ibq.models.transformer import Transformer
from ibq.noise import uniforms
from ibq.sampler import SamplerConfig, check_filter

LARGEST_SEED = 2**63 - 1


def decoder_for(transformer: Transformer, config: SamplerConfig) -> Decoder:
    """What draws with these settings, for several calls of `sample_codes`."""
    return Decoder(transformer, config.precision, config.rows, compile_step=config.compile)


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits [..., V] with -inf where top-k, then top-p (nucleus, arXiv 1904.09751) filtering removes a code.

    Top-k keeps all that are at least the k-th largest (ties stay). Top-p keeps the likeliest codes up to and
    including the one with which they exceed the probability p, so at least one; of equal logits the lower
    code comes first.
    Errors: ValueError for a negative top_k or a top_p outside [0, 1].
    """
    check_filter(top_k, top_p)
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


@torch.inference_mode()
def sample_codes(
    transformer: Transformer | Decoder,
    classes: Sequence[int],
    seeds: Sequence[int],
    config: SamplerConfig,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Draw one image's codes per class and seed, [N, h, w] int64 on the CPU.

    An image depends on weights, class, seed and `config` only (on one device), never on the images it is drawn with:
    blocks have a fixed number of rows, and an image's random numbers are a function of its seed. Runs on the device of
    the weights. A transformer is made ready first, which takes a while for a large one: `decoder_for` does it once for
    many calls. `progress` is called with (images done, images) after every block.
    Errors: ValueError for classes or seeds out of range, or not one seed per class.
    """
    _check_request(transformer, classes, seeds)
    decoder = transformer if isinstance(transformer, Decoder) else decoder_for(transformer, config)
    blocks = [torch.empty(0, decoder.config.num_tokens, dtype=torch.int64, device="cpu")]
    for start in range(0, len(classes), config.rows_per_block):
        stop = min(start + config.rows_per_block, len(classes))
        blocks.append(_sample_block(decoder, classes[start:stop], seeds[start:stop], config))
        if progress is not None:
            progress(stop, len(classes))
    side = decoder.config.tokens_per_side
    codes = torch.cat(blocks).unflatten(1, (side, side))
    with torch.inference_mode(False):
        return codes.clone()  # an ordinary tensor


@torch.inference_mode()
def sample_rows(
    transformer: Transformer | Decoder, classes: Sequence[int], seeds: Sequence[int], config: SamplerConfig
) -> Iterator[Tensor]:
    """Draw one block of images and watch them grow: [n, r, w] int64 on the CPU after each row r = 1 ... h of codes.

    The last of them is what `sample_codes` gives for the same request.
    Errors, when the first row is asked for: those of `sample_codes`, and ValueError for more images than
    `rows_per_block`.
    """
    _check_request(transformer, classes, seeds)
    if not 0 < len(classes) <= config.rows_per_block:
        raise ValueError(f"classes: {len(classes)} images are not one block; give 1 to {config.rows_per_block}")
    decoder = transformer if isinstance(transformer, Decoder) else decoder_for(transformer, config)
    side = decoder.config.tokens_per_side
    for count, codes in enumerate(_sample_steps(decoder, classes, seeds, config), start=1):
        if count % side == 0:
            with torch.inference_mode(False):
                grown = codes[: len(classes), :count].cpu().unflatten(1, (-1, side)).clone()  # an ordinary tensor
            yield grown


def _sample_block(decoder: Decoder, classes: Sequence[int], seeds: Sequence[int], config: SamplerConfig) -> Tensor:
    """Codes [n, T] of up to `rows_per_block` images, decoded in exactly that many rows."""
    for codes in _sample_steps(decoder, classes, seeds, config):  # noqa: B007
        pass
    return codes[: len(classes)].cpu()


def _sample_steps(
    decoder: Decoder, classes: Sequence[int], seeds: Sequence[int], config: SamplerConfig
) -> Iterator[Tensor]:
    """The codes [rows_per_block, T], the same tensor after each of the T draws; those to come are undefined."""
    rows, device, tokens = config.rows_per_block, decoder.device, decoder.config.num_tokens
    rows_of_classes = [int(label) for label in classes] + [decoder.null_class] * (rows - len(classes))
    if config.guided:
        rows_of_classes += [decoder.null_class] * rows
    condition = decoder.condition(torch.tensor(rows_of_classes, device=device))
    cache, scales = decoder.new_cache(), config.scales(tokens)
    numbers = uniforms([*seeds] + [0] * (rows - len(seeds)), tokens, device)
    codes = torch.empty(rows, tokens, dtype=torch.int64, device=device)
    previous = None
    for position in range(tokens):
        logits = decoder.step(previous, condition, cache, position)
        if config.guided:
            cond, uncond = logits.chunk(2)
            logits = uncond + scales[position] * (cond - uncond)
        codes[:, position] = drawn = _draw(logits, numbers[:, position], config)
        previous = drawn.repeat(2) if config.guided else drawn
        yield codes


def _draw(logits: Tensor, numbers: Tensor, config: SamplerConfig) -> Tensor:
    """One code [R] per row of logits [R, V], with the row's random number of [R]."""
    if config.temperature == 0:
        return logits.argmax(-1)
    return pick(filter_logits(logits / config.temperature, config.top_k, config.top_p), numbers[:, None])[:, 0]


def pick(logits: Tensor, numbers: Tensor) -> Tensor:
    """Codes [R, n] from softmax(logits [R, V]), each where the cumulative probability passes its number of [R, n].

    numbers are float64 in (0, 1), and so are the sums: those of 262,144 float32 would lose the small probabilities.
    A code whose logit is -inf is never drawn.
    """
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cumulative, numbers * cumulative[:, -1:], right=True)


def _check_request(transformer: Transformer | Decoder, classes: Sequence[int], seeds: Sequence[int]) -> None:
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
