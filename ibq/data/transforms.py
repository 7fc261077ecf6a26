"""From files to uint8 arrays: decoding, resizing, cropping, flipping."""

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:  # tools that only read and write images should not wait for PyTorch
    from torch import Tensor

Size = int | tuple[int, int]  # pixels: the side of a square, or height and width
MAX_PIXELS = 100_000_000
# Pillow's names of plain raster formats. Some of its others run programs: an EPS file starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
SIDEWAYS = range(5, 9)  # EXIF orientations in which height and width change places


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random views of training images; validation always takes the centre crop."""

    flip: bool = True  # mirror half of the images
    crop: bool = True  # random position instead of the centre
    max_zoom: float = 1.0  # the crop covers down to 1 / max_zoom of the shorter side

    def __post_init__(self):
        if not 1 <= self.max_zoom < math.inf:
            raise ValueError(f"max_zoom: must be at least 1, got {self.max_zoom}; 1 crops at full size")


class TooLargeError(ValueError):
    """A picture of more than MAX_PIXELS."""


def decode_rgb(
    data: bytes, *, formats: Sequence[str] = FORMATS, max_pixels: int | None = None, enough: int | None = None
) -> Image.Image:
    """An RGB picture from the bytes of a JPEG, PNG, WebP or other raster file; transparency is laid over white.

    Cameras' EXIF orientation is applied. `formats` are Pillow's names of those allowed, whatever the file is called.
    A JPEG may come at a half, quarter or eighth of its size, which takes a fraction of the time, where that leaves
    `enough` pixels a side. ValueError if the bytes are no such picture or one of more than `max_pixels` (None:
    MAX_PIXELS).
    """
    max_pixels = MAX_PIXELS if max_pixels is None else max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is our own
            image = Image.open(io.BytesIO(data), formats=formats)
        if image.width * image.height > max_pixels:
            raise TooLargeError(f"{image.width} x {image.height} pixels are more than the {max_pixels:,} allowed")
        if enough is not None:
            image.draft(None, (enough, enough))
        image = _with_transparency(image, data)
        image = _upright(image)
        if image.mode == "F":
            raise ValueError("of floating-point numbers, whose scale is unknown")
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        if image.mode.startswith("I"):  # 16 bits a pixel: Pillow would clip them instead of scaling
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
        return image.convert("RGB")
    except TooLargeError:
        raise
    except Image.DecompressionBombError as error:
        raise TooLargeError(f"more pixels than the {max_pixels:,} allowed") from error
    except UnidentifiedImageError as error:  # its own words name a place in memory
        raise ValueError("not a readable picture: of no known format") from error
    except Exception as error:  # Pillow's decoders raise many kinds for damaged files
        raise ValueError(f"not a readable picture: {str(error) or type(error).__name__}") from error


def upright_size(data: bytes) -> tuple[int, int]:
    """(height, width) of a picture, turned as its EXIF block says, from the first of its bytes.

    ValueError if they are none of a picture, or too few.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:  # Pillow's readers raise many kinds for damaged files
        raise ValueError(f"not a readable picture: {str(error) or type(error).__name__}") from error
    try:
        # Not the PNG reader's own, which decodes the picture to see whether such a block follows it.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # as in `_upright`
        orientation = 1
    # Of a TIFF Pillow gives the size as it is shown, and the orientation all the same.
    return image.size if orientation in SIDEWAYS and image.format != "TIFF" else image.size[::-1]


def _with_transparency(image: Image.Image, data: bytes) -> Image.Image:
    """A PNG of grey or RGB that names one transparent colour (`tRNS`), in its own depth, with an alpha channel instead.

    Pillow compares that colour with pixels that it has scaled, and takes 16 bits for 8.
    """
    colour = image.info.get("transparency")
    if image.format != "PNG" or image.mode == "P" or colour is None:
        return image
    depth, image_pixels = data[24], np.asarray(image)  # of the header, which every PNG begins with
    colours = np.atleast_1d(np.asarray(colour, dtype=np.int64))
    if image.mode == "1":
        colours, image_pixels = colours > 0, image_pixels > 0
    elif depth < 8:
        colours = colours * (255 // (2**depth - 1))
    elif depth == 16 and not image.mode.startswith("I"):
        colours = colours >> 8  # as Pillow has made them
    pixels = image_pixels if image_pixels.ndim == 3 else image_pixels[..., None]
    clear = (pixels == colours).all(-1)
    grey = Image.fromarray((image_pixels // 257).astype(np.uint8)) if image.mode.startswith("I") else image
    solid = grey.convert("RGB")
    solid.putalpha(Image.fromarray(np.where(clear, 0, 255).astype(np.uint8)))
    solid.info = {name: value for name, value in image.info.items() if name != "transparency"}
    return solid


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF block says."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow raises many kinds for a damaged EXIF block; damaged pixels fail later again
        return image


@dataclass(frozen=True, kw_only=True)
class FixedView:
    """The same square of every picture, as for ten-crop; see `view`."""

    zoom: float = 1.0
    x: float = 0.5
    y: float = 0.5
    flip: bool = False


def ten_crop(zoom: float) -> list[FixedView]:
    """Centre and four corners, plain and mirrored: what AR transformers are usually trained on."""
    places = [(0.5, 0.5), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)]
    return [FixedView(zoom=zoom, x=x, y=y, flip=flip) for flip in (False, True) for x, y in places]


def sides_of(size: Size) -> tuple[int, int]:
    """(height, width)."""
    return (size, size) if isinstance(size, int) else size


def square(image: Image.Image, size: Size) -> np.ndarray:
    """Centre crop to the shape of `size`, a square or another, and resize to it: uint8 [height, width, 3]."""
    return view(image, size, zoom=1.0, x=0.5, y=0.5, flip=False)


def random_square(image: Image.Image, size: Size, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """A random view as `config` allows: uint8 [height, width, 3]."""
    zoom, x, y, mirror = rng.random(4)  # always four draws, so that settings do not shift the random stream
    return view(
        image,
        size,
        zoom=config.max_zoom**zoom,
        x=x if config.crop else 0.5,
        y=y if config.crop else 0.5,
        flip=config.flip and mirror < 0.5,
    )


def view(image: Image.Image, size: Size, *, zoom: float, x: float, y: float, flip: bool) -> np.ndarray:
    """The largest part of the shape of `size`, / zoom, at the relative position (x, y), resized to it; read-only."""
    height, width = sides_of(size)
    across = min(image.width, image.height * width / height) / zoom
    down = min(image.height, image.width * height / width) / zoom
    left, top = (image.width - across) * x, (image.height - down) * y
    box = (left, top, left + across, top + down)
    resample = Image.Resampling.LANCZOS if across > width else Image.Resampling.BICUBIC
    if (across, down) == (width, height) and float(left).is_integer() and float(top).is_integer():
        image = image.crop(tuple(int(v) for v in box))
    else:
        image = image.resize((width, height), resample, box=box)
    pixels = np.asarray(image)
    return pixels[:, ::-1] if flip else pixels


def to_unit_range(images: "Tensor") -> "Tensor":
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return images.float() / 127.5 - 1.0


def to_uint8(images: "Tensor") -> "Tensor":
    """Float [-1, 1] -> uint8 by clamping and truncation, the reference's convention."""
    return ((images.float().clamp(-1, 1) + 1) / 2 * 255).byte()
