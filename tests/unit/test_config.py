"""Configuration files: layers, conversion by type, and errors of one line that name file, key and remedy."""

import math
import subprocess
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest

from ibq.config import (
    ConfigError,
    UserError,
    config_to_dict,
    dump_config,
    exit_on_user_error,
    load_config,
    parse_config,
)


@dataclass(frozen=True, kw_only=True)
class Hard:
    kind: Literal["hard"] = "hard"
    codes: int = 16
    beta: float = 0.25


@dataclass(frozen=True, kw_only=True)
class Soft:
    kind: Literal["soft"] = "soft"
    codes: int = 32
    temperature: float = 1.0

    def __post_init__(self):
        if self.temperature <= 0:
            raise ValueError(f"temperature: {self.temperature} is not positive;\n give a positive number")
        if self.codes % 2:
            raise ValueError("an odd number of codes; make it even")


@dataclass(frozen=True, kw_only=True)
class Stage:
    width: int
    quantizer: Hard | Soft = field(default_factory=lambda: Hard(codes=5))


@dataclass(frozen=True, kw_only=True)
class Model:
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2)
    quantizer: Hard | Soft = field(default_factory=lambda: Hard(codes=64))
    width: int | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    steps: int
    learning_rate: float = 1e-4
    amp: bool = False
    name: str = "run"
    out: Path = Path("runs")
    precision: Literal["fp32", "bf16"] = "fp32"
    betas: tuple[float, float] = (0.9, 0.95)
    tags: list[str] = field(default_factory=list)
    scales: dict[str, float] = field(default_factory=lambda: {"all": 1.0})
    size: int | tuple[int, int] = 1
    model: Model = Model(channels=64)
    extra: Model | None = None
    stages: tuple[Stage, ...] = ()
    anything: Any = None


def write(folder, text, name="run.yaml"):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def load(folder, text, *overrides):
    return load_config(Run, write(folder, text), overrides)


def fails(folder, text, *overrides, cls=Run):
    """The one line of the error, the folder cut off."""
    with pytest.raises(ConfigError) as caught:
        load_config(cls, write(folder, text), overrides)
    message = str(caught.value)
    assert "\n" not in message and message == " ".join(message.split())
    return message.replace(f"{folder}/", "")


# --- Layers ---


def test_layers_in_order(tmp_path):
    write(tmp_path, "steps: 1\nname: base\nmodel: {channels: 8, multipliers: [1]}\n", "base/a.yaml")
    write(tmp_path, "name: second\namp: true\n", "base/b.yaml")
    text = "inherit: [base/a.yaml, base/b.yaml]\nprecision: bf16\nmodel:\n  width: 3\n"
    run = load(tmp_path, text, "model.channels=9", "learning_rate=1e-3", "model.multipliers=[4, 4]")
    assert (run.steps, run.name, run.amp, run.precision, run.learning_rate) == (
        1,
        "second",
        True,
        "bf16",
        1e-3,
    )
    assert run.model == Model(channels=9, multipliers=(4, 4), width=3, quantizer=Hard(codes=64))


def test_inherited_files_are_relative_to_the_file_that_names_them(tmp_path):
    write(tmp_path, "steps: 5\n", "deep/root.yaml")
    write(tmp_path, "inherit: root.yaml\n", "deep/middle.yaml")
    assert load(tmp_path, "inherit: deep/middle.yaml\n").steps == 5


def test_two_parents_may_share_a_file(tmp_path):
    write(tmp_path, "steps: 5\n", "root.yaml")
    for name in "ab":
        write(tmp_path, "inherit: root.yaml\n", f"{name}.yaml")
    assert load(tmp_path, "inherit: [a.yaml, b.yaml]\n").steps == 5


def test_sections_keep_the_defaults_of_the_field_not_of_the_class(tmp_path):
    run = load(
        tmp_path,
        "steps: 1\nmodel: {width: 2}\nextra: {width: 2}\nstages: [{width: 1, quantizer: {beta: 1}}]\n",
    )
    assert run.model.channels == 64 and run.extra.channels == 128
    assert run.stages[0].quantizer == Hard(codes=5, beta=1.0)


def test_another_kind_replaces_the_section_and_the_same_kind_merges(tmp_path):
    write(tmp_path, "steps: 1\nmodel: {quantizer: {codes: 8, beta: 0.5}}\n", "base.yaml")
    same = load(tmp_path, "inherit: base.yaml\nmodel: {quantizer: {kind: hard, codes: 9}}\n")
    assert same.model.quantizer == Hard(codes=9, beta=0.5)
    other = load(tmp_path, "inherit: base.yaml\nmodel: {quantizer: {kind: soft}}\n")
    assert other.model.quantizer == Soft()


@pytest.mark.parametrize("turn", [1, -1])
def test_overrides_of_kind_and_key_work_in_any_order(tmp_path, turn):
    overrides = ["model.quantizer.kind=soft", "model.quantizer.codes=8"][::turn]
    assert load(tmp_path, "steps: 1\n", *overrides).model.quantizer == Soft(codes=8)


def test_the_last_of_two_overrides_wins(tmp_path):
    assert load(tmp_path, "steps: 1\n", "steps=2", "steps=3").steps == 3


def test_a_mapping_of_values_replaces_its_default_and_merges_with_inherited(tmp_path):
    write(tmp_path, "steps: 1\nscales: {a: 1}\n", "base.yaml")
    assert load(tmp_path, "inherit: base.yaml\nscales: {b: 2}\n").scales == {"a": 1.0, "b": 2.0}


def test_a_mapping_of_anything_nests_and_merges_key_by_key(tmp_path):
    @dataclass(frozen=True, kw_only=True)
    class Free:
        raw: dict[str, Any] = field(default_factory=dict)

    write(tmp_path, "raw: {aio: {block_size: 5, threads: 1}, name: base}\n", "base.yaml")
    path = write(tmp_path, "inherit: base.yaml\nraw: {aio: {threads: 2}, sizes: [1, {x: 2}]}\n")
    free = load_config(Free, path, ["raw.aio.deep.key=true", "raw.name=mine"])
    expected = {"block_size": 5, "threads": 2, "deep": {"key": True}}
    assert free.raw == {"aio": expected, "sizes": [1, {"x": 2}], "name": "mine"}
    assert load_config(Free, write(tmp_path, dump_config(free), "again.yaml")) == free
    with pytest.raises(ConfigError, match="raw: expected a mapping, got int 3"):
        load_config(Free, path, ["raw=3"])


def test_yaml_merge_keys_and_shared_anchors(tmp_path):
    text = "steps: 1\nmodel: &m\n  quantizer: &q\n    <<: {codes: 3, beta: 1}\n    beta: 2\nextra: *m\n"
    run = load(tmp_path, text)
    assert run.model.quantizer == run.extra.quantizer == Hard(codes=3, beta=2.0)


# --- Types ---


@pytest.mark.parametrize(
    "override, name, expected",
    [
        ("learning_rate=1e-4", "learning_rate", 1e-4),
        ("learning_rate=-1.5E3", "learning_rate", -1500.0),
        ("learning_rate=3", "learning_rate", 3.0),
        ("learning_rate=.inf", "learning_rate", math.inf),
        ("steps=3.0", "steps", 3),
        ("steps=1e6", "steps", 1000000),
        ("amp=true", "amp", True),
        ("name='1'", "name", "1"),
        ("name=a=b", "name", "a=b"),
        ("out=/data/x", "out", Path("/data/x")),
        ("precision=bf16", "precision", "bf16"),
        ("betas=[0, 1e-1]", "betas", (0.0, 0.1)),
        ("tags=[a, b]", "tags", ["a", "b"]),
        ("scales.x=2", "scales", {"x": 2.0}),
        ("size=[2, 3]", "size", (2, 3)),
        ("size=4", "size", 4),
        ("extra=null", "extra", None),
        ("model={channels: 1, width: 2}", "model", Model(channels=1, width=2)),
        ("stages=[{width: 1, quantizer: {kind: soft}}]", "stages", (Stage(width=1, quantizer=Soft()),)),
        ("anything={a: [1, x]}", "anything", {"a": [1, "x"]}),
    ],
)
def test_values_are_converted_by_declared_type(tmp_path, override, name, expected):
    value = getattr(load(tmp_path, "steps: 1\n", override), name)
    assert value == expected and type(value) is type(expected)
    assert not isinstance(value, tuple) or list(map(type, value)) == list(map(type, expected))


@pytest.mark.parametrize(
    "override, words",
    [
        ("steps=true", "steps: expected int, got true; write a whole number"),
        ("steps=3.5", "steps: expected int, got float 3.5"),
        ("steps='16'", "steps: expected int, got str '16'"),
        ("steps=", "steps: there is no value"),
        ("steps=1.5e0", "steps: expected int"),
        ("steps=.inf", "steps: expected int"),
        ("learning_rate=true", "learning_rate: expected float, got true; write a number"),
        ("learning_rate=fast", "learning_rate: expected float, got str 'fast'"),
        ("learning_rate=.nan", "learning_rate: expected float, got float nan"),
        ("learning_rate=" + "9" * 400, "learning_rate: expected float"),
        ("amp=1", "amp: expected bool, got int 1; write true or false"),
        ("name=no", "name: expected text, got false; write text, in quotes"),
        ("name=2024-01-01", "name: expected text, got date"),
        ("out=3", "out: expected a path, got int 3"),
        (
            "precision=bf61",
            "precision: str 'bf61' is not possible; did you mean bf16? choose one of fp32, bf16",
        ),
        ("betas=[1]", "betas: expected 2 values, got 1; write exactly 2"),
        ("tags=a", "tags: expected a list of text, got str 'a'; write [a, b, c]"),
        ("betas=0.9", "betas: expected [float, float], got float 0.9; write [a, b, c]"),
        ("model.multipliers=[1, x]", "model.multipliers[1]: expected int, got str 'x'"),
        ("scales.x=y", "scales.x: expected float, got str 'y'"),
        ("scales=[1]", "scales: expected a mapping, got the list [1]"),
        ("size=x", "size: expected int or [int, int], got str 'x'; write one of these"),
        ("model=3", "model: expected a section, got int 3; write `key: value` lines under it"),
        ("extra.width=x", "extra.width: expected int, got str 'x'"),
        ("model.quantizer.kind=sofd", "model.quantizer.kind: str 'sofd' is not possible; did you mean soft?"),
        ("model.quantizer=hard", "model.quantizer: expected Hard or Soft, got str 'hard'"),
        (
            "model.quantizer.temperature=1",
            "model.quantizer.temperature: unknown key; valid keys: kind, codes, beta",
        ),
        ("stages=[{width: 1, quantizer: {kind: soft, codes: 3}}]", "stages[0].quantizer: an odd number"),
        ("stages=[{}]", "stages[0].width: required and missing"),
    ],
)
def test_wrong_values_on_the_command_line(tmp_path, override, words):
    assert fails(tmp_path, "steps: 1\n", override).startswith(f"command line: {words}")


def test_a_union_without_default_needs_its_kind(tmp_path):
    @dataclass(frozen=True, kw_only=True)
    class Bare:
        quantizer: Hard | Soft

    message = fails(tmp_path, "quantizer:\n  codes: 3\n", cls=Bare)
    assert message == "run.yaml:1: quantizer.kind: required and missing; choose one of hard, soft"


# --- Errors name the place ---


def test_unknown_keys_name_the_nearest_and_the_valid_ones(tmp_path):
    message = fails(tmp_path, "steps: 1\nmodel:\n  quantizer:\n    kind: soft\n    temprature: 1\n")
    assert message == (
        "run.yaml:5: model.quantizer.temprature: unknown key; did you mean temperature? "
        "valid keys: kind, codes, temperature"
    )
    assert "did you mean inherit?" in fails(tmp_path, "inherits: a.yaml\nsteps: 1\n")
    assert "step: unknown key; did you mean steps or" in fails(tmp_path, "steps: 1\n", "step=3")


def test_errors_in_an_inherited_file_name_that_file(tmp_path):
    write(tmp_path, "steps: 1\nmodel:\n  chanels: 3\n", "base.yaml")
    assert fails(tmp_path, "inherit: base.yaml\nmodel: {width: 1}\n").startswith("base.yaml:3: model.chanels: unknown")
    write(tmp_path, "steps: many\n", "base.yaml")
    assert fails(tmp_path, "inherit: base.yaml\nname: x\n").startswith("base.yaml:1: steps: expected int")


def test_post_init_errors_name_the_key_and_where_it_was_written(tmp_path):
    message = fails(tmp_path, "steps: 1\nmodel:\n  quantizer:\n    kind: soft\n    temperature: 0\n")
    assert message == "run.yaml:5: model.quantizer.temperature: 0.0 is not positive; give a positive number"
    text = "steps: 1\nmodel:\n  quantizer: {kind: soft}\n"
    assert fails(tmp_path, text, "model.quantizer.temperature=-1").startswith("command line: model.quantizer.temp")
    text = "steps: 1\nmodel:\n  quantizer: {kind: soft, codes: 3}\n"
    assert fails(tmp_path, text).startswith("run.yaml:3: model.quantizer: an odd number of codes; make it even")


def test_missing_keys_are_named(tmp_path):
    message = fails(tmp_path, "name: x\n", "amp=true")
    assert message == "run.yaml: steps: required and missing; add it there or as key.path=value"


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "run.yaml: the file is empty; write at least one `key: value` line"),
        ("# nothing\n", "run.yaml: the file is empty"),
        ("- 1\n", "run.yaml:1: expected `key: value` lines at the top level, got the list [1]"),
        ("steps: 1\nsteps: 2\n", "run.yaml:2: steps: duplicate key, first given on line 1; remove one"),
        (
            "steps: 1\nmodel:\n  width: 1\n  width: 2\n",
            "run.yaml:4: model.width: duplicate key, first given on line 3",
        ),
        ("steps: 1\nname: [a\nout: b\n", "run.yaml:3: not valid YAML: while parsing a flow sequence"),
        ("steps: 1\n\tname: a\n", "run.yaml:2: not valid YAML: while scanning"),
        ("steps: 1\n---\nsteps: 2\n", "run.yaml:2: not valid YAML: expected a single document"),
        ("steps: *x\n", "run.yaml:1: not valid YAML: found undefined alias"),
        ("steps: 1\nmodel: &m\n  quantizer: *m\n", "run.yaml:2: model.quantizer: an alias"),
        ("steps: !!python/name:os.system\n", "run.yaml:1: not valid YAML: could not determine a constructor"),
        ("steps: 1\nmodel: !x {width: 1}\n", "run.yaml:2: model: the YAML tag !x is not supported"),
        ("steps: 1\nname: 2024-99-99\n", "run.yaml:2: name: 2024-99-99: month must be"),
        ("steps: 1\nscales: {1: 2}\n", "run.yaml:2: scales.1: keys must be text; put the key in quotes"),
        ("steps: 1\nname: a\x00b\n", "run.yaml: not valid YAML: unacceptable character"),
        ("inherit: 3\nsteps: 1\n", "run.yaml:1: inherit: expected a path or a list of paths, got int 3"),
        (
            "steps: 1\ninherit: no.yaml\n",
            "run.yaml:2: inherit: no.yaml does not exist; give a path relative to",
        ),
    ],
)
def test_broken_files(tmp_path, text, words):
    assert fails(tmp_path, text).startswith(words)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: file not found; give the path of a YAML file"):
        load_config(Run, tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(Run, tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml: cannot be read .* give a UTF-8 YAML file"):
        load_config(Run, tmp_path / "latin.yaml")


@pytest.mark.parametrize("chain", [["run.yaml"], ["b.yaml", "run.yaml"], ["b.yaml", "c.yaml", "b.yaml"]])
def test_files_that_inherit_each_other(tmp_path, chain):
    for name, parent in pairwise(chain):
        write(tmp_path, f"inherit: {parent}\n", name)
    message = fails(tmp_path, f"inherit: {chain[0]}\nsteps: 1\n")
    assert ":1: inherit: a circle of files (run.yaml -> " in message and "remove one of the links" in message


@pytest.mark.parametrize(
    "override, words",
    [
        ("steps", "command line: steps: there is no '='; write key.path=value"),
        ("=3", "command line: =3: a part of the key is empty; write key.path=value"),
        ("extra=", "command line: extra: there is no value; write null for none"),
        ("model..width=3", "command line: model..width=3: a part of the key is empty"),
        ("tags=[a", "command line: tags: not valid YAML: while parsing a flow sequence"),
        ("model={width: 1, width: 2}", "command line: model.width: duplicate key, first given"),
    ],
)
def test_broken_overrides(tmp_path, override, words):
    assert fails(tmp_path, "steps: 1\n", override).startswith(words)


# --- Back to text, and entry scripts ---


CHANGED = Run(
    steps=7,
    learning_rate=3e-5,
    name="1e-4",
    out=Path("a/b"),
    tags=["yes", "1", "a: b", "", "é"],
    scales={"b": 1e-300, "on": math.inf},
    size=(2, 3),
    model=Model(multipliers=(), quantizer=Soft(temperature=0.1 + 0.2), width=3),
    extra=Model(),
    stages=(Stage(width=1), Stage(width=2, quantizer=Soft())),
    anything={"a": [1, None, {"b": True}]},
)


@pytest.mark.parametrize("config", [Run(steps=1), CHANGED], ids=["defaults", "changed"])
def test_round_trip(tmp_path, config):
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_config(config))
    assert load_config(Run, path) == config
    assert parse_config(Run, config_to_dict(config)) == config


def test_parse_config_names_its_source_and_leaves_the_mapping_alone():
    mapping = {"steps": 1, "model": {"width": 2, "channel": 3}}
    before = repr(mapping)
    with pytest.raises(ConfigError, match=r"^last\.pt: model\.channel: unknown key; did you mean channels"):
        parse_config(Run, mapping, source="last.pt")
    assert repr(mapping) == before


@pytest.mark.parametrize(
    "body, code, words",
    [
        ("return None", 0, ""),
        ("return 3", 3, ""),
        ("raise ConfigError('a.yaml: steps: bad')", 2, "error: a.yaml: steps: bad\n"),
        ("raise UserError('no data;\\n give some')", 2, "error: no data; give some\n"),
        ("raise KeyboardInterrupt", 130, ""),
    ],
)
def test_exit_codes(capsys, body, code, words):
    scope = {"ConfigError": ConfigError, "UserError": UserError}
    exec(f"def main():\n    {body}", scope)
    with pytest.raises(SystemExit) as caught:
        exit_on_user_error(scope["main"])
    assert caught.value.code == code and capsys.readouterr().err == words


def test_bugs_are_not_hidden():
    with pytest.raises(ValueError, match="a bug"):
        exit_on_user_error(lambda: (_ for _ in ()).throw(ValueError("a bug")))


def test_importing_config_is_light():
    code = "import sys, ibq.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
