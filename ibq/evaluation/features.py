"""The Inception network behind FID and its relatives: torch-fidelity's port of TensorFlow's, and where its weights are.

The blocks and the resizing are torch-fidelity's; its loader is not used, as it unpickles.
"""

import contextlib
import hashlib
import http.client
import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ibq.config import UserError
from ibq.extras import need
from ibq.models.perceptual import why_unreadable

URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
FILES = (URL.rsplit("/", 1)[1], "weights-inception-2015-12-05-6726825d.pth")  # torch-fidelity's name for the same bytes
PUBLISHED = "6726825d"  # how the SHA-256 of the published weights begins
ENVIRONMENT = "IBQ_INCEPTION_WEIGHTS"
SIZE, CLASSES = 299, 1008
POOL_DIM = 2048
SPATIAL_SIDE, SPATIAL_CHANNELS = 17, 7
SPATIAL_DIM = SPATIAL_SIDE**2 * SPATIAL_CHANNELS
BLOCK = 8  # images that the network sees at once, always: an image's features do not depend on its company
RESIZING = "bilinear to 299 x 299 as in TensorFlow 1: no antialiasing, corners not aligned"


@dataclass(frozen=True, kw_only=True)
class Features:
    """What the network says of images: float32, one row each."""

    pool: Tensor  # [N, 2048]: the last average pooling, for FID, precision, recall and the Inception Score
    spatial: Tensor  # [N, 2023]: row, column, channel of a 17 x 17 map, for sFID


class Inception(nn.Module):
    """InceptionV3 of 2015-12-05 on uint8 images [B, 3, H, W] of any size; its state dict names are torch-fidelity's."""

    def __init__(self):
        super().__init__()
        from torch_fidelity import feature_extractor_inceptionv3 as blocks  # slow to import

        conv = blocks.BasicConv2d
        self.Conv2d_1a_3x3 = conv(3, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = conv(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = conv(32, 64, kernel_size=3, padding=1)
        self.Conv2d_3b_1x1 = conv(64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = conv(80, 192, kernel_size=3)
        self.Mixed_5b = blocks.InceptionA(192, pool_features=32)
        self.Mixed_5c = blocks.InceptionA(256, pool_features=64)
        self.Mixed_5d = blocks.InceptionA(288, pool_features=64)
        self.Mixed_6a = blocks.InceptionB(288)
        self.Mixed_6b = blocks.InceptionC(768, channels_7x7=128)
        self.Mixed_6c = blocks.InceptionC(768, channels_7x7=160)
        self.Mixed_6d = blocks.InceptionC(768, channels_7x7=160)
        self.Mixed_6e = blocks.InceptionC(768, channels_7x7=192)
        self.Mixed_7a = blocks.InceptionD(768)
        self.Mixed_7b = blocks.InceptionE_1(1280)
        self.Mixed_7c = blocks.InceptionE_2(2048)
        self.fc = nn.Linear(POOL_DIM, CLASSES)
        self.resize = blocks.interpolate_bilinear_2d_like_tensorflow1x
        self.sha256: str | None = None  # of the file that the weights came from

    def forward(self, images: Tensor) -> Features:
        """Features of any number of images, on their device; `block_features` gives the same ones in any company."""
        x = self.resize(images.float(), size=(SIZE, SIZE), align_corners=False)
        x = (x - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, kernel_size=3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, kernel_size=3, stride=2)  # [B, 192, 35, 35]
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # [B, 768, 17, 17]
        x = self.Mixed_6d(x)
        # TensorFlow numbers the blocks 5b, 5c, 5d, 6a, ... as mixed, mixed_1, ...: 6d is mixed_6. ADM reads the first
        # channels of `mixed_6/conv`, the 1 x 1 convolution after its ReLU, with which the block's output begins.
        # Rows are laid out as TensorFlow has them (H, W, C), for the sake of its stored covariances.
        spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))  # [B, 2048, 8, 8]
        return Features(pool=x.mean(dim=(2, 3)), spatial=spatial)

    def probabilities(self, pool: Tensor) -> Tensor:
        """Class probabilities [N, 1008] in float64 of pool features, without the head's bias: ADM leaves it out."""
        return (pool.double() @ self.fc.weight.double().t()).softmax(dim=1)

    @property
    def description(self) -> str:
        """Which network the features are of; other weights than the published ones have another name."""
        if self.sha256 is not None and self.sha256.startswith(PUBLISHED):
            return f"Inception-2015-12-05 (torch-fidelity's port, weights {self.sha256[:8]})"
        return f"Inception with weights {(self.sha256 or 'unknown')[:8]}, NOT the published ones"

    @torch.no_grad()
    def block_features(self, images: Tensor) -> Features:
        """Features on the CPU of at most BLOCK images, padded to BLOCK."""
        padded = torch.cat([images, images[:1].expand(BLOCK - len(images), -1, -1, -1)])
        device = self.fc.weight.device
        with torch.autocast(device.type, enabled=False):
            found = self(padded.to(device).contiguous())
        return Features(pool=found.pool[: len(images)].cpu(), spatial=found.spatial[: len(images)].cpu())


def load_inception(weights: str | None = None) -> Inception:
    """The network in eval mode, on the CPU; UserError if the weights can't be had.

    `weights` is a file; without one, the file that IBQ_INCEPTION_WEIGHTS names, or the usual download. A file whose
    name ends with a part of its SHA-256, as the published one's does, is held to it.
    """
    need("torch_fidelity")  # before a download
    path = _find(weights or os.environ.get(ENVIRONMENT) or None)
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    named = re.search(r"-([0-9a-f]{8,64})\.\w+$", path.name)
    if named and not digest.startswith(named[1]):
        raise UserError(f"{path}: its SHA-256 begins {digest[:8]}, not {named[1]}: damaged; copy or download it again")
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is not a checkpoint
        raise UserError(f"{path}: not a file of Inception weights ({why_unreadable(error)}); use {FILES[0]}") from error
    network = Inception().eval().requires_grad_(False)
    _fill(network, state, path)
    network.sha256 = digest
    return network


def weights_at_hand() -> bool:
    """Whether the weights are named by the environment, or have been downloaded before."""
    return bool(os.environ.get(ENVIRONMENT)) or any(path.is_file() for path in _cached())


def _cached() -> list[Path]:
    return [Path(torch.hub.get_dir()) / "checkpoints" / name for name in FILES]


def _find(named: str | None) -> Path:
    """The file with the weights, downloaded if it must be."""
    remedy = f"give a copy of {FILES[0]} by --inception FILE or the environment variable {ENVIRONMENT}"
    if named is not None:
        if not Path(named).is_file():
            raise UserError(f"no Inception weights at {named!r}; {remedy}")
        return Path(named)
    for path in _cached():
        if path.is_file():
            return path
    target = _cached()[0]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stderr(io.StringIO()):
            torch.hub.download_url_to_file(URL, str(target), hash_prefix=PUBLISHED, progress=False)
    except (OSError, http.client.HTTPException, RuntimeError, ValueError) as error:
        raise UserError(f"Inception's weights are not here and could not be downloaded ({error}); {remedy}") from error
    return target


def _fill(network: Inception, state: object, path: Path) -> None:
    """Load strictly, but for BatchNorm's counters, which some published files are without."""
    if isinstance(state, Mapping) and all(isinstance(value, Tensor) for value in state.values()):
        counters = {name: value for name, value in network.state_dict().items() if name.endswith("num_batches_tracked")}
        try:
            network.load_state_dict({**counters, **state}, strict=True)
            return
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()[:160]
    else:
        reason = "not a dictionary of tensors"
    raise UserError(f"{path}: not Inception's weights ({reason}); use {FILES[0]}")
