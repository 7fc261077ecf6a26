"""LPIPS (arXiv 1801.03924) through the `lpips` package, with the backbone's weights from wherever they are."""

import contextlib
import hashlib
import http.client
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ibq.config import UserError


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A network whose features LPIPS compares, and its weights; the file's name carries the hash."""

    label: str
    url: str
    smallest: int  # pixels of an image's side that its poolings leave something of

    @property
    def file(self) -> str:
        """The name of the published file."""
        return self.url.rsplit("/", 1)[1]

    @property
    def cached(self) -> Path:
        """Where PyTorch keeps the download."""
        return Path(torch.hub.get_dir()) / "checkpoints" / self.file


BACKBONES = {
    "vgg": Backbone(label="VGG-16", url="https://download.pytorch.org/models/vgg16-397923af.pth", smallest=16),
    "alex": Backbone(label="AlexNet", url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", smallest=31),
}


@dataclass(frozen=True, kw_only=True)
class PerceptualConfig:
    """LPIPS loss. Weight 0 switches it off."""

    weight: float = 1.0
    weights: str = "download"  # of VGG-16: "download" (torchvision's), "random" (for tests), or a file
    sha256: str | None = None  # checked when `weights` is a file

    def __post_init__(self):
        if self.weight < 0:
            raise ValueError(f"weight: must not be negative, got {self.weight}; 0 switches LPIPS off")


def build_perceptual(config: PerceptualConfig) -> nn.Module | None:
    """Frozen LPIPS (images in [-1, 1] -> [B, 1, 1, 1]), None at weight 0; UserError if the weights can't be had."""
    if config.weight == 0:
        return None
    remedy = f"give a copy of {BACKBONES['vgg'].file} by loss.perceptual.weights=FILE, or set loss.perceptual.weight=0"
    return build_lpips("vgg", config.weights, remedy=remedy, sha256=config.sha256)


def build_lpips(net: str, weights: str, *, remedy: str, sha256: str | None = None) -> nn.Module:
    """Frozen LPIPS over one of BACKBONES, with `weights` "download", "random" or a file.

    UserError with the remedy if the weights can't be had.
    """
    import lpips  # slow to import, and not needed at weight 0

    backbone = BACKBONES[net]
    state = None if weights == "random" else _read(backbone, weights, remedy, sha256)
    # Random ones depend on all that is drawn, and stay what they are: runs have learned by them.
    drawing = contextlib.nullcontext() if state is None else _LinearLayersLeftEmpty()
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), drawing:
        warnings.simplefilter("ignore")  # lpips calls torchvision in a way that it warns about
        torch.manual_seed(0)  # random weights must be the same on every rank and after a restart
        network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    if state is not None:
        _load(network.net, state, weights, backbone)
    return network.requires_grad_(False).eval()


class _LinearLayersLeftEmpty(TorchFunctionMode):
    """Within it none is drawn for: nine tenths of a backbone are its classifier, which lpips throws away at once."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        tensor = (kwargs or {}).get("tensor")
        if func in (nn.init.kaiming_uniform_, nn.init.normal_) and tensor is not None and tensor.dim() == 2:
            return tensor
        return func(*args, **kwargs or {})


def perceptual_features(network: nn.Module, images: Tensor) -> list[Tensor]:
    """What LPIPS compares of images in [-1, 1], before it normalizes: [B, C, h, w] of each tap."""
    return list(network.net(network.scaling_layer(images)))


def _read(backbone: Backbone, weights: str, remedy: str, sha256: str | None) -> dict:
    if weights == "download":
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # where torch announces the download
                return torch.hub.load_state_dict_from_url(
                    backbone.url, map_location="cpu", check_hash=True, weights_only=True, progress=False
                )
        except (OSError, http.client.HTTPException, RuntimeError, EOFError, UnpicklingError) as error:
            raise UserError(
                f"LPIPS needs {backbone.label} weights, and they could not be downloaded ({error}); {remedy}"
            ) from error
    path = Path(weights)
    if not path.is_file():
        raise UserError(f"no {backbone.label} weights at {str(path)!r}; {remedy}")
    if sha256 is not None and hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise UserError(f"{path}: SHA-256 differs from loss.perceptual.sha256; the file is damaged or another one")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is not a checkpoint
        reason = why_unreadable(error)
        raise UserError(f"{path}: not a file of {backbone.label} weights ({reason}); use {backbone.file}") from error


def why_unreadable(error: Exception) -> str:
    """What torch.load says, in short; of an unsafe pickle it would tell the user how to run the code in it."""
    if isinstance(error, UnpicklingError):
        return "it is damaged, or holds more than tensors, which is never loaded"
    return (str(error) or type(error).__name__).splitlines()[0].split(". ")[0][:200]


def _load(slices: nn.Module, state: object, origin: str, backbone: Backbone) -> None:
    """Copy torchvision's `features.N.*` into lpips's slices, which keep the layer numbers N."""
    for name, parameter in slices.named_parameters():
        source = f"features.{name.split('.', 1)[1]}"
        if not isinstance(state, dict) or getattr(state.get(source), "shape", None) != parameter.shape:
            raise UserError(
                f"{origin}: as {backbone.label} weights, {source} is missing or has another shape; use {backbone.file}"
            )
        parameter.data.copy_(state[source])
