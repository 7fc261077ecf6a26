"""The settings that codes are drawn with: the one place for their names, defaults, limits and help.

Reads no PyTorch, so that commands can show their options at once.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

Precision = Literal["fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
Schedule = Literal["constant", "linear", "cosine", "power-cosine", "interval"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
# What images seeds give: 1 drew noise by a generator a row, 2 by `ibq/noise.py` and the inverse of the distribution.
SAMPLER_VERSION = 2
LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How codes are drawn.

    `guidance_scale` s gives the logits uncond + s * (cond - uncond) (arXiv 2207.12598); 1.0 is no guidance
    and costs half. `temperature` 0 takes the likeliest code; `top_k` 0 and `top_p` 1.0 are off.
    `guidance_schedule` changes s over the codes of an image, see `scales`. `rows_per_block` images are decoded
    together, the last block padded: more is faster per image and takes more memory; another number may round
    differently. `precision` is that of the weights. `grid` may be any, also one that the model was not trained on.
    What "auto" and no `grid` mean follows from the device and the model: `settle` of `ibq/decoding.py`.
    The help is that of the tools' options, see `tools/lib/options.py`.
    Errors: ValueError for values out of range, that begins with the field's name.
    """

    guidance_scale: float = field(
        default=2.0, metadata={"help": "classifier-free guidance; 1 switches it off (default: 2)"}
    )
    guidance_schedule: Schedule = field(default="constant", metadata={"help": "over the image's codes; ibq/sampler.py"})
    guidance_power: float = field(default=2.75, metadata={"help": "of power-cosine (default: 2.75)"})
    guidance_interval: tuple[float, float] = field(
        default=(0.0, 1.0), metadata={"help": "of interval", "metavar": ("A", "B")}
    )
    temperature: float = field(default=1.0, metadata={"help": "0 is greedy"})
    top_k: int = field(default=0, metadata={"help": "only the k likeliest codes; 0 allows all"})
    top_p: float = field(default=1.0, metadata={"help": "only the likeliest codes up to this probability"})
    rows_per_block: int | Literal["auto"] = field(
        default="auto",
        metadata={
            "help": "images drawn together (auto: by the GPU's memory; 16 on the CPU, and for the page); "
            "another number may round differently",
            "option": "--rows",
            "metavar": "N",
        },
    )
    precision: Literal["auto", "fp32", "bf16"] = field(
        default="auto",
        metadata={"help": "of the networks (auto: bf16 on a GPU, fp32 on the CPU); the quantizer stays in fp32"},
    )
    grid: tuple[int, int] | None = field(
        default=None,
        metadata={"help": "rows and columns of codes (default: the first that the model has)", "metavar": ("H", "W")},
    )

    def __post_init__(self):
        if not 0.0 <= self.guidance_scale < math.inf:
            raise ValueError(f"guidance_scale: {self.guidance_scale} is out of range; use 0 or more; 1 is off")
        if self.guidance_schedule not in SCHEDULES:
            names = ", ".join(SCHEDULES)
            raise ValueError(f"guidance_schedule: {self.guidance_schedule!r} does not exist; use one of {names}")
        if not 0 < self.guidance_power < math.inf:
            raise ValueError(
                f"guidance_power: {self.guidance_power} is not positive; MDTv2 takes 4, RAR 2.75 for its smallest model"
            )
        first, last = self.guidance_interval
        if not 0.0 <= first <= last <= 1.0:
            raise ValueError(
                f"guidance_interval: {first} to {last} is no part of the image; use 0 <= first <= last <= 1"
            )
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"temperature: {self.temperature} is out of range; use 0 (greedy) or more")
        if self.rows_per_block != "auto" and self.rows_per_block < 1:
            raise ValueError(f"rows_per_block: {self.rows_per_block} is out of range; use at least 1")
        check_filter(self.top_k, self.top_p)
        if self.grid is not None and (len(self.grid) != 2 or min(self.grid) < 1):
            shown = " x ".join(map(str, self.grid))
            raise ValueError(f"grid: {shown} is no number of rows and one of columns; use two numbers of at least 1")
        if self.precision != "auto":
            check_precision(self.precision)

    @property
    def filtered(self) -> bool:
        """Whether codes may be left out."""
        return self.top_k > 0 or self.top_p < 1

    @property
    def guided(self) -> bool:
        """Whether the model without class is needed."""
        return self.guidance_scale != 1.0

    @property
    def rows(self) -> int:
        """Sequences that are decoded at once: of every image with its class, and with guidance without it.

        ValueError where `rows_per_block` is not settled.
        """
        if self.rows_per_block == "auto":
            raise ValueError("rows_per_block: auto is no number yet; see `settle` of ibq/decoding.py")
        return self.rows_per_block * (2 if self.guided else 1)

    def scales(self, tokens: int) -> list[float]:
        """The guidance s of each of `tokens` codes, for logits uncond + s (cond - uncond).

        With t = i / (tokens - 1) from 0 to 1 for code i:

            constant       s
            linear         1 + (s - 1) t
            cosine         1 + (s - 1) (1 - cos(pi t)) / 2
            power-cosine   1 + (s - 1) (1 - cos(pi t^power)) / 2     (MDTv2, arXiv 2303.14389)
            interval       s where interval[0] <= t <= interval[1], else 1     (arXiv 2404.07724)
        """
        times = (i / max(tokens - 1, 1) for i in range(tokens))
        return [1.0 + (self.guidance_scale - 1.0) * self._share(t) for t in times]

    def _share(self, t: float) -> float:
        """Of the guidance at time t, 0 to 1."""
        match self.guidance_schedule:
            case "constant":
                return 1.0
            case "linear":
                return t
            case "cosine":
                return (1 - math.cos(math.pi * t)) / 2
            case "power-cosine":
                return (1 - math.cos(math.pi * t**self.guidance_power)) / 2
            case "interval":
                first, last = self.guidance_interval
                return float(first <= t <= last)


def check_filter(top_k: int, top_p: float) -> None:
    """ValueError for a negative top_k or a top_p outside [0, 1]."""
    if top_k < 0:
        raise ValueError(f"top_k: {top_k} is negative; use 0 (off) or more")
    if not 0.0 <= top_p <= 1.0:
        raise ValueError(f"top_p: {top_p} is not a probability; use 0 to 1 (off)")


def check_precision(precision: str) -> None:
    """ValueError for one that does not exist."""
    if precision == "int8":
        raise ValueError("precision: int8 is gone, as it was slower than bf16 wherever it was measured; use bf16")
    if precision not in PRECISIONS:
        raise ValueError(f"precision: {precision!r} does not exist; use one of auto, {', '.join(PRECISIONS)}")
