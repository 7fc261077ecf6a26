"""Command-line options that several tools share."""

import argparse
from collections.abc import Sequence
from dataclasses import Field, fields
from functools import partial
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ibq.config import UserError
from ibq.progress import say

if TYPE_CHECKING:
    import torch

    from ibq.data.counts import BadSample
    from ibq.data.index import ImageIndex
    from ibq.data.shards import ImageDataConfig
    from ibq.models.tokenizer_config import TokenizerConfig

# PyTorch is imported where it is needed: --help and mistakes in the options should not wait for it.
Settings = TypeVar("Settings")

# --- Options that are the fields of a dataclass ---


def add_settings(parser: argparse.ArgumentParser, kind: type, *names: str) -> None:
    """An option for each field of a dataclass (or those of `names`), with the help that its metadata has.

    Metadata may also give the `option` where it is not the field's name, and a `metavar`. Values are for the dataclass
    to check: `settings_of`.
    """
    hints = get_type_hints(kind)
    for field in fields(kind):
        if not names or field.name in names:
            more = {key: value for key, value in field.metadata.items() if key != "option"}
            more |= _reading(hints[field.name])
            default = list(field.default) if isinstance(field.default, tuple) else field.default
            parser.add_argument(option_of(field), dest=field.name, default=default, **more)


def _reading(hint: Any) -> dict[str, Any]:
    """How argparse reads a value of this type."""
    origin, parts = get_origin(hint), get_args(hint)
    words = [word for part in parts if get_origin(part) is Literal for word in get_args(part)]
    if origin in (Union, UnionType) and parts[0] is int and words:
        return {"type": partial(_number_or_word, words)}
    if origin in (Union, UnionType):  # with None
        return _reading(parts[0])
    if origin is tuple and parts[-1] is Ellipsis:
        return {"type": parts[0], "action": "append"}
    if hint is bool:
        return {"action": "store_true"}
    if origin is Literal:
        return {"metavar": f"{{{','.join(parts)}}}"}
    if origin is tuple:
        return {"type": parts[0], "nargs": len(parts)}
    return {"type": hint}


def _number_or_word(words: Sequence[str], text: str) -> int | str:
    if text not in words and not text.lstrip("-").isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number; give one, or {' or '.join(words)}")
    return text if text in words else int(text)


def option_of(field: Field) -> str:
    """The option of a field, such as --top-k."""
    return field.metadata.get("option", f"--{field.name.replace('_', '-')}")


def settings_of(kind: type[Settings], arguments: argparse.Namespace) -> Settings:
    """The dataclass that the options describe; UserError that names the option for a value that it refuses.

    Its ValueErrors begin with the field's name and a colon.
    """
    found = {field.name: getattr(arguments, field.name) for field in fields(kind) if field.name in arguments}
    try:
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in found.items()})
    except ValueError as error:
        name, _, problem = str(error).partition(":")
        option = next(option_of(field) for field in fields(kind) if field.name == name)
        raise UserError(f"{option}:{problem}") from error


def words_of(settings: Any) -> list[str]:
    """The options that give these settings, without those that are the defaults."""
    words = []
    for field in fields(settings):
        value = getattr(settings, field.name)
        if value != field.default:
            values = value if isinstance(value, tuple) else () if value is True else (value,)
            words += [option_of(field), *map(str, values)]
    return words


# --- Images ---


def add_image_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Which images, how many at once."""
    add = parser.add_argument
    add("--images", required=required, help="glob of tar shards, URLs with braces, or a folder of class folders")
    add("--split", choices=["all", "train", "validation"], default="all", help="part of the images")
    add("--validation-every", type=int, default=10, help="--split: every so many-th image is held out")
    add("--batch-size", type=int, default=32)
    add("--workers", type=int, default=2, help="processes that decode images; 0 decodes in this one")


def add_size_option(parser: argparse.ArgumentParser, default: str) -> None:
    """The size of images."""
    what = f"height and width of the images in pixels; one number: a square (default: {default})"
    parser.add_argument("--size", type=int, nargs="+", metavar=("H", "W"), help=what)


def grid_of_size(size: Sequence[int], tokenizer: "TokenizerConfig") -> tuple[int, int]:
    """Rows and columns of codes of images of --size; UserError where it is none."""
    if len(size) > 2:
        raise UserError(f"--size: expected height and width, or one number, got {len(size)}")
    try:
        return tokenizer.grid_of(size[0], size[-1])
    except ValueError as error:
        raise UserError(f"--size: {error}") from error


def open_images_of(arguments: argparse.Namespace, config: "ImageDataConfig | None" = None) -> "ImageIndex":
    """The images that the options name; UserError for impossible options."""
    from ibq.data.shards import open_split

    check_least(arguments, batch_size=1, workers=0, validation_every=2)
    return open_split(arguments.images, arguments.split, arguments.validation_every, config)


def say_left_out(samples: "Sequence[BadSample]") -> None:
    """Name images that can't be used."""
    for sample in samples:
        say(f"note: left out: shard {sample.shard}, image {sample.key!r}: {sample.reason}")


def check_least(arguments: argparse.Namespace, **least: int) -> None:
    """UserError for the first option that is less than it may be; one that is not given may be so."""
    for name, value in least.items():
        found = getattr(arguments, name)
        if found is not None and found < value:
            raise UserError(f"--{name.replace('_', '-')} must be at least {value}, got {found}")


# --- Device and precision ---


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Where."""
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if there is one")


def add_device_options(parser: argparse.ArgumentParser, precisions: Sequence[str] = ("fp32", "bf16")) -> None:
    """Where and in which precision."""
    add_device_option(parser)
    parser.add_argument(
        "--precision", choices=[*precisions], default="fp32", help="of the networks; the quantizer stays in fp32"
    )


def device_of(arguments: argparse.Namespace) -> "torch.device":
    """The device that the options name; UserError if it is not there."""
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device; use --device cpu")
    name = arguments.device if arguments.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def autocast_of(arguments: argparse.Namespace) -> "torch.autocast":
    """The precision that the options name, as a context."""
    import torch

    return torch.autocast(device_of(arguments).type, torch.bfloat16, enabled=arguments.precision == "bf16")
