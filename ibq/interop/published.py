"""What is found in a published file, whichever family it is of, and the checks that all families share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ibq.config import config_to_dict
from ibq.interop.reference_tensors import require_same_tensors
from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.models.transformer import Transformer, TransformerConfig

ModelConfig = TokenizerConfig | TransformerConfig


@dataclass(frozen=True, kw_only=True)
class Hints:
    """What shapes do not show and a user may say."""

    kind: type[nn.Module] | None = None  # only the models of this class are wanted
    transformer: TransformerConfig | None = None
    resolution: int | None = None  # pixels along a side of the images that a tokenizer is for
    arguments: Mapping[str, Any] | None = None  # the reference's model arguments: `model.init_args` of its YAML file


@dataclass(frozen=True, kw_only=True)
class Published:
    """One model of a published file."""

    config: ModelConfig
    tensors: dict[str, Tensor]  # for load_state_dict(strict=True) of the model
    weights: str  # "ema" or "raw"
    rest: dict[str, Tensor] = field(default_factory=dict)  # what else the file holds, under its own names

    @property
    def kind(self) -> type[nn.Module]:
        """The model's class."""
        return Tokenizer if isinstance(self.config, TokenizerConfig) else Transformer

    def describe(self) -> dict:
        """What a file of this project says of the model beside its tensors; see `ibq.engine.state_files.describe`."""
        return {"kind": self.kind.__name__, "config": config_to_dict(self.config)}


def require_config(
    config: ModelConfig, tensors: Mapping[str, Tensor], source: str, name: Callable[[str], str] = str
) -> None:
    """ValueError unless the tensors (our names) are those of a model with this configuration; `name` gives theirs."""
    kind = Tokenizer if isinstance(config, TokenizerConfig) else Transformer
    with torch.device("meta"):
        state = kind(config).state_dict()
    found = {name(key): tuple(value.shape) for key, value in tensors.items()}
    require_same_tensors(found, {name(key): tuple(value.shape) for key, value in state.items()}, source)


def require_settings(config: ModelConfig, wanted: Mapping[str, Any], family: str) -> None:
    """ValueError that names the first setting which a family's own code does not have."""
    for path, value in wanted.items():
        found = config
        for part in path.split("."):
            found = getattr(found, part)
        if found != value:
            raise ValueError(f"{path}: {found!r} does not fit {family}, whose code has {value!r}; export .safetensors")
