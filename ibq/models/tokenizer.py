"""The image tokenizer: an encoder and a decoder around a quantizer."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_dataclass

from ibq.models import open_magvit2, vqgan
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.quantizers import build_quantizer


@dataclass(frozen=True, kw_only=True)
class TokenizerOutput:
    """What one pass through the tokenizer gives."""

    reconstruction: Tensor  # [B, 3, H, W], about [-1, 1], not clamped
    codes: Tensor  # [B, h, w]
    losses: dict[str, Tensor]  # unweighted scalars of the quantizer
    metrics: dict[str, Tensor]  # detached scalars of the quantizer


# So that hooks on a module's output, as engines have them, find the tensors in it.
register_dataclass(TokenizerOutput)


class Tokenizer(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] <-> codes [B, h, w].

    `downsampling`: pixels per token along a side; `tokens_per_side`: at the nominal resolution.
    """

    # Besides `forward`, for engines that gather weights for a call: (path of a module, method).
    forward_methods = (("", "encode_latents"), ("", "encode"), ("", "decode"), ("", "code_vectors"))

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config = config
        self.downsampling, self.tokens_per_side = config.downsampling, config.tokens_per_side
        network = vqgan if config.network == "vqgan" else open_magvit2
        self.encoder = network.Encoder(config)
        self.decoder = network.Decoder(config)
        self.quantizer = build_quantizer(config.quantizer)
        if config.network == "vqgan":
            self.quant_conv = nn.Conv2d(config.latent_channels, self.quantizer.dim, 1)
            self.post_quant_conv = nn.Conv2d(self.quantizer.dim, config.latent_channels, 1)
        else:
            self.quant_conv = self.post_quant_conv = nn.Identity()

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight whose gradients balance the adaptive GAN weight."""
        return self.decoder.conv_out.weight

    def units(self) -> list[nn.Module]:
        """The parts that an engine compiles, and gathers if it shards weights, one at a time."""
        return [*self.encoder.units(), *self.decoder.units()]

    def kept_whole(self) -> list[nn.Parameter]:
        """The weights that are not to be sharded: losses ask for their gradients."""
        return [self.last_layer]

    def forward(self, images: Tensor | None, losses: bool = True, codes: Tensor | None = None) -> TokenizerOutput:
        """Reconstruct images [B, 3, H, W]; without `losses` the quantizer's are not computed, nor its metrics.

        Of given `codes` [B, h, w] the images are made, in place of any that are given, and there are no losses.
        """
        if codes is not None:
            reconstruction = self.decode_latents(self.quantizer.lookup(codes))
            return TokenizerOutput(reconstruction=reconstruction, codes=codes, losses={}, metrics={})
        latents = self.encode_latents(images)
        if not losses and not self.quantizer.passthrough:
            codes = self.quantizer.encode(latents)
            reconstruction = self.decode_latents(self.quantizer.lookup(codes))
            return TokenizerOutput(reconstruction=reconstruction, codes=codes, losses={}, metrics={})
        out = self.quantizer(latents)
        return TokenizerOutput(
            reconstruction=self.decode_latents(out.latents), codes=out.codes, losses=out.losses, metrics=out.metrics
        )

    def encode_latents(self, images: Tensor) -> Tensor:
        """Latents [B, D, h, w] before the quantizer."""
        self.check_images(images)
        return self.quant_conv(self.encoder(images))

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] of quantized latents [B, D, h, w]."""
        if latents.is_cpu:
            # The quantizer has one token after the other, which convolutions take for channels-last images, and the
            # gradient of a group normalization of those takes a CPU ten times as long.
            latents = latents.contiguous()
        return self.decoder(self.post_quant_conv(latents))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Codes [B, h, w] int64 of images [B, 3, H, W] in [-1, 1]; ValueError if H or W do not divide."""
        return self.quantizer.encode(self.encode_latents(images))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Images [B, 3, H, W], about [-1, 1], of codes [B, h, w]; ValueError for codes out of range."""
        return self.decode_latents(self.quantizer.lookup(codes))

    @torch.no_grad()
    def code_vectors(self) -> Tensor:
        """The latents [K, D] that the codes stand for: a copy, also where weights are gathered for this call alone."""
        return self.quantizer.code_vectors().clone()

    def merged(self) -> "Tokenizer":
        """This tokenizer for use, its quantizer without projector (`CodebookQuantizer.merged`); weights are shared.

        ValueError where there is none.
        """
        if getattr(self.quantizer, "projector", None) is None:
            raise ValueError("quantizer.projector: this tokenizer has none to merge into its codebook; use it as it is")
        quantizer = self.quantizer.merged()
        with torch.device("meta"):
            merged = Tokenizer(replace(self.config, quantizer=quantizer.config))
        others = {name: t for name, t in self.state_dict().items() if not name.startswith("quantizer.")}
        codebook = {f"quantizer.{name}": tensor for name, tensor in quantizer.state_dict().items()}
        merged.load_state_dict(others | codebook, assign=True)
        return merged.train(self.training).requires_grad_(False)

    def check_images(self, images: Tensor) -> None:
        """ValueError unless the images can be encoded."""
        factor = self.downsampling
        if not images.is_floating_point():
            raise ValueError(f"images must be in [-1, 1], got {images.dtype}; give images.float() / 127.5 - 1")
        if images.dim() != 4 or images.shape[1] != self.config.in_channels:
            raise ValueError(
                f"images must be [B, {self.config.in_channels}, H, W] in [-1, 1], got {tuple(images.shape)}"
            )
        if images.shape[2] % factor or images.shape[3] % factor:
            raise ValueError(
                f"image height and width must be multiples of {factor}, got {images.shape[2]} x {images.shape[3]}; "
                "crop or resize first"
            )
