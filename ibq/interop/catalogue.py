"""The published models: where their files lie, and what their publishers report of them.

Places, figures and sampler settings are those of the publishers' own pages: SEED-Voken's docs/IBQ.md,
docs/Open-MAGVIT2.md and scripts/evaluation/sample_gpu.sh, LlamaGen's README.md (read in 2026). Nothing here has been
measured with this project.
"""

from dataclasses import dataclass, field

from ibq.sampler import SamplerConfig


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One published model."""

    family: str
    repository: str
    file: str
    resolution: int = 256  # pixels that the figures are of
    reported: dict[str, float] = field(default_factory=dict)  # on ImageNet's validation set; of AR models FID and IS
    sampler: SamplerConfig | None = None  # of AR models

    @property
    def is_transformer(self) -> bool:
        """Whether it draws codes; its file then holds its tokenizer too."""
        return self.sampler is not None


def _ibq(file: str, name: str, **reported: float) -> Entry:
    return Entry(family="seed-voken", repository=f"TencentARC/IBQ-{name}", file=file, reported=reported)


def _ar(size: str, sampler: SamplerConfig, **reported: float) -> Entry:
    return Entry(
        family="seed-voken",
        repository=f"TencentARC/IBQ-AR-{size}",
        file=f"AR_256_{size}.ckpt",
        reported=reported,
        sampler=sampler,
    )


def _magvit(file: str, name: str, resolution: int = 256, **reported: float) -> Entry:
    return Entry(
        family="open-magvit2",
        repository=f"TencentARC/Open-MAGVIT2-Tokenizer-{name}",
        file=file,
        resolution=resolution,
        reported=reported,
    )


def _magvit_ar(size: str, sampler: SamplerConfig, **reported: float) -> Entry:
    return Entry(
        family="open-magvit2",
        repository=f"TencentARC/Open-MAGVIT2-AR-{size}-256-resolution",
        file=f"AR_256_{size}.ckpt",
        reported=reported,
        sampler=sampler,
    )


def _llamagen(file: str, **reported: float) -> Entry:
    return Entry(family="llamagen", repository="FoundationVision/LlamaGen", file=file, reported=reported)


CATALOGUE = {
    "ibq-1024": _ibq("imagenet256_1024.ckpt", "Tokenizer-1024", rfid=2.24, lpips=0.2580),
    "ibq-8192": _ibq("imagenet256_8192.ckpt", "Tokenizer-8192", rfid=1.87, lpips=0.2437),
    "ibq-16384": _ibq("imagenet256_16384.ckpt", "Tokenizer-16384", rfid=1.37, lpips=0.2235),
    "ibq-262144": _ibq("imagenet256_262144.ckpt", "Tokenizer-262144", rfid=1.00, lpips=0.2030),
    "ibq-16384-pretrain": _ibq("IBQ_pretrain_16384.ckpt", "Tokenizer-16384-Pretrain", rfid=2.06, psnr=22.01, ssim=0.61),
    "ibq-262144-pretrain": _ibq(
        "IBQ_pretrain_262144.ckpt", "Tokenizer-262144-Pretrain", rfid=1.53, psnr=22.69, ssim=0.64
    ),
    "ar-b": _ar("B", SamplerConfig(guidance_scale=2.25, temperature=1.10), fid=2.88, inception_score=254.73),
    "ar-l": _ar("L", SamplerConfig(guidance_scale=2.0, temperature=1.00), fid=2.45, inception_score=267.48),
    "ar-xl": _ar("XL", SamplerConfig(guidance_scale=2.35, temperature=1.15), fid=2.14, inception_score=278.99),
    "ar-xxl": _ar("XXL", SamplerConfig(guidance_scale=2.85, temperature=1.20), fid=2.05, inception_score=286.73),
    "open-magvit2-256": _magvit("imagenet_256_L.ckpt", "256-resolution", rfid=1.17, psnr=21.90),
    "open-magvit2-128": _magvit("imagenet_128_L.ckpt", "128-resolution", 128, rfid=1.18, psnr=25.08),
    "open-magvit2-16384-pretrain": _magvit(
        "pretrain256_16384.ckpt", "16384-Pretrain", rfid=2.55, psnr=22.21, ssim=0.62
    ),
    "open-magvit2-262144-pretrain": _magvit(
        "pretrain256_262144.ckpt", "262144-Pretrain", rfid=1.67, psnr=22.70, ssim=0.64
    ),
    # Its script guides and heats the two sub-codes by numbers of their own; here one serves both, their mean.
    # B: guidance 1.9 and 2.0, temperature 1 and 1; L: 1.9 and 1.9, 1.1 and 1; XL: 1.75 and 1.85, 1.1 and 1.
    "open-magvit2-ar-b": _magvit_ar("B", SamplerConfig(guidance_scale=1.95), fid=3.08, inception_score=258.26),
    "open-magvit2-ar-l": _magvit_ar(
        "L", SamplerConfig(guidance_scale=1.9, temperature=1.05), fid=2.51, inception_score=271.70
    ),
    "open-magvit2-ar-xl": _magvit_ar(
        "XL", SamplerConfig(guidance_scale=1.8, temperature=1.05), fid=2.33, inception_score=271.77
    ),
    "llamagen-vq16": _llamagen("vq_ds16_c2i.pt", rfid=2.19),
    "llamagen-vq8": _llamagen("vq_ds8_c2i.pt", rfid=0.59),
}
