"""LPIPS (arXiv 1801.03924) through the `lpips` package, with the VGG-16 weights from wherever they are."""

import contextlib
import hashlib
import http.client
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import nn

from ibq.config import UserError

VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"  # torchvision's; its name carries the hash


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
    state = None if config.weights == "random" else _read_vgg(config)
    import lpips  # slow to import, and not needed at weight 0

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # lpips calls torchvision in a way that it warns about
        torch.manual_seed(0)  # random weights must be the same on every rank and after a restart
        network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    if state is not None:
        _load_vgg(network.net, state, config.weights)
    return network.requires_grad_(False).eval()


def vgg_was_downloaded() -> bool:
    """Whether torchvision's VGG-16 weights are in PyTorch's cache."""
    return (Path(torch.hub.get_dir()) / "checkpoints" / VGG_URL.rsplit("/", 1)[1]).exists()


def _read_vgg(config: PerceptualConfig) -> dict:
    if config.weights == "download":
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # where torch announces the download
                return torch.hub.load_state_dict_from_url(
                    VGG_URL, map_location="cpu", check_hash=True, weights_only=True, progress=False
                )
        except (OSError, http.client.HTTPException, RuntimeError, EOFError, UnpicklingError) as error:
            raise UserError(
                f"LPIPS needs VGG-16 weights, and they could not be downloaded ({error}); give a copy of "
                "vgg16-397923af.pth by loss.perceptual.weights=FILE, or set loss.perceptual.weight=0"
            ) from error
    path = Path(config.weights)
    if not path.is_file():
        raise UserError(
            f"no VGG-16 weights at {str(path)!r}; give a copy of vgg16-397923af.pth by loss.perceptual.weights=FILE, "
            "or set loss.perceptual.weight=0"
        )
    if config.sha256 is not None and hashlib.sha256(path.read_bytes()).hexdigest() != config.sha256:
        raise UserError(f"{path}: SHA-256 differs from loss.perceptual.sha256; the file is damaged or another one")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is not a checkpoint
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a file of VGG-16 weights ({reason}); use vgg16-397923af.pth") from error


def _load_vgg(slices: nn.Module, state: object, origin: str) -> None:
    """Copy torchvision's `features.N.*` into lpips's slices, which keep the layer numbers N."""
    for name, parameter in slices.named_parameters():
        source = f"features.{name.split('.', 1)[1]}"
        if not isinstance(state, dict) or getattr(state.get(source), "shape", None) != parameter.shape:
            raise UserError(
                f"{origin}: as VGG-16 weights, {source} is missing or has another shape; use vgg16-397923af.pth"
            )
        parameter.data.copy_(state[source])
