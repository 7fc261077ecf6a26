#!/usr/bin/env bash
# Pillow 12.3.0: grey PNGs with a transparent colour (tRNS), by depth, as convert("RGBA") shows them.
#
# Guess: a decoder that reads all depths of PNG also compares the transparent colour in all of them; at most 16 bits,
# which become 8, round it.
# Seen: 1 and 8 bits are right. At 2 and 4 bits the colour is compared unscaled with pixels that have been scaled, so
# nothing becomes transparent but black. At 16 bits the colour is found, but every value is clipped to 8 bits instead of
# scaled, so a picture of mid-grey comes out white.
#
#   bits  transparent pixels (expected)  first grey (expected)
#     1   2 (2)                          255 (255)
#     2   0 (1)                          85 (85)
#     4   0 (1)                          17 (17)
#     8   1 (1)                          1 (1)
#    16   1 (1)                          255 (128)
#
# A training set that is laid over a background by Pillow so keeps the colour that should have gone. Fails if this changes.
set -euo pipefail
folder="$(mktemp -d)" && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" && "$folder/venv/bin/python" -m pip install --quiet pillow==12.3.0
cat >"$folder/look.py" <<'PYTHON'
import io
import struct
import zlib

from PIL import Image


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def grey(depth, values, clear):
    """A PNG one row high; `clear` is its transparent colour."""
    bits = "".join(f"{value:0{depth}b}" for value in values)
    row = b"\0" + int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")
    header = struct.pack(">IIBBBBB", len(values), 1, depth, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"tRNS", struct.pack(">H", clear))
    return b"\x89PNG\r\n\x1a\n" + parts + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")


found = {}
for depth in (1, 2, 4, 8, 16):
    first, clear = (0x8000, 0x8000) if depth == 16 else (1, 1)
    values = [first, 0, 2**depth - 1]
    pixels = list(Image.open(io.BytesIO(grey(depth, values, clear))).convert("RGBA").getdata())
    found[depth] = (sum(alpha == 0 for *_, alpha in pixels), pixels[0][0])
    print(f"{depth:2d} bits: {found[depth][0]} transparent of {values.count(clear)}, first grey {found[depth][1]}")
assert found[8] == (1, 1), "8 bits"
assert [found[depth][0] for depth in (2, 4)] == [0, 0], "changed: 2 or 4 bits are compared in their own depth now"
assert found[1][0] == 2, "changed: 1 bit"
assert found[16][1] == 255, "changed: 16 bits are scaled now"
PYTHON
"$folder/venv/bin/python" "$folder/look.py"
echo "as stated"
