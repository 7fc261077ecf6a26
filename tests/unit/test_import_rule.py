"""Who may import whom: layers, and where distributed code, deepspeed and triton may appear."""

import ast
import re
import sys
from configparser import ConfigParser
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path, PurePosixPath

import pytest
from support import ROOT

ENTRY_SCRIPTS = {"train_tokenizer", "train_ar"}
LAYERS = [
    {
        "config",
        "config_yaml",
        "extras",
        "files",
        "tensor_file",
        "progress",
        "meeting",
        "dist",
        "noise",
        "initial",
        "ops",
    },
    {"quantizers"},
    {"models", "losses"},
    {
        "data",
        "engine",
        "sampler",
        "decoding",
        "sampling",
        "pixels",
        "evaluation",
        "reports",
        "interop",
        "scaling",
    },
    {"api"},  # what `import ibq` offers
    {"training", "hub", "model_card"},
    ENTRY_SCRIPTS,
    {"launchers", "tools"},
]
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
# Parts of ibq that know less than their layer would allow: all that they may import besides themselves.
NARROW = {
    "config_yaml": set(),
    "extras": set(),
    "config": {"config_yaml", "extras"},
    "files": set(),
    "tensor_file": set(),
    "progress": set(),
    "meeting": {"config"},
    "dist": {"config", "meeting"},
    "ops": {"config"},
    "data": {"config", "dist", "files", "ops"},
    "engine": {"config", "dist", "extras", "meeting", "files", "initial", "ops", "tensor_file"},
}
# Models and what they are made of are told about other ranks through callables.
BLIND_TO_DISTRIBUTION = {"ops", "quantizers", "models", "losses"}
# Third-party modules and the only files (relative to the repository) that may import them.
CONFINED = {
    "torch.distributed": ["ibq/dist.py", "ibq/meeting.py", "ibq/engine/*.py", "ibq/training/checkpoint.py"],
    "deepspeed": ["ibq/engine/zero*.py"],
    "triton": ["ibq/ops/triton_*.py"],
}
# What the project may use, whether it is installed here or not; module names, not distribution names.
THIRD_PARTY = {
    *("torch", "torchvision", "numpy", "scipy", "yaml", "safetensors", "PIL", "lpips", "webdataset", "tqdm"),
    *("deepspeed", "triton", "submitit", "tensorboard", "wandb", "huggingface_hub", "matplotlib", "pytest", "sklearn"),
}


def sources():
    """All modules that the rule is about, relative to the repository."""
    for folder in ("ibq", "launchers", "tools"):
        yield from (path.relative_to(ROOT) for path in sorted((ROOT / folder).rglob("*.py")))


def imported(tree, path):
    """(line, dotted name, inside a function or TYPE_CHECKING) of each import; `from a import b` gives a.b."""
    package = PurePosixPath(path).parent.parts
    deferred = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        names = []
        match node:
            case ast.Import():
                names = [alias.name for alias in node.names]
            case ast.ImportFrom():
                base = [*package[: len(package) + 1 - node.level]] if node.level else []
                base += node.module.split(".") if node.module else []
                names = [".".join([*base, alias.name]) for alias in node.names]
            case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]):
                if ast.unparse(func).split(".")[-1] in ("import_module", "__import__"):
                    names = [name]
            case ast.Attribute():  # torch.distributed.all_reduce after a mere `import torch`
                dotted = ast.unparse(node)
                names = [dotted] if dotted in CONFINED else []
        for name in names:
            yield node.lineno, name, id(node) in deferred


def part_of(name):
    """The part of the project that a dotted name belongs to ("" for the package `ibq` itself), else None."""
    first, *rest = name.split(".")
    if first == "ibq":
        return rest[0] if rest and rest[0] in RANK else ""
    return first if first in ENTRY_SCRIPTS | {"launchers", "tools"} else None


def problem_with(path, name, deferred):
    """Why the file may not import this name, or None."""
    for module, allowed in CONFINED.items():
        if f"{name}.".startswith(f"{module}.") and not any(fnmatch(str(path), pattern) for pattern in allowed):
            return f"only {', '.join(allowed)} may import {module}"
    importer, target = part_of(".".join(path.with_suffix("").parts)), part_of(name)
    if target is None:
        return None
    if target in ENTRY_SCRIPTS:
        return "nothing imports an entry script; start it as a process"
    if str(path) == "ibq/__init__.py":
        return None if deferred else "the public API is lazy; import inside a function"
    if target == "":
        return None if importer in ("launchers", "tools") else "import from the module that defines it"
    if target == importer:
        return None
    if importer in BLIND_TO_DISTRIBUTION and target == "dist":
        return f"{importer} knows nothing of distribution; pass in a callable"
    if importer in NARROW and target not in NARROW[importer]:
        return f"{importer} may import only {', '.join(sorted(NARROW[importer])) or 'nothing of ibq'}"
    if RANK[importer] < RANK[target]:
        return f"{importer} is below {target}"
    return None


def violations(source, path):
    """The broken rules of one module, one line each."""
    path, found = PurePosixPath(path), []
    if str(path) != "ibq/__init__.py" and not part_of(".".join(path.with_suffix("").parts)):
        return [f"{path}: not in any layer; add it to LAYERS here and to the layout"]
    for line, name, deferred in imported(ast.parse(source), path):
        if problem := problem_with(path, name, deferred):
            found.append(f"{path}:{line}: imports {name}: {problem}")
    return found


def test_everyone_imports_whom_they_may():
    paths = list(sources())
    assert Path("ibq/config.py") in paths
    found = [line for path in paths for line in violations((ROOT / path).read_text("utf-8"), path.as_posix())]
    assert not found, "\n".join(found)


def modules_read_with(tree, path, known):
    """The modules of ibq that a module imports, for types alone too, but for imports inside functions."""
    within = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(node)
    }
    outside = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    outside = [node for node in outside if id(node) not in within]
    names = {name for _, name, _ in imported(ast.Module(body=outside, type_ignores=[]), path)}
    return {part for name in names for part in (name, name.rpartition(".")[0]) if part in known}


def circle_in(graph):
    """The first circle of imports, as a list of modules that begins and ends with the same one; None without any."""
    done = set()

    def search(module, way):
        if module in way:
            return [*way[way.index(module) :], module]
        if module not in done:
            for other in sorted(graph[module]):
                if found := search(other, [*way, module]):
                    return found
        done.add(module)
        return None

    return next((found for module in sorted(graph) if (found := search(module, []))), None)


def test_no_modules_import_each_other_in_a_circle():
    paths = {".".join(path.with_suffix("").parts): path for path in sources() if path.name != "__init__.py"}
    graph = {
        name: modules_read_with(ast.parse((ROOT / path).read_text("utf-8")), path.as_posix(), paths)
        for name, path in paths.items()
    }
    assert sum(map(len, graph.values())) > 300, "the imports were not found"
    found = circle_in(graph)
    assert found is None, " -> ".join(found)


def test_circles_are_found():
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ibq.b import x"
    known = {"ibq.a", "ibq.b", "ibq.c"}
    first = modules_read_with(ast.parse(source), "ibq/a.py", known)
    assert first == {"ibq.b"}
    assert modules_read_with(ast.parse("def f():\n    import ibq.a"), "ibq/c.py", known) == set()
    assert circle_in({"ibq.a": first, "ibq.b": {"ibq.c"}, "ibq.c": set()}) is None
    assert circle_in({"ibq.a": first, "ibq.b": {"ibq.c"}, "ibq.c": {"ibq.b"}}) == ["ibq.b", "ibq.c", "ibq.b"]


@pytest.mark.parametrize(
    "path, source",
    [
        (
            "ibq/models/tokenizer.py",
            "import torch\nfrom ibq.quantizers import build_quantizer\nfrom . import x",
        ),
        ("ibq/ops/triton_x.py", "import triton\nimport triton.language as tl"),
        (
            "ibq/engine/zero.py",
            "import deepspeed\nimport torch.distributed as dist\nfrom ibq.dist import rank",
        ),
        ("ibq/engine/base.py", "import torch\ntorch.distributed.barrier()"),
        ("ibq/training/checkpoint.py", "from torch.distributed import checkpoint"),
        (
            "ibq/training/loop.py",
            "from ibq import sampling\nfrom ibq.engine import local\nfrom .. import losses",
        ),
        ("ibq/train_ar.py", "from ibq.training.loop import train"),
        ("ibq/__init__.py", "def __getattr__(name):\n    from ibq.models.tokenizer import Tokenizer"),
        ("ibq/__init__.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .models import x"),
        ("tools/sample.py", "from ibq import Tokenizer\nimport ibq\nfrom ibq.sampling import sample_codes"),
        ("launchers/sweep.py", "from launchers.slurm import submit"),
    ],
)
def test_allowed_imports_pass(path, source):
    assert violations(source, path) == []


@pytest.mark.parametrize(
    "path, source, words",
    [
        ("ibq/api.py", "from ibq.training import loop", "api is below training"),
        ("ibq/sampling.py", "from ibq import api", "sampling is below api"),
        (
            "ibq/ops/x.py",
            "from ibq.quantizers import ibq",
            "ibq/ops/x.py:1: imports ibq.quantizers.ibq: ops may",
        ),
        ("ibq/quantizers/x.py", "import ibq.models.tokenizer", "quantizers is below models"),
        ("ibq/models/x.py", "from ..training import loop", "models is below training"),
        ("ibq/models/__init__.py", "from .. import engine", "models is below engine"),
        ("ibq/models/x.py", "def f():\n    from ibq import training", "models/x.py:2: imports ibq.training"),
        (
            "ibq/models/x.py",
            "import importlib\nimportlib.import_module('ibq.training.loop')",
            "is below training",
        ),
        ("ibq/models/x.py", "from ibq.dist import mean", "models knows nothing of distribution"),
        ("ibq/losses.py", "from ibq import dist", "losses knows nothing of distribution"),
        ("ibq/models/x.py", "import torch.distributed as dist", "only ibq/dist.py, "),
        ("ibq/models/x.py", "from torch import distributed", "may import torch.distributed"),
        ("ibq/models/x.py", "from torch.distributed.fsdp import fully_shard", "may import torch.distributed"),
        ("ibq/models/x.py", "import torch\ntorch.distributed.barrier()", "x.py:2: imports torch.distributed"),
        ("ibq/training/loop.py", "import torch.distributed", "may import torch.distributed"),
        ("tools/bench.py", "import torch.distributed", "may import torch.distributed"),
        (
            "ibq/data/x.py",
            "from ibq.models.tokenizer import Tokenizer",
            "data may import only config, dist, files, ops",
        ),
        (
            "ibq/engine/x.py",
            "from ibq.quantizers import base",
            "engine may import only config, dist, extras, files, initial, meeting, ops, tensor_file",
        ),
        ("ibq/config.py", "from ibq.dist import rank", "config may import only config_yaml, extras"),
        ("ibq/engine/fsdp.py", "import deepspeed", "only ibq/engine/zero*.py may import deepspeed"),
        (
            "tools/bench.py",
            "from triton.testing import do_bench",
            "only ibq/ops/triton_*.py may import triton",
        ),
        ("ibq/ops/index_backprop.py", "import triton", "only ibq/ops/triton_*.py may import triton"),
        ("tools/x.py", "from ibq.train_ar import main", "nothing imports an entry script"),
        ("tools/x.py", "from ibq import train_ar", "nothing imports an entry script"),
        ("launchers/x.py", "import train_tokenizer", "nothing imports an entry script"),
        ("ibq/train_ar.py", "from ibq import train_tokenizer", "nothing imports an entry script"),
        ("ibq/__init__.py", "def f():\n    from ibq.train_ar import main", "nothing imports an entry script"),
        ("ibq/__init__.py", "from ibq.config import load_config", "the public API is lazy"),
        ("ibq/training/loop.py", "from ibq import Tokenizer", "import from the module that defines it"),
        ("ibq/training/loop.py", "import tools.sample", "training is below tools"),
        ("ibq/helpers.py", "", "not in any layer"),
    ],
)
def test_forbidden_imports_are_found(path, source, words):
    found = violations(source, path)
    assert len(found) == 1 and words in found[0]


# --- Names: `torchrun ibq/train_ar.py` puts ibq/ first on sys.path, `python tools/sample.py` tools/ ---


def required_by(distributions):
    """The distributions and, of those installed, everything that they require."""
    closed, waiting = set(), list(distributions)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in closed:
            continue
        closed.add(name)
        try:
            lines = requires(name) or []
        except PackageNotFoundError:
            continue
        waiting += [re.match(r"[\w.-]+", line)[0] for line in lines if "extra ==" not in line]
    return closed


def third_party_modules():
    """Top-level modules of what we use: THIRD_PARTY, whatever is imported, and what these require."""
    owners = packages_distributions()
    used = set(THIRD_PARTY)
    for path in sources():
        tree = ast.parse((ROOT / path).read_text("utf-8"))
        used |= {name.split(".")[0] for _, name, _ in imported(tree, path)}
    distributions = required_by(owner for module in used for owner in owners.get(module, ()))
    return THIRD_PARTY | {
        module
        for module, names in owners.items()
        if any(re.sub(r"[-_.]+", "-", name).lower() in distributions for name in names)
    }


def test_what_is_imported_is_in_setup_cfg():
    """With a plain installation what a module of ibq imports at once, and with the extras what is imported at all."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    always = setup["options"]["install_requires"]
    owners = {"yaml": "pyyaml", "PIL": "pillow", "sklearn": "scikit-learn"} | dict.fromkeys(
        ("fastapi", "starlette", "uvicorn"), "gradio"
    )
    for path in sources():
        if any(fnmatch(str(path), pattern) for pattern in CONFINED["triton"]):
            continue  # comes with PyTorch where there is one
        for line, name, deferred in imported(ast.parse((ROOT / path).read_text("utf-8")), path.as_posix()):
            module = name.split(".")[0]
            if module in sys.stdlib_module_names or part_of(name) is not None:
                continue
            light = path.parts[0] == "ibq" and not deferred
            wanted = always if light else always + setup["options.extras_require"]["test"]
            listed = [re.match(r"[\w.-]*", text)[0].replace("_", "-") for text in wanted.split("\n")]
            assert owners.get(module, module.replace("_", "-")) in listed, f"{path}:{line}: {module}"


def clashes(names):
    """The module names that hide a standard or third-party module."""
    return sorted(set(names) & (sys.stdlib_module_names | third_party_modules()))


@pytest.mark.parametrize("folder", ["ibq", "launchers", "tools"])
def test_no_module_hides_a_standard_or_third_party_one(folder):
    children = [path for path in (ROOT / folder).glob("*") if path.is_dir() or path.suffix == ".py"]
    assert clashes(path.stem for path in children if not path.name.startswith("__")) == []


def test_clashes_are_found():
    names = ["logging", "torch", "deepspeed", "submitit", "yaml", "numpy", "jinja2", "config", "ops"]
    assert clashes(names) == sorted({*names} - {"config", "ops"})
