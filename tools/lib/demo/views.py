"""What the page of tools/demo.py shows, as functions of pictures and codes: no Gradio, no server."""

import html
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ibq.config import UserError
from ibq.data.transforms import decode_rgb, square, to_uint8, to_unit_range
from ibq.evaluation.reconstruction import CodeUsage, psnr
from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import SMALLEST_IMAGE
from ibq.quantizers.base import Quantizer

UPLOAD_MB, UPLOAD_MEGAPIXELS = 20, 40
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # Pillow has others that start programs
LARGEST = f"up to {UPLOAD_MB} MB and {UPLOAD_MEGAPIXELS} megapixels"
LIMITS = f"PNG, JPEG, WebP, GIF or BMP, {LARGEST}"
SHAPES = ("centre square", "whole picture")
SHOWN_SIDE = 256  # pixels: smaller pictures are enlarged to about this
GREY = 128  # of what is not there yet
ERROR_GAIN = 4
MOST_LISTED = 12  # codes in the table


# --- Uploads ---


def read_picture(path: str | Path) -> np.ndarray:
    """RGB pixels uint8 [H, W, 3] of an uploaded file; UserError for one that is too large or no picture."""
    try:
        size = Path(path).stat().st_size
        if size > UPLOAD_MB * 2**20:
            raise UserError(f"This file has {size / 2**20:.1f} MB. The page takes {LIMITS}.")
        image = decode_rgb(Path(path).read_bytes(), formats=FORMATS, max_pixels=UPLOAD_MEGAPIXELS * 1_000_000)
    except (ValueError, OSError, MemoryError) as error:
        raise UserError(f"This file cannot be shown: {error}. The page takes {LIMITS}.") from error
    return np.asarray(image)


def fitted(pixels: np.ndarray, shape: str, side: int, multiple: int) -> Tensor:
    """The picture [H, W, 3] as a tokenizer can take it: uint8 [3, h, w], both sides multiples of `multiple`.

    "centre square" has the side `side`, "whole picture" has it as its longer one and keeps the proportions but for the
    rounding to whole tokens.
    """
    from PIL import Image

    image = Image.fromarray(pixels)
    least = -(-SMALLEST_IMAGE // multiple) * multiple
    side = max(side // multiple * multiple, least)
    if shape == SHAPES[0]:
        array = square(image, side)
    else:
        scale = side / max(image.size)
        size = tuple(max(round(length * scale / multiple) * multiple, least) for length in image.size)
        array = np.asarray(image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC))
    return torch.from_numpy(array.copy()).permute(2, 0, 1)


# --- Reconstruction ---


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """A picture and what the tokenizer makes of it."""

    original: Tensor  # uint8 [3, H, W]
    result: Tensor  # uint8 [3, H, W]
    codes: Tensor  # int64 [h, w]
    num_codes: int

    @property
    def psnr(self) -> float:
        """Closeness in dB; inf for an exact copy."""
        return float(psnr(self.original[None], self.result[None])[0])

    @property
    def error(self) -> Tensor:
        """uint8 [3, H, W]: black where both are equal, their difference times ERROR_GAIN elsewhere."""
        difference = (self.original.int() - self.result.int()).abs()
        return (difference * ERROR_GAIN).clamp_max(255).to(torch.uint8)

    @property
    def counts(self) -> list[tuple[int, int]]:
        """(code, how often it occurs) of the codes in use, the most used first; of equally used ones the lower."""
        codes, counts = self.codes.unique(return_counts=True)
        order = counts.argsort(descending=True, stable=True)
        return list(zip(codes[order].tolist(), counts[order].tolist(), strict=True))

    @property
    def perplexity(self) -> float:
        """exp of the entropy of the picture's codes: as many equally frequent ones would carry as much."""
        _, places = self.codes.unique(return_inverse=True)
        usage = CodeUsage(int(places.max()) + 1)
        usage.add(places)
        return usage.figures()["perplexity"]


@torch.inference_mode()
def reconstruct(tokenizer: Tokenizer, pixels: Tensor) -> Reconstruction:
    """What the tokenizer makes of uint8 pixels [3, H, W]."""
    device = next(tokenizer.parameters()).device
    codes = tokenizer.encode(to_unit_range(pixels[None]).to(device))  # [1, h, w]
    result = to_uint8(tokenizer.decode(codes))[0].cpu()
    return Reconstruction(original=pixels, result=result, codes=codes[0].cpu(), num_codes=tokenizer.quantizer.num_codes)


# --- Codes ---


@torch.inference_mode()
def code_colours(quantizer: Quantizer) -> Callable[[Tensor], Tensor]:
    """A function codes [...] -> colours uint8 [..., 3], the same for a codebook each time.

    Similar codes get similar colours: red, green and blue are a code's ranks along the codebook's first three principal
    components.
    """
    table = principal_colours(quantizer.code_vectors().float().cpu())
    return lambda codes: table[codes]


def principal_colours(vectors: Tensor) -> Tensor:
    """uint8 [K, 3] for vectors [K, D]: their ranks along the first three principal components, as brightness 0 to 255.

    Directions that the vectors do not have (fewer than three dimensions) give a middle brightness.
    """
    count = len(vectors)
    centred = vectors - vectors.mean(dim=0)
    _, directions = torch.linalg.eigh((centred.T @ centred).double())
    axes = directions.flip(1)[:, :3].to(vectors.dtype)  # [D, up to 3], the largest variance first
    # Eigenvectors have no sign of their own: the same codebook should have the same colours on every machine.
    largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))
    places = (centred @ (axes * largest.sign())).argsort(dim=0, stable=True).argsort(dim=0)
    colours = torch.full((count, 3), GREY, dtype=torch.uint8)
    colours[:, : places.shape[1]] = (places * 255 // max(count - 1, 1)).to(torch.uint8)
    return colours


# --- Samples ---


@torch.inference_mode()
def unfinished(tokenizer: Tokenizer, codes: Tensor, side: int) -> Tensor:
    """uint8 images [N, 3, H, W] of the first rows of codes [N, r, w] of a grid with `side` rows; the rest is grey.

    The decoder sees the last row in place of those to come, so that it draws no edge there.
    """
    device = next(tokenizer.parameters()).device
    rows = codes.shape[1]
    filled = torch.cat([codes, codes[:, -1:].expand(-1, side - rows, -1)], dim=1)
    images = to_uint8(tokenizer.decode(filled.to(device))).cpu()
    images[:, :, rows * tokenizer.downsampling :] = GREY
    return images


def sheet(images: Tensor, gap: int = 4) -> np.ndarray:
    """Images [N, 3, H, W] beside and below each other as one picture uint8 [h, w, 3], see `enlarged`."""
    scaled = [enlarged(image) for image in images]
    columns = -(-len(scaled) // max(1, int(len(scaled) ** 0.5)))
    height, width = scaled[0].shape[0] + gap, scaled[0].shape[1] + gap
    page = np.full((-(-len(scaled) // columns) * height - gap, columns * width - gap, 3), 255, np.uint8)
    for number, image in enumerate(scaled):
        top, left = number // columns * height, number % columns * width
        page[top : top + image.shape[0], left : left + image.shape[1]] = image
    return page


def enlarged(pixels: Tensor, least: int = SHOWN_SIDE) -> np.ndarray:
    """uint8 [h, w, 3] of pixels [3, H, W]; those of a small picture become squares, so that it has about `least`."""
    factor = max(1, round(least / max(pixels.shape[-2:])))
    array = pixels.permute(1, 2, 0).numpy()
    return array.repeat(factor, axis=0).repeat(factor, axis=1)


# --- Text ---


def figures(made: Reconstruction) -> str:
    """The figures of a reconstruction as Markdown."""
    (height, width), (rows, columns) = made.original.shape[-2:], made.codes.shape
    distinct = len(made.counts)
    return (
        f"**{made.psnr:.2f} dB** PSNR · {width} x {height} pixels as {columns} x {rows} = {rows * columns:,} tokens · "
        f"**{distinct:,} of {made.num_codes:,}** codes in use ({distinct / made.num_codes:.1%}) · "
        f"perplexity {made.perplexity:.1f}"
    )


def code_table(made: Reconstruction, colours: Callable[[Tensor], Tensor]) -> str:
    """The most used codes as an HTML table: colour in the map, number, how often, and a bar."""
    counts, tokens = made.counts, made.codes.numel()
    shown = counts[:MOST_LISTED]
    swatches = colours(torch.tensor([code for code, _ in shown])).tolist()
    rows = []
    for (code, count), (red, green, blue) in zip(shown, swatches, strict=True):
        colour, width = f"rgb({red},{green},{blue})", 100 * count / shown[0][1]
        bar = f'<div class="bar" style="width:{width:.0f}%;background:{colour}"></div>'
        rows.append(
            f'<tr><td><span class="swatch" style="background:{colour}"></span></td><td>{code}</td><td>{count}</td>'
            f"<td>{count / tokens:.1%}</td><td>{bar}</td></tr>"
        )
    if rest := counts[MOST_LISTED:]:
        total = sum(count for _, count in rest)
        rows.append(
            f"<tr><td></td><td>{len(rest):,} others</td><td>{total}</td><td>{total / tokens:.1%}</td><td></td></tr>"
        )
    head = "<tr><th></th><th>code</th><th>times</th><th>of the tokens</th><th></th></tr>"
    return f'<table class="codes">{head}{"".join(rows)}</table>'


def class_choices(names: list[str] | None, num_classes: int) -> list[tuple[str, int]]:
    """(what is shown, class) for each class, and for none."""
    shown = [f"{i}  {names[i]}" if names else str(i) for i in range(num_classes)]
    return [*((text, i) for i, text in enumerate(shown)), ("no class", num_classes)]


def escaped(text: str) -> str:
    """Text that Markdown and HTML leave as it is."""
    return html.escape(text).replace("_", "&#95;").replace("*", "&#42;").replace("`", "&#96;")
