"""The text side of `config.py`: YAML files as trees of nodes that remember their file and line.

`config.py` lays the trees over each other and converts them to dataclasses.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

INHERIT = "inherit"
# Files of the project's yaml/ that once had another name there; who types the old one is told the new one.
MOVED = {
    "ar_base.yaml": "base/transformer.yaml",
    "tokenizer_base.yaml": "base/tokenizer.yaml",
    "quickstart_tokenizer.yaml": "quickstart/tokenizer.yaml",
    "quickstart_transformer.yaml": "quickstart/transformer.yaml",
    "ablation_tokenizer.yaml": "ablations/tokenizer.yaml",
    "ablation_quantizers.yaml": "ablations/quantizers.yaml",
    "ablation_length.yaml": "ablations/length.yaml",
    "ablation_codebook_size.yaml": "ablations/codebook_size.yaml",
    "ablation_code_dim.yaml": "ablations/code_dim.yaml",
    "ablation_res_blocks.yaml": "ablations/res_blocks.yaml",
    "scaling_tokenizer.yaml": "scaling/tokenizer.yaml",
    "scaling_transformer.yaml": "scaling/transformer.yaml",
    "sweep_ar_scaling.yaml": "scaling/sweep.yaml",
}
_TAG = "tag:yaml.org,2002:"


class ConfigError(ValueError):
    """A problem in a configuration; one line: file (with line) or command line, key, problem and remedy."""

    exit_code = 2


@dataclass(frozen=True)
class Node:
    """A scalar, list of nodes or mapping of nodes, and where it was written; origin "" marks a default."""

    value: Any
    origin: str


def read_layers(path: Path, heirs: tuple[Path, ...] = ()) -> list[Node]:
    """The trees of the files that a file inherits, then its own; `heirs` are the files that led here.

    `inherit:` is a path or a list of paths, relative to the file. Raises ConfigError, also for circles.
    """
    root = _read_file(path)
    inherit = root.value.pop(INHERIT, Node([], str(path)))
    chain = (*heirs, path)
    layers = []
    for parent in _inherited_paths(inherit, path):
        if parent.resolve() in [file.resolve() for file in chain]:
            circle = " -> ".join(str(file) for file in (*chain, parent))
            raise config_error(inherit.origin, INHERIT, f"a circle of files ({circle}); remove one of the links")
        if not parent.exists():
            moved = _moved_to(parent)
            problem = f"moved to {moved}" if moved else f"does not exist; give a path relative to {path.parent}/"
            raise config_error(inherit.origin, INHERIT, f"{parent} {problem}")
        layers += read_layers(parent, chain)
    return [*layers, root]


def _inherited_paths(node: Node, path: Path) -> list[Path]:
    names = [item.value for item in node.value] if isinstance(node.value, list) else [node.value]
    if not all(isinstance(name, str) and name for name in names):
        problem = f"expected a path or a list of paths, got {shown(node)}; write `{INHERIT}: base.yaml`"
        raise config_error(node.origin, INHERIT, problem)
    return [path.parent / name for name in names]


def _read_file(path: Path) -> Node:
    """The top-level mapping of a file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        moved = _moved_to(path)
        problem = f"moved to {moved}" if moved else "file not found; give the path of a YAML file"
        raise config_error(str(path), "", problem) from None
    except (OSError, UnicodeDecodeError) as error:
        raise config_error(str(path), "", f"cannot be read ({error}); give a UTF-8 YAML file") from None
    root = parse_yaml(text, lambda line: str(path) if line is None else f"{path}:{line + 1}")
    if root.value is None:
        raise config_error(str(path), "", "the file is empty; write at least one `key: value` line")
    if not isinstance(root.value, dict):
        problem = f"expected `key: value` lines at the top level, got {shown(root)}; give every value a key"
        raise config_error(root.origin, "", problem)
    return Node(root.value, str(path))


def _moved_to(path: Path) -> Path | None:
    """Where a file of the project's yaml/ is now that had this path before; None for any other path."""
    if path.name not in MOVED or path.resolve().parent.name != "yaml":
        return None
    new = path.parent / MOVED[path.name]
    return new if new.exists() else None


def parse_yaml(text: str, origin: Callable[[int | None], str], key: str = "") -> Node:
    """YAML text as a tree; `origin` turns a line (from 0, or None) into a place; `key` is the text's key."""
    try:
        return _Reader(text, origin).read(key)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(filter(None, (error.context, error.problem)))
        place = origin(mark.line if mark else None)
        raise config_error(place, key, f"not valid YAML: {problem}; correct the syntax there") from None
    except yaml.YAMLError as error:  # characters that YAML does not allow
        raise config_error(origin(None), key, f"not valid YAML: {error}; save it as plain UTF-8") from None


class _Reader:
    """Turns PyYAML's node graph into a tree, without constructing anything but scalars."""

    def __init__(self, text: str, origin: Callable[[int | None], str]) -> None:
        self.loader = yaml.SafeLoader(text)
        self.origin = origin
        self.done: dict[yaml.Node, Node | None] = {}  # None while the node is being read

    def read(self, key: str) -> Node:
        try:
            root = self.loader.get_single_node()
            return Node(None, self.origin(None)) if root is None else self._node(root, key)
        finally:
            self.loader.dispose()

    def _node(self, node: yaml.Node, key: str) -> Node:
        """The tree below `node`; an aliased node is read once."""
        if node not in self.done:
            self.done[node] = None
            self.done[node] = self._read_node(node, key)
        if (result := self.done[node]) is None:
            place = self.origin(node.start_mark.line)
            raise config_error(place, key, "an alias (*name) stands for something around it; write it out")
        return result

    def _read_node(self, node: yaml.Node, key: str) -> Node:
        place = self.origin(node.start_mark.line)
        if isinstance(node, yaml.ScalarNode):
            try:
                return Node(self.loader.construct_object(node), place)
            except ValueError as error:  # for example a date that does not exist
                problem = f"{node.value}: {error}; quote it if it is text"
                raise config_error(place, key, problem) from None
        if node.tag == _TAG + "seq":
            items = [self._node(item, f"{key}[{index}]") for index, item in enumerate(node.value)]
            return Node(items, place)
        if node.tag == _TAG + "map":
            return Node(self._items(node, key), place)
        problem = f"the YAML tag {node.tag} is not supported; write plain mappings, lists and values"
        raise config_error(place, key, problem)

    def _items(self, node: yaml.MappingNode, key: str) -> dict[str, Node]:
        self._check_keys(node, key)
        self.loader.flatten_mapping(node)  # `<<: *name`: its keys come first, so the ones written here win
        items = {}
        for name, value in node.value:
            child = self._node(value, join_key(key, name.value))
            items[name.value] = Node(child.value, self.origin(name.start_mark.line))
        return items

    def _check_keys(self, node: yaml.MappingNode, key: str) -> None:
        """Fail on keys that are not text and on keys given twice (PyYAML silently takes the last one)."""
        lines: dict[str, int] = {}
        for name, _ in node.value:
            place = self.origin(name.start_mark.line)
            if name.tag not in (_TAG + "str", _TAG + "merge"):
                text = name.value if isinstance(name, yaml.ScalarNode) else "a list or mapping"
                raise config_error(place, join_key(key, text), "keys must be text; put the key in quotes")
            if name.value in lines:
                problem = f"duplicate key, first given on line {lines[name.value]}; remove one of the two"
                raise config_error(place, join_key(key, name.value), problem)
            lines[name.value] = name.start_mark.line + 1


class _Dumper(yaml.SafeDumper):
    """Writes lists of scalars on one line, and no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_list(self, data: list) -> yaml.Node:
        nested = any(isinstance(item, dict | list) for item in data)
        return self.represent_sequence(_TAG + "seq", data, flow_style=not nested)


_Dumper.add_representer(list, _Dumper.represent_list)


def dump_yaml(value: Any) -> str:
    """Plain values as YAML text, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def wrap(value: Any, origin: str) -> Node:
    """Plain values as a tree with one origin."""
    if isinstance(value, Mapping):
        return Node({key: wrap(item, origin) for key, item in value.items()}, origin)
    if isinstance(value, list | tuple):
        return Node([wrap(item, origin) for item in value], origin)
    return Node(str(value) if isinstance(value, Path) else value, origin)


def unwrap(node: Node) -> Any:
    """The plain values of a tree."""
    if isinstance(node.value, dict):
        return {key: unwrap(item) for key, item in node.value.items()}
    return [unwrap(item) for item in node.value] if isinstance(node.value, list) else node.value


def shown(node: Node) -> str:
    """A value as it appears in an error message."""
    value = unwrap(node)
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case dict():
            return "a mapping"
        case list():
            return f"the list {value}"
    return f"{type(value).__name__} {value!r}"


def one_line(text: object) -> str:
    """Text with all white space, line breaks too, turned into single blanks."""
    return " ".join(str(text).split())


def config_error(origin: str, key: str, problem: str) -> ConfigError:
    """The error `origin: key: problem` in one line."""
    return ConfigError(one_line(": ".join(filter(None, (origin, key, problem)))))


def join_key(key: str, name: object) -> str:
    """The dotted key of `name` inside the section `key` ("" at the top)."""
    return f"{key}.{name}" if key else str(name)
