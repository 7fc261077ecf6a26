"""Sampling codes from the transformer: cached decoding, classifier-free guidance, top-k and top-p."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ibq.decoding import Decoder
from ibq.drawing import Drawing
from ibq.models.transformer import Transformer
from ibq.sampler import SamplerConfig

LARGEST_SEED = 2**63 - 1


def decoder_for(transformer: Transformer, config: SamplerConfig) -> Decoder:
    """What draws with these settings, for several calls of `sample_codes`."""
    return Decoder(transformer, config.precision, config.rows)


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
    return codes[: len(classes)].to("cpu", copy=True)  # the next block is drawn in the same place


def _sample_steps(
    decoder: Decoder, classes: Sequence[int], seeds: Sequence[int], config: SamplerConfig
) -> Iterator[Tensor]:
    """The codes [rows_per_block, T], the same tensor after each of the T draws; those to come are undefined."""
    if decoder.drawing is None or decoder.drawing.config != config:
        decoder.drawing = Drawing(decoder, config)
    drawing = decoder.drawing
    drawing.begin(classes, seeds)
    for position in range(decoder.config.num_tokens):
        drawing.advance(position)
        yield drawing.codes


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
