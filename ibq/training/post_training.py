"""Codes to train a decoder alone on: those of images, perturbed, or partly drawn by a trained transformer.

RobusTok (arXiv 2509.12474): a decoder learns from the encoder's codes, but what it decodes in use was drawn, so that it
meets codes that no image has. Its latent perturbation is section "main training" there, and its post-training decodes
what a transformer has drawn in place of some codes of an image; both are to give the image. Encoder and quantizer stay
as they are, and with them all codes that were written and every transformer that was trained on them.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ibq.api import load_transformer, same_codes_as
from ibq.config import UserError
from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.models.transformer import Transformer
from ibq.ops.codebook import nearest_codes
from ibq.sampler import SamplerConfig, Schedule
from ibq.sampling import draw
from ibq.training.checkpoint import weights_hash
from ibq.training.schedule import annealed
from ibq.training.start_from.config import TokenizerStartConfig
from ibq.training.start_from.places import Source, known_tokenizer

FROZEN, TRAINED = ("encoder", "quant_conv", "quantizer"), ("decoder", "post_quant_conv")  # the first make the codes
SAMPLER = ("temperature", "guidance_scale", "guidance_schedule", "guidance_power", "top_k", "top_p")


@dataclass(frozen=True, kw_only=True)
class PerturbedCodesConfig:
    """Latent perturbation: each code of some images becomes one of its nearest in the codebook.

    An image is perturbed with probability `images` (the paper's proportion beta), and of it each code with probability
    `share` (rate alpha): it becomes one of the `neighbours` (strength delta) codes that are nearest to it, itself among
    them, each as likely. Between `start` and `end`, shares of the run, `share` and `neighbours` fall linearly to `last`
    of what they are. alpha, beta, delta and the half are published; how long the annealing is to take is not.
    """

    kind: Literal["perturbed"] = "perturbed"
    images: float = 0.1
    share: float = 1.0
    neighbours: int = 100
    start: float = 0.0
    end: float = 1.0
    last: float = 0.5

    def __post_init__(self):
        for name in ("images", "share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: must lie in (0, 1], got {getattr(self, name)}; it is a probability")
        if self.neighbours < 2:
            raise ValueError(f"neighbours: must be at least 2, got {self.neighbours}; a code is the first of its own")
        if not 0 <= self.start <= self.end <= 1:
            raise ValueError(f"start: must lie between 0 and end, at most 1, got {self.start} and {self.end}")
        if not 0 < self.last <= 1:
            raise ValueError(f"last: must lie in (0, 1], got {self.last}; 1 anneals nothing")

    def strength(self, progress: float) -> float:
        """What is left of share and neighbours after so much of the run."""
        return self.last + (1 - self.last) * annealed(progress, start=self.start, end=self.end)


@dataclass(frozen=True, kw_only=True)
class GeneratedCodesConfig:
    """Codes of the images, of which each stays with probability `keep` and is else drawn by a trained transformer.

    `prefix` is what a code is drawn after: the image's own codes, so that one pass draws all, or, as published, what
    was kept and drawn so far, which is a pass for each code. With `keep: 0` the latter draws freely: its images have no
    more than the class in common with those that they are to give. How codes are drawn is as in `SamplerConfig`.
    """

    kind: Literal["generated"] = "generated"
    transformer: str  # what ibq.load_transformer reads
    keep: float = 0.7  # the paper's preservation ratio sigma
    prefix: Literal["image", "drawn"] = "image"
    temperature: float = SamplerConfig.temperature
    guidance_scale: float = SamplerConfig.guidance_scale
    guidance_schedule: Schedule = SamplerConfig.guidance_schedule
    guidance_power: float = SamplerConfig.guidance_power
    top_k: int = SamplerConfig.top_k
    top_p: float = SamplerConfig.top_p

    def __post_init__(self):
        if not 0 <= self.keep < 1:
            raise ValueError(f"keep: must lie in [0, 1), got {self.keep}; it is the share of codes that stay")
        if self.keep == 0 and self.prefix == "image":
            raise ValueError("keep: 0 leaves nothing of the image; set prefix=drawn to draw freely, or keep some codes")
        _ = self.sampler  # whose checks name the same fields

    @property
    def sampler(self) -> SamplerConfig:
        """How codes are drawn."""
        return SamplerConfig(**{name: getattr(self, name) for name in SAMPLER})


CodesConfig = PerturbedCodesConfig | GeneratedCodesConfig


def check_codes(codes: CodesConfig, start: TokenizerStartConfig | None, groups: Iterable[str]) -> None:
    """ValueError unless a run with such codes begins with a trained tokenizer, whose codes mean what they meant.

    `groups`: the patterns of its `OptimizerConfig.groups`.
    """
    if start is None:
        raise ValueError(f"codes: {codes.kind} trains the decoder of a trained tokenizer; give it as start_from")
    if start.codebook != "same":
        raise ValueError(
            f"codes: {codes.kind} leaves the codes as they are; set start_from.codebook=same, or train without codes"
        )
    for pattern in groups:
        named = {part for part in (*FROZEN, *TRAINED) if fnmatchcase(part, pattern.split(".")[0])}
        if named and named <= {*FROZEN}:
            raise ValueError(
                f"optimizer.groups: {pattern} is of what makes codes, which codes: {codes.kind} freezes by itself; "
                "leave it out"
            )


def frozen_groups(build: Callable[[], nn.Module]) -> dict[str, Literal["frozen"]]:
    """The patterns of `OptimizerConfig.groups` that freeze what makes the codes of the tokenizer of `build`."""
    with torch.device("meta"):
        parts = {name.split(".")[0] for name, _ in build().named_parameters()}
    return {f"{part}.*": "frozen" for part in FROZEN if part in parts}


def origin_of_codes(origin: Mapping) -> dict[str, str]:
    """`codes_of`: the hash of the tokenizer whose codes a run's has, from where it began (`Start.origin`), if known."""
    start = origin.get("start_from")
    return {} if start is None else {"codes_of": start.get("codes_of", start["weights_sha256"])}


def codes_hash(path: str | Path, tokenizer: Tokenizer) -> str:
    """The hash of the tokenizer whose codes those of a loaded one are: its own, or that of an earlier one (`codes`)."""
    return same_codes_as(path) or weights_hash(tokenizer.state_dict())


def open_transformer(
    config: GeneratedCodesConfig,
    model: TokenizerConfig,
    num_classes: int,
    device: torch.device,
    dtype: torch.dtype,
    buckets: Sequence[tuple[int, int]] = (),
) -> Transformer:
    """The frozen transformer that draws codes; UserError for one that is not of such a tokenizer and such classes.

    `buckets`: heights and widths of the images, where they are not squares of the model's resolution.
    """
    transformer = load_transformer(config.transformer, device=device).to(dtype)
    found = transformer.config
    if found.head.kind != "plain":
        raise UserError(
            f"{config.transformer}: its head.kind is {found.head.kind}, but codes are drawn here by the logits of a "
            "plain one; give a transformer with that"
        )
    wanted = {"vocab_size": model.quantizer.num_codes, "num_classes": num_classes}
    for name, value in wanted.items():
        if getattr(found, name) != value:
            what = "the tokenizer's codes" if name == "vocab_size" else "the classes of data.train"
            raise UserError(
                f"{config.transformer}: its {name} is {getattr(found, name)}, but {what} are {value}; give the "
                "transformer that was trained on them"
            )
    for grid in [model.grid_of(*shape) for shape in buckets] or [model.grid_of(model.resolution, model.resolution)]:
        if grid not in found.code_grids:
            known = ", ".join(f"{rows} x {columns}" for rows, columns in found.code_grids)
            key = "data.buckets" if buckets else "model.resolution"
            raise UserError(
                f"{config.transformer}: is for {known} codes, not for {grid[0]} x {grid[1]}; set {key}, or give another"
            )
    return transformer


def check_origin(config: GeneratedCodesConfig, source: Source) -> None:
    """UserError unless the transformer knows the codes of the tokenizer that a run starts from, as far as both tell."""
    known = known_tokenizer(Path(config.transformer))
    if known is not None and known not in (weights_hash(source.tensors), source.codes_of):
        raise UserError(
            f"{config.transformer}: was trained on codes of another tokenizer than {source.place}; give its own as "
            "codes.transformer"
        )


# --- Perturbed ---


class Perturbation:
    """Perturbs codes of images as a run's config says.

    `code_vectors` gives the codebook's [K, D]; it is asked once, when the first codes are perturbed: a run's first
    weights come later than its task. `progress`: the share of the run that lies before a step.
    """

    def __init__(
        self, config: PerturbedCodesConfig, code_vectors: Callable[[], Tensor], progress: Callable[[int], float]
    ):
        self.config, self._code_vectors, self._progress = config, code_vectors, progress
        self._nearest: Tensor | None = None  # [K, neighbours], the nearest first

    @torch.no_grad()
    def __call__(self, codes: Tensor, classes: Tensor, step: int) -> Tensor:
        """Codes [B, h, w] of images at a step, perturbed."""
        if self._nearest is None:
            self._nearest = nearest_codes(self._code_vectors(), self.config.neighbours)
        strength = self.config.strength(self._progress(step))
        count = max(int(strength * self._nearest.shape[1]), 1)
        return perturb(codes, self._nearest[:, :count], images=self.config.images, share=strength * self.config.share)


def perturb(codes: Tensor, nearest: Tensor, *, images: float, share: float) -> Tensor:
    """Codes [B, h, w], of which some become one of their row in `nearest` [K, n]; drawn as dropout is.

    An image is perturbed with probability `images`, and each of its codes then with probability `share` (RobusTok,
    arXiv 2509.12474, figure 2).
    """
    chosen = torch.rand(len(codes), 1, 1, device=codes.device) < images
    exchanged = torch.rand(codes.shape, device=codes.device) < share
    which = torch.randint(nearest.shape[1], codes.shape, device=codes.device)
    return torch.where(chosen & exchanged, nearest[codes, which].to(codes.dtype), codes)


# --- Generated ---


class Generation:
    """Has a frozen transformer draw some codes of images; it is in eval mode, in any precision."""

    def __init__(self, config: GeneratedCodesConfig, transformer: Transformer):
        self.config, self.transformer, self._sampler = config, transformer, config.sampler
        self._scales: dict[int, Tensor] = {}  # [T] of grids of T codes that were met

    @torch.no_grad()
    def __call__(self, codes: Tensor, classes: Tensor, step: int) -> Tensor:
        """Codes [B, h, w] of images of classes [B], some of them drawn; the random numbers are drawn as dropout is."""
        kept = torch.rand(codes.shape, device=codes.device) < self.config.keep
        numbers = torch.rand(codes.shape, dtype=torch.float64, device=codes.device)
        drawn = self._after_image if self.config.prefix == "image" else self._after_drawn
        with torch.autocast(codes.device.type, enabled=False):  # its weights are in the precision that is wanted
            return drawn(codes, classes, kept.flatten(1), numbers.flatten(1)).view_as(codes)

    def _after_image(self, codes: Tensor, classes: Tensor, kept: Tensor, numbers: Tensor) -> Tensor:
        """Each code by what the transformer says after all codes of the image before it; [B, T].

        One image at a time, for its logits [T, V] are many.
        """
        rows = []
        for own, label, number in zip(codes.split(1), classes.split(1), numbers, strict=True):
            logits = [self.transformer.logits(own, given)[0] for given in self._conditions(label)]
            rows.append(draw(self._guided(logits, self._scales_of(codes)), number[:, None], self._sampler)[:, 0])
        return torch.where(kept, codes.flatten(1), torch.stack(rows))

    def _after_drawn(self, codes: Tensor, classes: Tensor, kept: Tensor, numbers: Tensor) -> Tensor:
        """Each code by what the transformer says after those before it, kept or drawn; [B, T]."""
        conditions = self._conditions(classes)
        condition = self.transformer.condition(torch.cat(conditions))
        cache = self.transformer.new_cache(len(conditions) * len(classes), grid=tuple(codes.shape[1:]))
        own, scales, mixed = codes.flatten(1), self._scales_of(codes), []
        for position in range(own.shape[1]):
            before = mixed[-1].repeat(len(conditions)) if mixed else None
            logits = self.transformer.decode_step(before, condition, cache, position).chunk(len(conditions))
            drawn = draw(self._guided(logits, scales[position]), numbers[:, position, None], self._sampler)
            mixed.append(torch.where(kept[:, position], own[:, position], drawn[:, 0]))
        return torch.stack(mixed, dim=1)

    def _conditions(self, classes: Tensor) -> list[Tensor]:
        """The classes; with guidance also that of no class."""
        return [classes, torch.full_like(classes, self.transformer.null_class)][: 1 + self._sampler.guided]

    def _scales_of(self, codes: Tensor) -> Tensor:
        """The guidance [T, 1] of every code of a grid."""
        tokens = codes[0].numel()
        if tokens not in self._scales:
            self._scales[tokens] = torch.tensor(self._sampler.scales(tokens), device=codes.device)[:, None]
        return self._scales[tokens]

    @staticmethod
    def _guided(logits: Sequence[Tensor], scales: Tensor) -> Tensor:
        """Logits [R, V] from those with the class and, where there are any, those without, in float32 or float64."""
        given, *none = (x if x.dtype == torch.float64 else x.float() for x in logits)
        return none[0] + scales * (given - none[0]) if none else given


ChangeCodes = Perturbation | Generation


@contextlib.contextmanager
def same_numbers(device: torch.device) -> Iterator[None]:
    """Within this context random numbers on a device are the same at every call; after it they go on as before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield
