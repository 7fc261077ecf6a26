"""Differentiable augmentation of what a discriminator sees (DiffAugment, arXiv 2006.10738): colour, place, cutout."""

import torch
from torch import Tensor

SHIFT = 1 / 8  # of a side: the largest translation


def diff_augment(images: Tensor, probability: float, cutout: float) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1], in any precision, each changed in its own way; gradients flow through.

    Colour (brightness, saturation and contrast), translation, and a square of the share `cutout` of a side made zero:
    each is done to an image with this probability. The numbers are those of the device's generator, which training
    seeds at every step; nothing waits for the device.
    """
    if probability == 0:
        return images
    draws = torch.rand(10, len(images), 1, 1, 1, device=images.device, dtype=torch.float32)
    does = draws[:3] < probability
    coloured = _coloured(images, *draws[3:6].to(images.dtype))
    images = torch.where(does[0], coloured, images)
    images = torch.where(does[1], _translated(images, *draws[6:8]), images)
    return images * ~(does[2] & _hole(images, *draws[8:10], share=cutout))


def _coloured(x: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """x + U(-1/2, 1/2); differences to a pixel's grey times U(0, 2); differences to the mean times U(1/2, 3/2)."""
    x = x + (brightness - 0.5)
    grey = x.mean(dim=1, keepdim=True)
    x = (x - grey) * (2 * saturation) + grey
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return (x - mean) * (contrast + 0.5) + mean


def _translated(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Moved by whole pixels, up to SHIFT of a side each way; what comes in is zero."""
    for dim, draw in ((2, down), (3, right)):
        size = x.shape[dim]
        most = round(size * SHIFT)
        shift = (draw * (2 * most + 1)).floor().long() - most
        source = _places(x, dim) + shift
        inside = (source >= 0) & (source < size)
        x = torch.take_along_dim(x, source.clamp(0, size - 1), dim=dim) * inside
    return x


def _hole(x: Tensor, down: Tensor, right: Tensor, *, share: float) -> Tensor:
    """True [B, 1, H, W] within a rectangle whose middle may lie anywhere in the image."""
    found = torch.ones((), dtype=torch.bool, device=x.device)
    for dim, draw in ((2, down), (3, right)):
        size = x.shape[dim]
        length = round(size * share)
        start = (draw * (size + 1 - length % 2)).floor().long() - length // 2
        place = _places(x, dim)
        found = found & (place >= start) & (place < start + length)
    return found


def _places(x: Tensor, dim: int) -> Tensor:
    """0, 1, ... along one dimension of x, of size 1 along the others."""
    shape = [1] * x.dim()
    shape[dim] = -1
    return torch.arange(x.shape[dim], device=x.device).view(shape)
