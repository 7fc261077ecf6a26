"""What the pages (every .md file) say is true: their commands, paths, links, settings and the Python example."""

import importlib
import json
import re
import shlex
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from support import ROOT
from support.training import write_best
from torch.distributed.run import get_args_parser

from ibq.config import ConfigError, load_config
from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.models.transformer import Transformer, TransformerConfig
from ibq.quantizers import IBQConfig
from ibq.training.ar_config import ARRunConfig
from ibq.training.tokenizer_config import TokenizerRunConfig
from launchers import job, slurm
from launchers.lib.sweep.grid import SweepConfig
from tools.lib.quickstart import recipe

FOLDERS = ("ibq", "launchers", "slurm", "tests", "tools", "yaml")
PAGES = [Path("README.md"), *sorted(page.relative_to(ROOT) for f in FOLDERS for page in (ROOT / f).rglob("*.md"))]
TEXT = {page: (ROOT / page).read_text() for page in PAGES}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.S | re.M)
TRAINING = {"ibq/train_tokenizer.py": TokenizerRunConfig, "ibq/train_ar.py": ARRunConfig}
README_LINES = 250

each_page = pytest.mark.parametrize("page", PAGES, ids=str)


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return [text for kind, text in BLOCK.findall(TEXT[page]) if kind == language]


def inline(page: Path) -> list[str]:
    """What stands between backticks outside of fenced blocks, each on one line."""
    return [" ".join(text.split()) for text in re.findall(r"`([^`]+)`", BLOCK.sub("", TEXT[page]))]


def commands(page: Path) -> list[list[str]]:
    """The words of all commands, in blocks and in sentences; those with a placeholder (NAME, ...) are left out."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    lines += [text for text in inline(page) if re.match(r"(python|bash|torchrun|deepspeed|sbatch) [^|]", text)]
    lines = [line for line in lines if not re.search(r"\.\.\.( |$)|\b(NAME|FILE|COMMAND)\b", line)]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def script_of(words: list[str]) -> tuple[str, list[str]]:
    """(script, its arguments) of a command that starts one of the project's."""
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    match words:
        case ["torchrun", *rest]:
            launch = get_args_parser().parse_args(rest)
            return launch.training_script, launch.training_script_args
        case ["python" | "bash" | "sbatch" | "deepspeed", script, *rest] if not script.startswith("-"):
            return script, rest
    return words[0], words[1:]


def understand(script: str, argv: list[str]) -> None:
    """Read a command line as its script would, without doing anything; SystemExit or ValueError for a mistake."""
    match script:
        case "ibq/train_tokenizer.py" | "ibq/train_ar.py":
            load_config(TRAINING[script], argv[argv.index("--config") + 1], [word for word in argv if "=" in word])
        case "tools/quickstart.sh":
            recipe.parse(argv)
        case "launchers/slurm.py" | "launchers/job.py":
            module = slurm if "slurm" in script else job
            arguments = job.parse_job(argv, module.__doc__, getattr(module, "add_options", None))
            understand(arguments.command[0], arguments.command[1:])
        case _ if re.fullmatch(r"(tools|launchers)/\w+\.py", script):
            importlib.import_module(script.removesuffix(".py").replace("/", ".")).parse(argv)
        case _ if script.startswith("slurm/"):  # what follows are settings over those in the file
            assert all("=" in word for word in argv)
        case _:
            # That the tests' files are there is for test_paths_exist.
            assert script in ("python", "hf", "tools/test.sh") or script.startswith("tests/"), script


@each_page
def test_commands_are_understood(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands(page):
        script, argv = script_of(words)
        try:
            understand(script, argv)
        except (SystemExit, ConfigError) as error:
            pytest.fail(f"{page}: {shlex.join(words)}: {error}")


def test_commands_are_found():
    found = [script_of(words)[0] for page in PAGES for words in commands(page)]
    tools = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tools").iterdir() if path.suffix in (".py", ".sh")}
    launchers = {"launchers/sweep.py", "launchers/slurm.py"}
    assert not (tools | launchers | set(TRAINING)) - set(found), "commands that no page shows"
    assert len(found) > 60


def test_a_wrong_command_is_found_out(monkeypatch):
    monkeypatch.chdir(ROOT)
    wrong = (
        "python tools/sample.py --tokenizer a --transformer b --colour red",
        "torchrun --nproc-per-node 8 ibq/train_ar.py --config yaml/absent.yaml",
        "python ibq/train_ar.py --config yaml/b.yaml trainig.epochs=1",
        "python launchers/slurm.py --nodes 1 -- ibq/train_ar.py --config yaml/b.yaml model.depht=1",
        "python tools/absent.py",
    )
    for line in wrong:
        with pytest.raises((SystemExit, ConfigError, ModuleNotFoundError)):
            understand(*script_of(shlex.split(line)))


@each_page
def test_paths_exist(page):
    """Files and folders of the project, typed from its folder; globs too. `slurm/NAME.sh` is a placeholder."""
    names = re.findall(
        rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w./*-]*\.(?:py|sh|yaml|env|tar|json|svg|png)\b", TEXT[page]
    )
    names += [text for text in inline(page) if re.fullmatch(rf"(?:{'|'.join(FOLDERS)})(?:/[\w-]+)+", text)]
    missing = [name for name in names if "NAME" not in name and not any(ROOT.glob(name))]
    assert not missing, f"{page} names files that do not exist: {missing}"


@each_page
def test_module_names_exist(page):
    """Files that are named without their folder."""
    known = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")}
    missing = [text for text in inline(page) if re.fullmatch(r"\w+\.(py|sh)", text) and text not in known]
    assert not missing, f"{page} names files that do not exist: {missing}"


def anchors(text: str) -> set[str]:
    """The anchors that code hosts give to the headings of a page."""
    heads = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@each_page
def test_links_and_pictures_exist(page):
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", TEXT[page])):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        file = (ROOT / page.parent / path).resolve() if path else ROOT / page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            missing.append(target)
    assert not missing, f"{page} links to what does not exist: {missing}"


def test_raw_results_are_named_and_say_where_they_come_from():
    """Each is BENCH_MODEL_HARDWARE_YYYYMM.json, stands on the page beside it, and was written by the bench it names."""
    others = {"sweep": "python launchers/sweep.py ", "quickstart": "bash tools/quickstart.sh"}
    others["fit-scaling"] = "python tools/fit_scaling.py "
    files = sorted((ROOT / "tools/results").glob("*.json"))
    assert files
    for file in files:
        bench, *_ = re.fullmatch(r"([a-z-]+)_([\w.-]+)_([\w.-]+)_(\d{6})", file.stem).groups()
        assert f"({file.name})" in TEXT[Path("tools/results/README.md")], file.name
        origin = json.loads(file.read_text())["origin"]
        assert origin["command"].startswith(others.get(bench, f"python tools/bench.py {bench} ")), file.name
        assert origin["edited"] is False, f"{file.name} is of code that no revision has"


def is_setting(name: str) -> bool:
    """Whether a training config has the key; the value is wrong on purpose."""
    for kind, config in ((TokenizerRunConfig, "yaml/tokenizer_16384.yaml"), (ARRunConfig, "yaml/b.yaml")):
        for engine in ("local", "fsdp", "zero"):
            try:
                load_config(kind, ROOT / config, [f"engine.kind={engine}", f"{name}=wrong"])
            except ConfigError as error:
                if "unknown key" in str(error):
                    continue
            return True
    return False


def test_settings_exist():
    fields = {field for kind in TRAINING.values() for field in kind.__dataclass_fields__}
    named = re.compile(rf"((?:{'|'.join(sorted(fields))})(?:\.[a-z_]+)+)(?:=.*)?")
    settings = {found[1] for page in PAGES for text in inline(page) if (found := named.fullmatch(text))}
    assert len(settings) > 15
    assert not is_setting("training.epocs")
    missing = sorted(name for name in settings if not is_setting(name))
    assert not missing, f"the pages name settings that do not exist: {missing}"


@pytest.mark.parametrize(
    ("page", "config", "section"),
    [("ibq/quantizers/README.md", TokenizerConfig, "quantizer"), ("ibq/engine/README.md", ARRunConfig, "engine")],
)
def test_every_kind_has_a_row_with_its_options(page, config, section):
    """A row begins with `KIND` or `{kind: KIND ...}`; what else is a bare word between backticks is an option."""
    kinds = {kind.kind: kind for kind in get_args(get_type_hints(config)[section])}
    rows = dict(re.findall(r"^\| `(?:\{kind: )?(\w+)[^`]*` \|(.*)$", TEXT[Path(page)], flags=re.M))
    assert set(rows) == set(kinds)
    for name, row in rows.items():
        options = set(re.findall(r"`(\w+)(?::[^`]*)?`", row)) - {"fully_shard"}
        assert options, "every kind has some"
        unknown = options - set(kinds[name].__dataclass_fields__)
        assert not unknown, f"{page}: {name} has no {unknown}"


def test_yaml_examples_load(tmp_path):
    examples = [text for page in PAGES for text in blocks(page, "yaml")]
    assert len(examples) > 1
    for text in examples:
        file = tmp_path / "example.yaml"
        if text.startswith(("data:", "optimizer:")):
            file.write_text(f"inherit: {ROOT / 'yaml/tokenizer_16384.yaml'}\n{text}")
            load_config(TokenizerRunConfig, file)
        else:
            file.write_text(text)
            load_config(SweepConfig, file)


@pytest.mark.parametrize("folder", ["tools", "launchers"])
def test_every_typed_command_has_a_row(folder):
    named = re.findall(rf"^\| `({folder}/\S+)` \|", TEXT[Path(folder) / "README.md"], flags=re.M)
    scripts = [path.relative_to(ROOT).as_posix() for path in (ROOT / folder).iterdir() if path.suffix in (".py", ".sh")]
    assert sorted(named) == sorted(scripts)


def test_readme_is_short():
    assert len(TEXT[Path("README.md")].splitlines()) <= README_LINES


def test_readme_names_every_page():
    table = TEXT[Path("README.md")].split("## Pages\n")[1]
    missing = [str(page) for page in PAGES[1:] if f"({page})" not in table and page.parts[:2] != ("tests", "data")]
    assert not missing, f"not in the README's table of pages: {missing}"


def test_python_example_runs(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    tokenizer = TokenizerConfig(
        resolution=32,
        channels=32,
        channel_multipliers=(1, 1, 1),
        res_blocks=1,
        attention_resolutions=(),
        latent_channels=32,
        quantizer=IBQConfig(num_codes=64, dim=16),
    )
    transformer = TransformerConfig(vocab_size=64, num_classes=9, tokens_per_side=8, depth=1, width=64, heads=2)
    for name, module in (("tokenizer", Tokenizer(tokenizer)), ("transformer", Transformer(transformer))):
        write_best(tmp_path / "runs/quickstart" / name / "best", module)
    monkeypatch.chdir(tmp_path)
    (example,) = blocks(Path("README.md"), "python")
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    # What the comments of the example promise.
    assert "torch.Size([3, 3, 32, 32]) torch.uint8" in capsys.readouterr().out
    assert names["codes"].shape == (3, 8, 8)
    assert names["reconstruction"].shape == (3, 3, 32, 32)


def test_every_cell_of_the_operators_table_names_its_test():
    text = (ROOT / "ibq/training/README.md").read_text()
    _, section = text.split("### What ends a run, and what follows")
    table, notes = section.split("\n## ")[0].split("\n\nIn ")
    cells = [cell.strip() for row in table.splitlines() if row.startswith("| ") for cell in row.split("|")[2:-1]][4:]
    assert len(cells) == 4 * 13
    for cell in cells:
        assert re.search(r"\(\d+\)", cell) or cell in ("–", "not tested"), cell
    tests = {}
    for file, rest in re.findall(r"`(tests/[\w/.]+)`: ((?:\(\d+\)\s+`\w+`[,.]?\s*)+)", notes):
        for number, name in re.findall(r"\((\d+)\)\s+`(\w+)`", rest):
            tests[number] = name
            assert f"def {name}(" in (ROOT / file).read_text(), name
    assert tests.keys() == set(re.findall(r"\((\d+)\)", table))
