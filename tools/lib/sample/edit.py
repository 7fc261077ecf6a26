"""The part of a picture that is drawn anew, as tools/sample.py and the page of tools/demo.py are told of it."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ibq.config import UserError
from ibq.data.transforms import decode_rgb, square
from ibq.editing import Edit
from ibq.models.tokenizer import Tokenizer
from ibq.models.transformer import TransformerConfig
from ibq.pixels import codes_of
from ibq.sampler import SamplerConfig

Box = tuple[int, int, int, int]
WHITE = 127  # what is lighter is white


@dataclass(frozen=True, kw_only=True)
class EditOptions:
    """A picture, and which part of it is drawn anew; a token is, if any pixel of it is.

    Errors: ValueError that begins with the field's name.
    """

    image: Path | None = field(
        default=None, metadata={"help": "keep this picture but for a part (--mask or --box)", "metavar": "FILE"}
    )
    mask: Path | None = field(
        default=None,
        metadata={"help": "with --image: a picture, white where it is drawn anew", "metavar": "FILE"},
    )
    box: Box | None = field(
        default=None,
        metadata={
            "help": "with --image: what is drawn anew, in pixels of the images that are drawn",
            "metavar": ("TOP", "LEFT", "BOTTOM", "RIGHT"),
        },
    )

    def __post_init__(self):
        for name in ("mask", "box"):
            if getattr(self, name) is not None and self.image is None:
                raise ValueError(f"{name}: is a part of a picture; give that by --image")
        if self.image is not None and (self.mask is None) == (self.box is None):
            raise ValueError("image: needs what is drawn anew, either by --mask or by --box")
        if self.box is not None:
            top, left, bottom, right = self.box
            if not (0 <= top < bottom and 0 <= left < right):
                raise ValueError(f"box: {' '.join(map(str, self.box))} holds no pixel; give TOP LEFT BOTTOM RIGHT")


def edit_of(
    options: EditOptions, sampler: SamplerConfig, tokenizer: Tokenizer, transformer: TransformerConfig
) -> Edit | None:
    """What the options mean for images of the sampler's grid; None without a picture.

    UserError that names the option for files that are no pictures, boxes beyond the image, and parts that the
    transformer cannot draw.
    """
    if options.image is None:
        return None
    part = "mask" if options.box is None else "box"
    try:
        size = tuple(side * tokenizer.downsampling for side in sampler.grid)
        codes = codes_of(tokenizer, torch.from_numpy(picture(options.image, size, "image")).permute(2, 0, 1)[None])[0]
        edit = Edit(codes=codes, keep=~tokens_of(anew(options, size), tokenizer.downsampling))
        if edit.keep.all():
            raise ValueError(f"mask: {options.mask} is nowhere white, so that nothing is drawn; white is drawn anew")
        edit.fitted(sampler, transformer, 1)
    except ValueError as error:
        name, _, problem = str(error).partition(":")
        raise UserError(f"--{part if name == 'keep' else name}:{problem}") from error
    return edit


def anew(options: EditOptions, size: tuple[int, int]) -> Tensor:
    """bool [H, W]: the pixels that are drawn anew."""
    if options.box is None:
        return torch.from_numpy(picture(options.mask, size, "mask")).amax(-1) > WHITE
    top, left, bottom, right = options.box
    if bottom > size[0] or right > size[1]:
        shown = " ".join(map(str, options.box))
        raise ValueError(f"box: {shown} goes beyond the image of {size[0]} x {size[1]} (--grid and --size change it)")
    pixels = torch.zeros(size, dtype=torch.bool)
    pixels[top:bottom, left:right] = True
    return pixels


def tokens_of(pixels: Tensor, side: int) -> Tensor:
    """bool [h, w]: the tokens of `side` pixels that have any of bool pixels [H, W]."""
    return pixels.unflatten(0, (-1, side)).unflatten(2, (-1, side)).any(dim=3).any(dim=1)


def picture(path: Path, size: tuple[int, int], option: str) -> np.ndarray:
    """RGB pixels uint8 [H, W, 3] of a file, cut to the proportions of a size (height, width) and scaled to it."""
    try:
        return square(decode_rgb(path.read_bytes()), size).copy()
    except (OSError, ValueError) as error:
        raise ValueError(f"{option}: {path} is no picture that can be read ({error})") from error
