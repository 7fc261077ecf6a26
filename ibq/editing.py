"""Editing: some codes of an image are kept, the others drawn anew to fit them (RAR's random orders make it possible).

What is kept comes first in the order that codes are predicted in, then the rest, both in raster order: so every code
that is drawn sees all that is kept. Guidance that changes over an image goes by the place in that order, and an image's
noise stays with the place in the picture.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ibq.models.transformer import TransformerConfig
from ibq.noise import send
from ibq.sampler import SamplerConfig


@dataclass(frozen=True, kw_only=True)
class Edit:
    """Codes [h, w] of one image for all that are drawn, or [N, h, w] of one for each; and which of them are kept.

    `keep`: bool [h, w], the same for all images. Kept codes stay bit by bit; pixels are decoded anew, and those beside
    what is drawn change a little with it.
    Errors: ValueError for wrong shapes and types, that begins with the field's name.
    """

    codes: Tensor
    keep: Tensor

    def __post_init__(self):
        if self.codes.ndim not in (2, 3) or self.codes.dtype != torch.int64:
            shape = list(self.codes.shape)
            raise ValueError(f"codes: {shape} of {self.codes.dtype}; give int64 codes [h, w] or [N, h, w]")
        if self.keep.dtype != torch.bool or tuple(self.keep.shape) != self.grid:
            expected = " x ".join(map(str, self.grid))
            given = f"{list(self.keep.shape)} of {self.keep.dtype}"
            raise ValueError(f"keep: {given}; give a bool mask of the {expected} codes, True where one is kept")
        for name in ("codes", "keep"):  # where the host looks at them
            object.__setattr__(self, name, getattr(self, name).cpu())

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the codes."""
        return tuple(self.codes.shape[-2:])

    @property
    def kept(self) -> int:
        """How many codes of an image are kept: the first of the order."""
        return int(self.keep.sum())

    @property
    def order(self) -> Tensor:
        """Raster indices [T] in the order in which codes are predicted."""
        return (~self.keep.flatten()).int().argsort(stable=True)

    def fitted(self, config: SamplerConfig, model: TransformerConfig, images: int) -> SamplerConfig:
        """The settings with the grid of the codes.

        Errors: ValueError for another grid or number of images, codes that the model does not know, and a model of
        raster order with a mask that is not the beginning.
        """
        if config.grid is not None and tuple(config.grid) != self.grid:
            shown = [" x ".join(map(str, grid)) for grid in (config.grid, self.grid)]
            raise ValueError(f"grid: {shown[0]} codes are to be drawn, but those to keep are {shown[1]}; give one grid")
        if self.codes.ndim == 3 and len(self.codes) != images:
            raise ValueError(f"codes: of {len(self.codes)} images, for {images} to be drawn; give one each, or [h, w]")
        low, high = (int(value) for value in self.codes.aminmax())
        if low < 0 or high >= model.vocab_size:
            raise ValueError(f"codes: {low} to {high} go beyond the model's 0 to {model.vocab_size - 1}; give its own")
        if model.order == "raster" and not self.keep.flatten()[: self.kept].all():
            raise ValueError(
                "keep: a model of raster order draws what comes after what it knows, so that only the first codes in "
                "raster order can be kept; for any other part train one with order: random"
            )
        return replace(config, grid=self.grid)

    def of(self, part: slice) -> "Edit":
        """That of some of the images."""
        return self if self.codes.ndim == 2 else replace(self, codes=self.codes[part])

    def in_order(self, rows: int) -> Tensor:
        """The codes [rows, T] as they are predicted; rows beyond the images are those of the last one."""
        codes = self.codes.reshape(-1, self.keep.numel())[:, self.order]
        return codes[torch.arange(rows).clamp_max(len(codes) - 1)]

    def in_raster(self, codes: Tensor) -> Tensor:
        """Codes [N, T] of that order as [N, h, w], a copy."""
        return codes[:, send(self.order.argsort(), codes.device)].unflatten(1, self.grid)
