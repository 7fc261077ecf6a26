"""Checkpoints of LlamaGen's tokenizers VQ-16 and VQ-8 (arXiv 2406.06525), read and written.

Their network is VQGAN's with attention at the lowest resolution alone, their quantizer the nearest of unit vectors:
names are all that differs. A file holds its tensors under `model`, and the averaged ones under `ema` where the run kept
averages; the published files have one set. LlamaGen's transformers, which have no adaptive norms, are not read.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ibq.interop.lightning_tokenizer import Weights
from ibq.interop.published import Hints, Published, require_config, require_settings
from ibq.interop.reference_tensors import count_numbered, encoder_sizes, read_file, shape_of, table_of
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.quantizers import VQConfig

CODEBOOK, REFERENCE_CODEBOOK = "quantizer.codebook", "quantize.embedding.weight"
CODES_SEEN, CODES_SEEN_SIZE = "quantize.codebook_used", 65_536  # the last codes of the training: nothing of the model
MIDDLE = ("block_1", "attn_1", "block_2")
BLOCKS = {"res": "block", "attn": "attn"}
RESOLUTION = 256  # pixels that the published figures are of; 384 and 512 are also published of the same weights
FIXED = {"network": "vqgan", "channels": 128, "res_blocks": 2, "norm_groups": 32, "in_channels": 3}
FIXED |= {"quantizer.kind": "vq", "quantizer.normalize": "vectors", "quantizer.projector": None}


def read(path: str | Path, weights: Weights = "ema", hints: Hints = Hints()) -> list[Published]:  # noqa: B008 (frozen)
    """The tokenizer of a checkpoint. ValueError that names every missing, unexpected or wrongly shaped tensor.

    A file with one set of weights gives it, whichever is asked for.
    """
    if hints.arguments is not None:
        raise ValueError(f"{path}: the shapes of LlamaGen's tensors say all; leave the configuration out")
    checkpoint, source = read_file(path), str(path)
    kept = "ema" if "ema" in checkpoint and (weights == "ema" or "model" not in checkpoint) else "raw"
    state = table_of(checkpoint, path, "ema" if kept == "ema" else "model", "state_dict")
    if any(name.startswith("layers.") for name in state):
        raise ValueError(
            f"{source}: is a transformer of LlamaGen, which has no adaptive norms and names that are not read here; "
            "give a tokenizer's file"
        )
    state.pop(CODES_SEEN, None)
    levels = count_numbered(state, r"encoder\.conv_blocks\.(\d+)\.")
    tensors = {our_name(name, levels): value for name, value in state.items()}
    try:
        config = infer_config(tensors, hints.resolution or RESOLUTION)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    require_config(config, tensors, source, lambda name: reference_name(name, levels))
    return [Published(config=config, tensors=tensors, weights=kept)]


def infer_config(tensors: Mapping[str, Tensor], resolution: int = RESOLUTION) -> TokenizerConfig:
    """The configuration that the shapes of a tokenizer's weights (our names) imply; ValueError for a missing one."""

    levels = count_numbered(tensors, r"encoder\.down\.(\d+)\.block\.")

    def shape(name: str, dimensions: int = 4) -> torch.Size:
        return shape_of(tensors, name, dimensions, reference_name(name, levels))

    num_codes, dim = shape(CODEBOOK, 2)
    return TokenizerConfig(
        **encoder_sizes(tensors, shape),
        resolution=resolution,
        attention_resolutions=(resolution // 2 ** (levels - 1),),
        quantizer=VQConfig(num_codes=num_codes, dim=dim, normalize="vectors", beta_weighs="commitment"),
    )


def write_tokenizer(config: TokenizerConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LlamaGen's table of a tokenizer, to be saved under `model`. ValueError where its code has no such tokenizer."""
    require_settings(config, FIXED, "LlamaGen")
    levels = len(config.channel_multipliers)
    attention = [level for level in range(levels) if config.has_attention(level)]
    if attention != [levels - 1]:
        raise ValueError(
            "attention_resolutions: LlamaGen has attention at the lowest resolution alone; export .safetensors"
        )
    state = {reference_name(name, levels): value for name, value in tensors.items()}
    return state | {CODES_SEEN: torch.zeros(CODES_SEEN_SIZE)}


def our_name(name: str, levels: int) -> str:
    """Our name of one of LlamaGen's tensors; a name that is not LlamaGen's comes back as it is."""
    return _renamed(name, ((theirs, ours) for ours, theirs in _prefixes(levels)))


def reference_name(name: str, levels: int) -> str:
    """LlamaGen's name of one of our tensors: the inverse of `our_name`."""
    return _renamed(name, _prefixes(levels))


def _renamed(name: str, prefixes: Iterable[tuple[str, str]]) -> str:
    return next((new + name.removeprefix(old) for old, new in prefixes if name.startswith(old)), name)


def _prefixes(levels: int) -> Iterator[tuple[str, str]]:
    """What names begin with, here and there; the longer ones first.

    The decoder's levels are numbered from the lowest resolution there, from the highest here.
    """
    yield CODEBOOK, REFERENCE_CODEBOOK
    for part in ("encoder", "decoder"):
        yield from ((f"{part}.mid.{name}.", f"{part}.mid.{number}.") for number, name in enumerate(MIDDLE))
    for level in range(levels):
        places = {"encoder": f"encoder.down.{level}.", "decoder": f"decoder.up.{levels - 1 - level}."}
        for part, ours in places.items():
            theirs = f"{part}.conv_blocks.{level}."
            yield from ((f"{ours}{block}.", f"{theirs}{name}.") for name, block in BLOCKS.items())
            yield ours, theirs
