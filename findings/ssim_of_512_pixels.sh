#!/usr/bin/env bash
# piq 0.8.0 and torchmetrics 1.9.0 (PyTorch 2.14.1): SSIM of the same pictures in [0, 1] with data_range=1.
#
# Guess: both take the 11 x 11 Gaussian window of the paper and agree within 0.003, whatever the size of the pictures.
# Seen: at 256 px they do (0.002 apart, by the borders). From 384 px on piq first shrinks the pictures to about 256, as the
# paper's authors advise and torchmetrics does not: noise averages out, and at 512 px the same reconstruction has 0.950
# in one and 0.848 in the other. With downsample=False piq has 0.847.
#
#   pixels  torchmetrics  piq    piq, downsample=False
#   256     0.849         0.847  0.847
#   512     0.848         0.950  0.847
#
# Figures of 512 px tokenizers from two papers may differ by this alone. Fails if this changes.
set -euo pipefail
folder="$(mktemp -d)" && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.14.1 torchvision==0.29.1 numpy==2.4.6 piq==0.8.0 torchmetrics==1.9.0
cat >"$folder/look.py" <<'PYTHON'
import piq
import torch
import torch.nn.functional as F
from torchmetrics.functional.image import structural_similarity_index_measure

for pixels in (256, 512):
    torch.manual_seed(0)
    image = F.avg_pool2d(torch.rand(1, 3, pixels, pixels), 3, 1, 1)
    noisy = (image + 0.05 * torch.randn_like(image)).clamp(0, 1)
    theirs = structural_similarity_index_measure(image, noisy, data_range=1.0).item()
    own, whole = (piq.ssim(image, noisy, data_range=1.0, downsample=value).item() for value in (True, False))
    print(f"{pixels} px: torchmetrics {theirs:.4f}, piq {own:.4f}, piq with downsample=False {whole:.4f}")
    assert abs(theirs - whole) < 0.004
    assert abs(theirs - own) < 0.004 if pixels == 256 else own - theirs > 0.09, "changed: what is shrunk"
PYTHON
"$folder/venv/bin/python" "$folder/look.py"
echo "as stated"
