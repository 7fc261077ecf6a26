"""Images of any size through a tokenizer: large maps of features wait in main memory, and the device sees their tiles.

Exact up to rounding, so there are no seams: a convolution is made tile by tile with the cells around the tile that it
sees, and a group normalization takes mean and variance over the whole map. Maps that are no larger than a tile, where
the attention and the quantizer are, go through the network as they are.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ibq.models import open_magvit2, vqgan
from ibq.models.tokenizer import Tokenizer

Cells = tuple[slice, slice]  # rows and columns of a map


@torch.no_grad()
def reconstruct(
    tokenizer: Tokenizer, images: Tensor, tile: int | None = None, folder: str | Path | None = None
) -> tuple[Tensor, Tensor]:
    """Images [B, 3, H, W] in [-1, 1] of any size -> (reconstructions of that size, codes [B, h, w]), on the CPU.

    Sides that are no multiples of the downsampling are filled up by the last row and column, and cut again. With
    `tile`, maps with a side of more than so many cells are made in tiles, and kept in files of `folder` if there is
    one. ValueError for a tile of fewer than 16 cells.
    """
    height, width = images.shape[2:]
    factor = tokenizer.downsampling
    images = F.pad(images, (0, -width % factor, 0, -height % factor), mode="replicate")
    if tile is None:
        codes = tokenizer.encode(images.to(next(tokenizer.parameters()).device))
        found = tokenizer.decode(codes)
    else:
        codes = encode_tiled(tokenizer, images, tile, folder)
        found = decode_tiled(tokenizer, codes, tile, folder)
    return found[..., :height, :width].cpu(), codes.cpu()


@torch.no_grad()
def encode_tiled(tokenizer: Tokenizer, images: Tensor, tile: int, folder: str | Path | None = None) -> Tensor:
    """`Tokenizer.encode` in tiles: codes [B, h, w] of images [B, 3, H, W] on any device."""
    tokenizer.check_images(images)
    with Tiles(next(tokenizer.parameters()).device, tile, folder) as run:
        encoder = tokenizer.encoder
        h = run(encoder.conv_in, images)
        for part in encoder.units():
            h = run(part, h)
        h = run.convolved(h, encoder.conv_out, encoder.norm_out)
        return tokenizer.quantizer.encode(run(tokenizer.quant_conv, h).to(run.device))


@torch.no_grad()
def decode_tiled(tokenizer: Tokenizer, codes: Tensor, tile: int, folder: str | Path | None = None) -> Tensor:
    """`Tokenizer.decode` in tiles: images [B, 3, H, W] of codes [B, h, w]."""
    with Tiles(next(tokenizer.parameters()).device, tile, folder) as run:
        latents = tokenizer.quantizer.lookup(codes.to(run.device))
        decoder = tokenizer.decoder
        h = run(decoder.conv_in, run(tokenizer.post_quant_conv, latents))
        for part in decoder.in_order():
            h = run.adapted(part, h, latents) if isinstance(part, open_magvit2.AdaptiveGroupNorm) else run(part, h)
        return run.convolved(h, decoder.conv_out, decoder.norm_out).clone()  # the files go away


class Tiles:
    """Runs modules of the tokenizers' networks on maps [B, C, H, W], tile by tile where a side exceeds `tile` cells.

    A map that a module is given is its own to overwrite.
    """

    def __init__(self, device: torch.device, tile: int, folder: str | Path | None = None):
        if tile < 16:
            raise ValueError(f"tile: must be at least 16 cells, got {tile}")
        self.device, self.tile = device, tile
        self._folder = None if folder is None else TemporaryDirectory(dir=folder, prefix="ibq-tiles-")
        self._files = 0

    def __enter__(self) -> "Tiles":
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        """What the module makes of a map; where both fit into a tile, as a whole on the device."""
        if not self._large(x) and not (_doubles(module) and 2 * max(x.shape[2:]) > self.tile):
            return module(x.to(self.device))
        match module:
            case vqgan.Level() | vqgan.Middle():
                for part in module.in_order():
                    x = self(part, x)
                return x
            case vqgan.ResBlock():
                return self._res_block(module, x)
            case vqgan.Downsample():
                return self.convolved(x, module.conv, padding=0)
            case vqgan.Upsample():
                return self.convolved(x, module.conv, doubled=True)
            case open_magvit2.DepthToSpace():
                return self.convolved(x, module.conv1, after=module.to_space, growth=2)
            case nn.Conv2d():
                return self.convolved(x, module, padding=module.padding[0])
            case _:  # attention sees everything
                return self._kept(module(x.to(self.device)))

    def convolved(
        self,
        x: Tensor,
        conv: nn.Conv2d,
        norm: nn.GroupNorm | None = None,
        *,
        padding: int | None = None,
        doubled: bool = False,
        after: Callable[[Tensor], Tensor] | None = None,
        growth: int = 1,
        added_to: Tensor | None = None,
    ) -> Tensor:
        """conv(silu(norm(x))), or conv(x), or with `doubled` conv of x at twice its size.

        `padding` is that above and on the left (default: the convolution's own); what lies beyond the map is zero.
        `after` takes the result to maps of `growth` times the side. `added_to` is a map that takes the sum.
        """
        scale_shift = None if norm is None else self._scale_and_shift(norm, x)
        padding = conv.padding[0] if padding is None else padding
        kernel, stride = conv.kernel_size[0], conv.stride[0]
        height, width = (side * (1 + doubled) // stride for side in x.shape[2:])
        out = None
        for rows, columns in self._tiles(height, width):
            seen = tuple(_seen(part, kernel, stride, padding) for part in (rows, columns))
            y = F.conv2d(self._window(x, seen, doubled, scale_shift), conv.weight, conv.bias, stride=stride)
            y = y if after is None else after(y)
            if added_to is not None:
                added_to[(..., rows, columns)] += y.to(added_to.device)
                continue
            if out is None:
                out = self._map(y, height * growth, width * growth)
            out[(..., *(slice(part.start * growth, part.stop * growth) for part in (rows, columns)))] = y
        return out if added_to is None else added_to

    def adapted(self, module: open_magvit2.AdaptiveGroupNorm, x: Tensor, latents: Tensor) -> Tensor:
        """Open-MAGVIT2's adaptive normalization of a map."""
        if not self._large(x):
            return module(x, latents)
        scale, shift = self._scale_and_shift(module.gn, x)
        more_scale, more_shift = module.scale_and_shift(latents)
        scale, shift = scale * more_scale, shift * more_scale + more_shift
        for tile in self._tiles(*x.shape[2:]):
            x[(..., *tile)] = torch.addcmul(shift, x[(..., *tile)].to(self.device), scale)
        return x

    def _res_block(self, module: vqgan.ResBlock, x: Tensor) -> Tensor:
        h = self.convolved(x, module.conv1, module.norm1)
        if module.nin_shortcut is not None:
            x = self.convolved(x, module.nin_shortcut)
        return self.convolved(h, module.conv2, module.norm2, added_to=x)

    def _scale_and_shift(self, norm: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
        """What a group normalization comes to for each channel, [B, C, 1, 1]; tiles are put together in float64."""
        count, mean, scatter = 0, 0.0, 0.0  # the last: sum of squared distances from the mean
        for tile in self._tiles(*x.shape[2:]):
            groups = x[(..., *tile)].to(self.device).flatten(2).unflatten(1, (norm.num_groups, -1)).flatten(2)
            own_variance, own_mean = (found.double() for found in torch.var_mean(groups.float(), -1, correction=0))
            own, total = groups.shape[-1], count + groups.shape[-1]
            scatter = scatter + own_variance * own + (own_mean - mean).square() * (count * own / total)  # Chan et al.
            mean = mean + (own_mean - mean) * (own / total)
            count = total
        scale = (scatter / count + norm.eps).rsqrt()
        channels = x.shape[1] // norm.num_groups
        scale, mean = (value.repeat_interleave(channels, 1)[:, :, None, None] for value in (scale, mean))
        shift = -mean * scale
        if norm.affine:
            weight, bias = (value.double()[:, None, None] for value in (norm.weight, norm.bias))
            scale, shift = scale * weight, shift * weight + bias
        return scale.float(), shift.float()

    def _window(self, x: Tensor, seen: Cells, doubled: bool, scale_shift: tuple[Tensor, Tensor] | None) -> Tensor:
        """What a convolution sees, normalized and activated, with zeros beyond the map."""
        sides = [side * (1 + doubled) for side in x.shape[2:]]
        inside = [slice(max(part.start, 0), min(part.stop, side)) for part, side in zip(seen, sides, strict=True)]
        if doubled:
            h = x[(..., *(slice(part.start // 2, -(-part.stop // 2)) for part in inside))].to(self.device)
            h = F.interpolate(h, scale_factor=2.0, mode="nearest")
            h = h[(..., *(slice(part.start % 2, part.start % 2 + part.stop - part.start) for part in inside))]
        else:
            h = x[(..., *inside)].to(self.device)
        if scale_shift is not None:
            h = F.silu(torch.addcmul(scale_shift[1], h, scale_shift[0]))
        (top, bottom), (left, right) = (
            (own.start - part.start, part.stop - own.stop) for part, own in zip(seen, inside, strict=True)
        )
        return F.pad(h, (left, right, top, bottom))

    def _tiles(self, height: int, width: int) -> Iterator[Cells]:
        for top in range(0, height, self.tile):
            for left in range(0, width, self.tile):
                yield slice(top, min(top + self.tile, height)), slice(left, min(left + self.tile, width))

    def _large(self, x: Tensor) -> bool:
        return max(x.shape[2:]) > self.tile

    def _map(self, like: Tensor, height: int, width: int) -> Tensor:
        """An empty map: on the device if it fits into a tile, else in main memory or in a file."""
        shape = (*like.shape[:2], height, width)
        if max(height, width) <= self.tile:
            return like.new_empty(shape)
        if self._folder is None:
            return torch.empty(shape, dtype=like.dtype)
        self._files += 1
        path = Path(self._folder.name) / str(self._files)
        flat = torch.from_file(str(path), shared=True, size=int(torch.Size(shape).numel()), dtype=like.dtype)
        path.unlink()  # the space is free again as soon as the map is let go
        return flat.view(shape)

    def _kept(self, x: Tensor) -> Tensor:
        if not self._large(x):
            return x
        out: Any = self._map(x, *x.shape[2:])
        out.copy_(x)
        return out


def _doubles(module: nn.Module) -> bool:
    return hasattr(module, "upsample") or isinstance(module, vqgan.Upsample | open_magvit2.DepthToSpace)


def _seen(part: slice, kernel: int, stride: int, padding: int) -> slice:
    """The cells that a convolution sees for some of its output's."""
    start = part.start * stride - padding
    return slice(start, start + (part.stop - part.start - 1) * stride + kernel)
