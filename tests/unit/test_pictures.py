"""Every mode, depth and kind of transparency that PNG can store, against the standard's own arithmetic."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ibq.data.transforms import decode_rgb

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}
SIDE = 16
rng = np.random.default_rng(0)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def encode(values: np.ndarray, depth: int, kind: int, more: bytes = b"") -> bytes:
    """A PNG of values [H, W, channels] below 2**depth; `more` are the chunks before the pixels."""
    height, width, _ = values.shape
    rows = values.reshape(height, -1)
    if depth == 16:
        lines = [row.astype(">u2").tobytes() for row in rows]
    elif depth == 8:
        lines = [row.astype(np.uint8).tobytes() for row in rows]
    else:
        bits = (rows[..., None] >> np.arange(depth - 1, -1, -1)) & 1
        lines = [np.packbits(line.reshape(-1).astype(np.uint8)).tobytes() for line in bits]
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + line for line in lines))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Of values from 0 to 1."""
    return (colour * alpha[..., None] + (1 - alpha[..., None])) * 255


def close(data: bytes, wanted: np.ndarray) -> None:
    """Within what 8 bits of colour and of opacity lose."""
    found = np.asarray(decode_rgb(data)).astype(float)
    assert np.abs(found - wanted).max() < 2, np.abs(found - wanted).max()


def picture(depth: int, kind: int) -> np.ndarray:
    values = rng.integers(0, 2**depth, (SIDE, SIDE, CHANNELS[kind]))
    values[0, 0], values[0, 1], values[0, 2] = 0, 2**depth - 1, values[5, 5]
    return values


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("transparent", [None, "first", "last", "another"])
def test_grey(depth, transparent):
    values = picture(depth, GREY)
    clear = {None: None, "first": 0, "last": 2**depth - 1, "another": int(values[5, 5, 0])}[transparent]
    more = b"" if clear is None else chunk(b"tRNS", struct.pack(">H", clear))
    alpha = np.ones((SIDE, SIDE)) if clear is None else (values[..., 0] != clear).astype(float)
    close(encode(values, depth, GREY, more), on_white(np.repeat(values / (2**depth - 1), 3, -1), alpha))


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("transparent", [False, True])
def test_rgb(depth, transparent):
    values = picture(depth, RGB)
    clear = values[5, 5]
    more = chunk(b"tRNS", struct.pack(">HHH", *map(int, clear))) if transparent else b""
    alpha = 1.0 - (values == clear).all(-1) * transparent
    close(encode(values, depth, RGB, more), on_white(values / (2**depth - 1), alpha))


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("kind", [GREY_ALPHA, RGBA])
def test_alpha(depth, kind):
    values = picture(depth, kind) / (2**depth - 1)
    colour = np.repeat(values[..., :1], 3, -1) if kind == GREY_ALPHA else values[..., :3]
    data = encode((values * (2**depth - 1)).round().astype(np.int64), depth, kind)
    close(data, on_white(colour, values[..., -1]))


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("transparent", [False, True])
def test_palette(depth, transparent):
    values = picture(depth, PALETTE)
    palette = rng.integers(0, 256, (2**depth, 3)).astype(np.uint8)
    opacity = rng.integers(0, 256, 2**depth).astype(np.uint8) if transparent else np.full(2**depth, 255, np.uint8)
    more = chunk(b"PLTE", palette.tobytes()) + (chunk(b"tRNS", opacity.tobytes()) if transparent else b"")
    wanted = on_white(palette[values[..., 0]] / 255, opacity[values[..., 0]] / 255)
    close(encode(values, depth, PALETTE, more), wanted)


@pytest.mark.parametrize("kind", ["I;16", "I;16B", "L", "RGB", "RGBA", "LA", "CMYK", "1", "P"])
def test_tiff(kind):
    """16 bits are scaled in either order of bytes; the others are Pillow's own."""
    if kind.startswith("I"):
        values = rng.integers(0, 2**16, (SIDE, SIDE)).astype(np.uint16)
        image = Image.fromarray(values)
        wanted = np.repeat(values[..., None] / 257, 3, -1)
        if kind == "I;16B":
            image = Image.frombytes("I;16B", (SIDE, SIDE), values.astype(">u2").tobytes())
    else:
        full = Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 4)).astype(np.uint8), "RGBA")
        image = (full.convert("RGB") if kind == "P" else full).convert(kind)  # its palettes have no transparency
        over = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        wanted = np.asarray(over.convert("RGB")).astype(float)
    file = io.BytesIO()
    image.save(file, "TIFF")
    close(file.getvalue(), wanted)


@pytest.mark.parametrize("kind", ["RGB", "RGBA"])
def test_webp(kind):
    image = Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 4)).astype(np.uint8), "RGBA").convert(kind)
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=True, exact=True)
    over = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    close(file.getvalue(), np.asarray(over.convert("RGB")).astype(float))


def test_floating_point_is_refused():
    file = io.BytesIO()
    Image.fromarray(rng.random((SIDE, SIDE)).astype(np.float32)).save(file, "TIFF")
    with pytest.raises(ValueError, match="floating-point numbers, whose scale is unknown"):
        decode_rgb(file.getvalue())
