"""What a discriminator on features sees: augmented images through a frozen vision transformer, layer by layer."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ibq.config import UserError
from ibq.models.diff_augment import diff_augment
from ibq.models.feature_discriminator import FeaturesDiscriminatorConfig
from ibq.models.perceptual import why_unreadable
from ibq.models.vision_transformer import VisionTransformer

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Repositories of the Hub whose model.safetensors has the names of DINO's and DINOv2's own files.
REPOSITORIES = {
    "dino_vits16": "timm/vit_small_patch16_224.dino",
    "dino_vitb16": "timm/vit_base_patch16_224.dino",
    "dinov2_vits14": "timm/vit_small_patch14_dinov2.lvd142m",
    "dinov2_vitb14": "timm/vit_base_patch14_dinov2.lvd142m",
}
# In published files and of no use here: for masked patches, and what DINOv3's rotations and biases are made of.
UNUSED = re.compile(r"mask_token|rope_embed\.periods|blocks\.\d+\.attn\.qkv\.bias_mask")
KEY = "loss.gan.discriminator"


class FrozenFeatures(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] -> features [B, C, patches] after each of the config's `layers`.

    A patch's feature is its token plus the class token (StyleGAN-T, arXiv 2301.09515). The weights stay as they are,
    and gradients go through to the images. UserError if the weights can't be had.
    """

    def __init__(self, config: FeaturesDiscriminatorConfig):
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # random weights must be the same on every rank and after a restart
            self.backbone = VisionTransformer(config.transformer)
        if config.weights != "random":
            load(self.backbone, _read(config), config)
        self.identity = f"{_name(config)} {_digest(config, self.backbone.state_dict())}"
        self.backbone.fit(config.side)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Features of the images, which are augmented and perhaps cropped."""
        with torch.autocast(images.device.type, enabled=False):
            seen = self._cropped(diff_augment(_precise(images), self.config.augment, self.config.cutout))
        return self._features(seen)

    def plain(self, images: Tensor) -> list[Tensor]:
        """Features of the images as they are, but for their size."""
        with torch.autocast(images.device.type, enabled=False):
            seen = self._resized(_precise(images))
        return self._features(seen)

    def _features(self, images: Tensor) -> list[Tensor]:
        with torch.autocast(images.device.type, enabled=False):
            pixels = normalized(images)
        first = 1 + self.config.transformer.registers
        found = self.backbone(pixels, self.config.layers)
        return [(tokens[:, first:] + tokens[:, :1]).transpose(1, 2).contiguous() for tokens in found]

    def _cropped(self, images: Tensor) -> Tensor:
        """The same place of all images, or all of them; drawn on the CPU, so that nothing waits for the device."""
        height, width, side = *images.shape[2:], self.config.side
        if self.config.crop == 0 or min(height, width) <= side:
            return self._resized(images)
        draw, down, right = torch.rand(3, dtype=torch.float64).tolist()
        if draw >= self.config.crop:
            return self._resized(images)
        top, left = int(down * (height - side + 1)), int(right * (width - side + 1))
        return images[:, :, top : top + side, left : left + side]

    def _resized(self, images: Tensor) -> Tensor:
        """Shrunk by averages of areas, enlarged by bicubic interpolation."""
        side = (self.config.side, self.config.side)
        if images.shape[2:] == side:
            return images
        return F.interpolate(images, size=side, mode="area" if min(images.shape[2:]) > side[0] else "bicubic")


def normalized(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1] with ImageNet's mean and standard deviation of each channel."""
    channels = [
        ((images[:, channel] + 1) / 2 - mean) / std
        for channel, (mean, std) in enumerate(zip(IMAGENET_MEAN, IMAGENET_STD, strict=True))
    ]
    return torch.stack(channels, dim=1)


def _precise(images: Tensor) -> Tensor:
    return images if images.dtype == torch.float64 else images.float()


# --- Weights ---


def load(backbone: VisionTransformer, state: Mapping[str, Tensor], config: FeaturesDiscriminatorConfig) -> None:
    """Copy published weights into a backbone; UserError unless they are complete and of its shapes."""
    wanted = backbone.state_dict()
    source = f"{KEY}.weights: {config.weights}"
    for name, tensor in wanted.items():
        found = state.get(name)
        if not isinstance(found, Tensor) or found.shape != tensor.shape:
            problem = f"{name} is missing" if found is None else f"{name} has another shape"
            raise UserError(f"{source}: not weights of {_name(config)}: {problem}; {_remedy(config)}")
    if unknown := [name for name in state if name not in wanted and not UNUSED.fullmatch(name)]:
        raise UserError(f"{source}: not weights of {_name(config)}: it has {unknown[0]} besides; {_remedy(config)}")
    backbone.load_state_dict({name: state[name].float() for name in wanted})
    if config.transformer.rotary:  # DINOv3 leaves out the keys' biases by a mask beside them
        for block in backbone.blocks:
            block.attn.qkv.bias.data.view(3, -1)[1] = 0


def _read(config: FeaturesDiscriminatorConfig) -> Mapping[str, Tensor]:
    path = Path(config.weights)
    if not path.is_file():
        path = _downloaded(config)
    if config.sha256 is not None and hashlib.sha256(path.read_bytes()).hexdigest() != config.sha256:
        raise UserError(f"{path}: SHA-256 differs from {KEY}.sha256; the file is damaged or another one")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # both raise many kinds for a file that is none of theirs
        reason = why_unreadable(error)
        raise UserError(f"{path}: not a file of weights ({reason}); {_remedy(config)}") from error
    if not isinstance(state, Mapping):
        raise UserError(f"{path}: not a file of weights (it holds no mapping of tensors); {_remedy(config)}")
    return state


def _downloaded(config: FeaturesDiscriminatorConfig) -> Path:
    """The file of a repository of the Hub, downloaded once."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging

    repository = config.weights
    if repository == "download":
        repository = REPOSITORIES.get(config.backbone) if isinstance(config.backbone, str) else None
        if repository is None:
            raise UserError(f"{KEY}.weights: those of {_name(config)} must be given; {_remedy(config)}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository) or re.search(r"\.(pth?|safetensors|bin)$", repository):
        raise UserError(f"{KEY}.weights: no file at {repository!r}; {_remedy(config)}")
    loud = logging.get_verbosity()
    logging.set_verbosity_error()  # it announces every attempt
    try:
        return Path(hf_hub_download(repository, "model.safetensors", library_name="ibq"))
    except Exception as error:  # of whatever library the Hub's client talks through
        raise UserError(
            f"{KEY}.weights: {repository} could not be downloaded ({why_unreadable(error)}); {_remedy(config)}"
        ) from error
    finally:
        logging.set_verbosity(loud)


def _remedy(config: FeaturesDiscriminatorConfig) -> str:
    given = "the published" if isinstance(config.backbone, str) else "a"
    return f"give {given} file of {_name(config)} by {KEY}.weights=FILE, or set {KEY}.kind=patch"


def _name(config: FeaturesDiscriminatorConfig) -> str:
    if isinstance(config.backbone, str):
        return config.backbone
    of = config.transformer
    return f"vit_{of.width}x{of.depth}_patch{of.patch}"


def _digest(config: FeaturesDiscriminatorConfig, state: Mapping[str, Tensor]) -> str:
    """SHA-256 of what is computed, and of the weights' names and values."""
    digest = hashlib.sha256(repr((config.transformer, config.layers, config.side)).encode())
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
