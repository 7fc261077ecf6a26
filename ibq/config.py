"""Typed configuration: defaults <- `inherit:` YAML <- YAML <- `key.path=value` on the command line.

Configurations are frozen dataclasses. Files become trees of nodes that remember where they were written,
the trees are laid over each other, and the result is converted by the declared types, so that every problem
is one line that names the file (with its line) or the command line, the key, and what to do about it.
"""

import builtins
import dataclasses
import difflib
import gc
import math
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from ibq.config_yaml import (
    INHERIT,
    ConfigError,
    Node,
    config_error,
    dump_yaml,
    join_key,
    one_line,
    parse_yaml,
    read_layers,
    shown,
    unwrap,
    wrap,
)
from ibq.extras import remedy_of

Config = TypeVar("Config")
COMMAND_LINE = "command line"
# PyYAML (YAML 1.1) reads a number as text where the point or the exponent's sign is missing: 1e-4, 1.5e3.
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
# What the user should do about a value that is not of the type.
_SCALARS = {
    bool: "write true or false",
    int: "write a whole number, without quotes",
    float: "write a number",
    str: "write text, in quotes if YAML reads it as something else",
    Path: "write a path, in quotes if YAML reads it as something else",
    types.NoneType: "write null",
}


class UserError(Exception):
    """A problem that the user can solve; its text is one line with a remedy."""

    exit_code = 2


def load_config(cls: type[Config], path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration `cls` from a YAML file, what it inherits, and `key.path=value` overrides.

    Sections merge key by key; a section whose `kind` changes is replaced; lists are replaced; a
    `dict[str, X]` merges with an inherited one but replaces the default. Raises ConfigError.
    """
    layers = read_layers(Path(path))
    if overrides:
        layers.append(_override_layer(overrides))
    return _build(cls, layers, str(path))


def load_section(
    cls: type[Config], path: str | Path, section: str, overrides: Sequence[str] = (), default: Config | None = None
) -> Config:
    """The configuration `cls` from one top-level section of a YAML file and what it inherits, such as `model`.

    Laid over `default`, which a choice of classes needs where the file may not choose.
    """
    layers = [] if default is None else [wrap(config_to_dict(default), str(path))]
    layers += [layer.value[section] for layer in read_layers(Path(path)) if section in layer.value]
    if overrides:
        layers.append(_override_layer(overrides))
    return _build(cls, layers or [Node({}, str(path))], f"{path}: {section}")


def parse_config(cls: type[Config], mapping: Mapping[str, Any], source: str = "mapping") -> Config:
    """The configuration `cls` from a mapping, as in a checkpoint; `source` names it in the ConfigError."""
    return _build(cls, [wrap(mapping, source)], source)


def config_to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain dicts, lists and scalars; `parse_config` turns it back into an equal one."""
    return _plain(config)


def dump_config(config: Any) -> str:
    """A configuration as YAML text; `load_config` turns it back into an equal one."""
    return dump_yaml(_plain(config))


def require_least(config: Any, **least: float) -> None:
    """Raise ValueError for a field that is less than it may be; None may stand for anything."""
    for name, value in least.items():
        found = getattr(config, name)
        if found is not None and found < value:
            raise ValueError(f"{name}: must be at least {value}, got {found}")


def exit_on_user_error(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and exit with its code; an error for the user: one line, their code, 2; Ctrl-C: exit 130."""
    gc.freeze()  # what was imported stays: no collection, in the midst of a step perhaps, looks through it again
    gc.enable()
    try:
        code = main()
    except (ConfigError, UserError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        if remedy := remedy_of(error):
            print(f"error: {remedy}", file=sys.stderr)
            code = UserError.exit_code
        elif not _one_of_several():
            raise
        else:
            traceback.print_exc()
            code = 1
    if _one_of_several():
        # One process of several: all files are closed by now, and gloo's threads have been seen to abort the
        # interpreter's own way out, which a launcher would take for a failure.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    sys.exit(code or 0)


def _one_of_several() -> bool:
    """Whether this is one rank of a larger world; known once `dist.setup` has read the launcher's variables."""
    return os.environ.get("WORLD_SIZE", "") not in ("", "1")


def _override_layer(overrides: Sequence[str]) -> Node:
    """All overrides as one layer, so that their order does not matter except for equal keys."""
    layer = Node({}, COMMAND_LINE)
    for text in overrides:
        key, equals, value = text.partition("=")
        names = key.strip().split(".")
        if not equals or not all(names):
            problem = "a part of the key is empty" if equals else "there is no '='"
            raise config_error(COMMAND_LINE, text, f"{problem}; write key.path=value")
        if not value.strip():  # a variable of the shell, perhaps, that is not set: no wish for YAML's null
            raise config_error(COMMAND_LINE, key.strip(), "there is no value; write null for none")
        node = parse_yaml(value, lambda line: COMMAND_LINE, key.strip())
        for name in reversed(names):
            node = Node({name: node}, COMMAND_LINE)
        layer = _overlay(layer, node, Any)
    return layer


# --- Merging: layers -> one tree ---


def _build(cls: type[Config], layers: list[Node], source: str) -> Config:
    assert _sections(cls), f"{cls} is neither a dataclass nor a choice of them"
    tree = None
    for layer in layers:
        tree = _overlay(tree, layer, cls)
    return _convert(tree, cls, "", source)


def _overlay(old: Node | None, new: Node, declared: Any) -> Node:
    """`new` laid over `old`, or over the declared defaults, for a value of type `declared`."""
    if isinstance(new.value, list):
        inner = _element_types(declared, len(new.value))
        elements = [_overlay(None, item, kind) for item, kind in zip(new.value, inner, strict=True)]
        return Node(elements, new.origin)
    if not isinstance(new.value, dict):
        return new
    items = old.value if old is not None and isinstance(old.value, dict) else {}
    if sections := _sections(declared):
        section = _choose(sections, new.value.get("kind", items.get("kind")))
        if "kind" in items and _choose(sections, items["kind"]) is not section:
            items = {}  # settings of another kind do not carry over
        if not items and section is not None:
            items = wrap(_defaults(section), "").value
        inner = _field_types(section) if section is not None else {}
    else:
        if old is not None and not old.origin:
            items = {}  # a dict[str, X] replaces its default, or nothing could ever be taken out of it
        inner = dict.fromkeys(new.value, _value_type(declared))
    merged = dict(items)
    for key, node in new.value.items():
        merged[key] = _overlay(merged.get(key), node, inner.get(key, Any))
    # A section that the command line only changes still belongs to its file.
    keep = items and old is not None and old.origin and new.origin == COMMAND_LINE
    return Node(merged, old.origin if keep else new.origin)


def _defaults(cls: type) -> dict[str, Any]:
    """The declared defaults as plain values, without the required fields."""
    values = {}
    for name, field in _fields(cls).items():
        if field.default is not dataclasses.MISSING:
            values[name] = _plain(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            values[name] = _plain(field.default_factory())
    return values


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {name: _plain(getattr(value, name)) for name in _fields(type(value))}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


# --- Converting: tree -> dataclass ---


def _convert(node: Node, declared: Any, key: str, origin: str) -> Any:
    """The node's value as `declared`; `key` and `origin` (of what is around it) name it in errors."""
    origin = node.origin or origin
    form = typing.get_origin(declared)
    if declared is Any:
        return unwrap(node)
    if dataclasses.is_dataclass(declared):
        return _convert_section(node, declared, key, origin)
    if form in (typing.Union, types.UnionType):
        return _convert_union(node, declared, key, origin)
    if form in (tuple, list):
        return _convert_sequence(node, declared, key, origin)
    if form is dict:
        _expect(isinstance(node.value, dict), node, "a mapping", "write `name: value` lines", key, origin)
        inner = _value_type(declared)
        return {name: _convert(item, inner, join_key(key, name), origin) for name, item in node.value.items()}
    if form is Literal:
        return _convert_literal(node, typing.get_args(declared), key, origin)
    return _convert_scalar(node, declared, key, origin)


def _convert_section(node: Node, cls: type, key: str, origin: str) -> Any:
    _expect(isinstance(node.value, dict), node, "a section", "write `key: value` lines under it", key, origin)
    fields, inner, values = _fields(cls), _field_types(cls), {}
    for name, item in node.value.items():
        if name not in fields:
            known = [*fields, INHERIT] if not key else [*fields]
            problem = f"unknown key; {_meant(name, known)}valid keys: {', '.join(fields)}"
            raise config_error(item.origin or origin, join_key(key, name), problem)
    missing = [join_key(key, name) for name in fields if name not in node.value and _required(fields[name])]
    if missing:
        raise config_error(origin, ", ".join(missing), "required and missing; add it there or as key.path=value")
    for name, item in node.value.items():
        values[name] = _convert(item, inner[name], join_key(key, name), origin)
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:
        name, colon, problem = str(error).partition(":")
        if not colon or name not in fields:
            raise config_error(origin, key, str(error)) from error
        written = node.value[name].origin if name in node.value else ""
        raise config_error(written or origin, join_key(key, name), problem) from error


def _convert_union(node: Node, declared: Any, key: str, origin: str) -> Any:
    options = [option for option in _options(declared) if option is not types.NoneType]
    if node.value is None and types.NoneType in _options(declared):
        return None
    sections = _sections(declared)
    if isinstance(node.value, dict) and sections:
        return _convert_section(node, _section_of_kind(node, sections, key, origin), key, origin)
    if len(options) == 1:
        return _convert(node, options[0], key, origin)
    # The option of exactly this type first, then any that the value can be converted to.
    for option in sorted(options, key=lambda option: option is not type(node.value)):
        try:
            return _convert(node, option, key, origin)
        except ConfigError:
            continue
    raise _unexpected(node, _described(declared), "write one of these", key, origin)


def _section_of_kind(node: Node, sections: list[type], key: str, origin: str) -> type:
    kind = node.value.get("kind")
    if section := _choose(sections, kind):
        return section
    kinds = [str(name) for section in sections for name in typing.get_args(_field_types(section)["kind"])]
    if kind is None:
        problem = f"required and missing; choose one of {', '.join(kinds)}"
        raise config_error(origin, join_key(key, "kind"), problem)
    raise _not_among(kind, kinds, join_key(key, "kind"), origin)


def _convert_sequence(node: Node, declared: Any, key: str, origin: str) -> Any:
    _expect(isinstance(node.value, list), node, _described(declared), "write [a, b, c]", key, origin)
    args, count = typing.get_args(declared), len(node.value)
    if typing.get_origin(declared) is tuple and Ellipsis not in args and len(args) != count:
        problem = f"expected {len(args)} values, got {count}; write exactly {len(args)}"
        raise config_error(origin, key, problem)
    values = [
        _convert(item, inner, f"{key}[{index}]", origin)
        for index, (item, inner) in enumerate(zip(node.value, _element_types(declared, count), strict=True))
    ]
    return typing.get_origin(declared)(values)


def _convert_literal(node: Node, choices: tuple, key: str, origin: str) -> Any:
    for choice in choices:
        if type(choice) is type(node.value) and choice == node.value:
            return choice
    raise _not_among(node, [str(choice) for choice in choices], key, origin)


def _convert_scalar(node: Node, declared: Any, key: str, origin: str) -> Any:
    if declared not in _SCALARS:
        raise TypeError(f"{key}: a configuration cannot hold a field of type {declared}")
    value = node.value
    if declared in (int, float) and isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value) if declared is float or "e" in value.lower() else value
    fits = type(value) is declared
    if declared is int:
        fits = fits or (isinstance(value, float) and value.is_integer())
    elif declared is float:  # any number but NaN, and no integer that is too large
        fits = type(value) in (int, float) and (abs(value) == math.inf or abs(value) <= sys.float_info.max)
    elif declared is Path:
        fits = isinstance(value, str) and value != ""
    _expect(fits, node, _described(declared), _SCALARS[declared], key, origin)
    return None if value is None else declared(value)


# --- Declared types ---


def _fields(cls: type) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(cls) if field.init}


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


@cache
def _field_types(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _options(declared: Any) -> tuple:
    union = typing.get_origin(declared) in (typing.Union, types.UnionType)
    return typing.get_args(declared) if union else (declared,)


def _sections(declared: Any) -> list[type]:
    return [option for option in _options(declared) if dataclasses.is_dataclass(option)]


def _choose(sections: list[type], kind: Node | None) -> type | None:
    """The only section, or the one of this `kind`."""
    if len(sections) == 1:
        return sections[0]
    matching = (cls for cls in sections if kind and kind.value in typing.get_args(_field_types(cls)["kind"]))
    return next(matching, None)


def _element_types(declared: Any, count: int) -> list:
    """The types of the `count` elements of a list or tuple; Any where they are not declared."""
    for option in _options(declared):
        args = typing.get_args(option)
        if typing.get_origin(option) is list or Ellipsis in args:
            return [args[0]] * count
        if typing.get_origin(option) is tuple:
            return [*args, *[Any] * count][:count]
    return [Any] * count


def _value_type(declared: Any) -> Any:
    """The X of dict[str, X]; Any where it is not declared."""
    mappings = [option for option in _options(declared) if typing.get_origin(option) is dict]
    return typing.get_args(mappings[0])[1] if mappings else Any


# --- Messages ---


def _unexpected(node: Node, what: str, remedy: str, key: str, origin: str) -> ConfigError:
    return config_error(node.origin or origin, key, f"expected {what}, got {shown(node)}; {remedy}")


def _expect(fits: bool, node: Node, what: str, remedy: str, key: str, origin: str) -> None:
    if not fits:
        raise _unexpected(node, what, remedy, key, origin)


def _not_among(node: Node, choices: Sequence[str], key: str, origin: str) -> ConfigError:
    problem = f"{shown(node)} is not possible; {_meant(node.value, choices)}choose one of {', '.join(choices)}"
    return config_error(node.origin or origin, key, problem)


def _meant(name: object, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(name), choices)
    return f"did you mean {' or '.join(near)}? " if near else ""


def _described(declared: Any) -> str:
    names = {types.NoneType: "null", Path: "a path", str: "text", int: "int", float: "float", bool: "bool"}
    if declared in names:
        return names[declared]
    if typing.get_origin(declared) is Literal:
        return " or ".join(str(choice) for choice in typing.get_args(declared))
    if len(_options(declared)) > 1:
        return " or ".join(_described(option) for option in _options(declared))
    if dataclasses.is_dataclass(declared):
        return declared.__name__
    elements = [_described(inner) for inner in typing.get_args(declared) if inner is not Ellipsis]
    match typing.get_origin(declared):
        case builtins.dict:
            return "a mapping"
        case builtins.tuple if Ellipsis not in typing.get_args(declared):
            return f"[{', '.join(elements)}]"
        case builtins.tuple | builtins.list:
            return f"a list of {elements[0]}"
    return str(declared)
