#!/usr/bin/env bash
# pytorch-fid 0.3.0, clean-fid 0.1.35 and torch-fidelity 0.4.0 (PyTorch 2.14.1): which pictures of one folder they read.
#
# Guess: pictures are pictures: all three read the same files by default, or say what they leave out.
# Seen: of nine pictures two of the tools read five, and not the same five. Nothing is said of the others.
#
#                    png, jpg   JPG, JPEG, PNG   webp, tif, bmp   in a sub-folder   read
#   pytorch-fid      yes        no               yes              no                5
#   clean-fid        yes        yes              yes              yes               9
#   torch-fidelity   yes        yes              no               no                5
#
# ImageNet's files end in .JPEG and lie in class folders: FIDs of such a folder are of other pictures in each. (The models
# here are stand-ins: no weights are needed to see what is read.) Fails if this changes.
set -euo pipefail
folder="$(mktemp -d)" && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.14.1 torchvision==0.29.1 numpy==2.4.6 pillow==12.3.0 \
  scipy==1.17.1 pytorch-fid==0.3.0 clean-fid==0.1.35 torch-fidelity==0.4.0
cat >"$folder/look.py" <<'PYTHON'
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from cleanfid.fid import get_folder_features
from PIL import Image
from pytorch_fid.fid_score import get_activations
from pytorch_fid import fid_score
from torch_fidelity.defaults import DEFAULTS
from torch_fidelity.utils import prepare_input_from_descriptor

warnings.simplefilter("ignore")
place = Path(sys.argv[1])
NAMES = ["0.png", "1.jpg", "2.JPG", "3.JPEG", "4.PNG", "5.webp", "6.tif", "7.bmp", "class/8.png"]
(place / "class").mkdir(parents=True)
for number, name in enumerate(NAMES):  # each tells itself by its grey
    kind = {"JPG": "JPEG", "TIF": "TIFF"}.get(suffix := name.rpartition(".")[2].upper(), suffix)
    Image.new("RGB", (299, 299), (number * 25,) * 3).save(place / name, kind)


def names(greys):
    return {NAMES[round(float(grey) * 255 / 25)] for grey in greys}


class Stand(torch.nn.Module):
    """In place of the network: the mean grey of each picture in [0, 1]."""

    def forward(self, images):
        """[N, 3, H, W] -> a list of [N, 1, 1, 1], as pytorch-fid has it."""
        return [images.mean((1, 2, 3)).reshape(-1, 1, 1, 1)]


def read_by_pytorch_fid():
    seen = []

    def kept(files, model, *_, **__):
        seen.append(get_activations(files, model, 1, 1, "cpu", 0))
        return np.zeros(1), np.zeros((1, 1))

    fid_score.calculate_activation_statistics = kept
    fid_score.compute_statistics_of_path(str(place), Stand(), 1, 1, "cpu", 0)
    return names(seen[0].flatten())


def read_by_clean_fid():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 299 * 299, 1, bias=False))
    torch.nn.init.constant_(model[1].weight, 1 / (3 * 299 * 299 * 255))
    device = torch.device("cpu")
    found = get_folder_features(str(place), model, num_workers=0, batch_size=1, device=device, verbose=False)
    return names(found.flatten())


def read_by_torch_fidelity():
    pictures = prepare_input_from_descriptor({"input": str(place)}, **DEFAULTS | {"verbose": False})
    return names(pictures[number].float().mean() / 255 for number in range(len(pictures)))


EXPECTED = {
    "pytorch-fid": (read_by_pytorch_fid, {"0.png", "1.jpg", "5.webp", "6.tif", "7.bmp"}),
    "clean-fid": (read_by_clean_fid, set(NAMES)),
    "torch-fidelity": (read_by_torch_fidelity, set(NAMES[:5])),
}
for tool, (read, expected) in EXPECTED.items():
    found = read()
    print(f"{tool}: {len(found)} of {len(NAMES)}, not {sorted({*NAMES} - found)}")
    assert found == expected, f"changed: {tool}"
PYTHON
"$folder/venv/bin/python" "$folder/look.py" "$folder/pictures" 2>/dev/null
echo "as stated"
