#!/usr/bin/env bash
# Pillow 12.3.0: size and orientation of a turned picture before its pixels are read, by file format.
#
# Guess: as in a JPEG, size is that of the stored picture and getexif() says how it is to be turned; ImageOps.exif_transpose
# does it and takes the tag away.
# Seen: so it is in JPEG, PNG and WebP. A TIFF comes turned: its size is that of the picture as shown from the start, while
# getexif() still says 6 until the pixels are read, and nothing from then on.
#
#   stored 16 x 8, orientation 6   when opened           when read
#   JPEG, PNG, WebP                16 x 8, tag 6         16 x 8, tag 6
#   TIFF                           8 x 16, tag 6         8 x 16, no tag
#
# What takes sizes from headers, and swaps width and height where the tag says so, gets those of every turned TIFF wrong.
# Fails if this changes.
set -euo pipefail
folder="$(mktemp -d)" && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" && "$folder/venv/bin/python" -m pip install --quiet pillow==12.3.0
cat >"$folder/look.py" <<'PYTHON'
import io

from PIL import ExifTags, Image, ImageOps

TAG = ExifTags.Base.Orientation
exif = Image.Exif()
exif[TAG] = 6
for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
    file = io.BytesIO()
    Image.new("RGB", (16, 8)).save(file, kind, exif=exif)
    image = Image.open(file)
    opened = image.size, image.getexif().get(TAG)
    image.load()
    read = image.size, image.getexif().get(TAG)
    print(f"{kind}: opened {opened}, read {read}")
    assert ImageOps.exif_transpose(Image.open(file)).size == (8, 16)
    if kind == "TIFF":
        assert opened == ((8, 16), 6), "changed: a TIFF that is opened"
        assert read == ((8, 16), None), "changed: a TIFF that is read"
    else:
        assert opened == read == ((16, 8), 6), kind
PYTHON
"$folder/venv/bin/python" "$folder/look.py"
echo "as stated"
