"""The packages that a plain `pip install` leaves out: which extra of setup.cfg brings them, and what to do without."""

from importlib.util import find_spec
from pathlib import Path

EXTRA_OF = {
    **dict.fromkeys(("deepspeed", "webdataset", "torchvision", "tensorboard", "submitit"), "train"),
    **dict.fromkeys(("torch_fidelity", "lpips"), "evaluate"),
    **dict.fromkeys(("matplotlib", "scipy"), "report"),
    "gradio": "demo",
    "vector_quantize_pytorch": "test",
}


def need(*modules: str) -> None:
    """ModuleNotFoundError for a module that is not installed: before anything is done that would be in vain."""
    for module in modules:
        if find_spec(module) is None:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)


def remedy_of(error: Exception) -> str | None:
    """One line that says how to install what an import has missed; None where it is none of the extras'."""
    module = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if module not in EXTRA_OF:
        return None
    return f"this needs {module}, which is not installed: {install(EXTRA_OF[module])}"


def install(extra: str) -> str:
    """The command that installs an extra of a clone, whose folder it is given in, or of an installed package."""
    clone = (Path(__file__).parents[1] / "setup.cfg").is_file()
    return f"python -m pip install -e '.[{extra}]'" if clone else f"pip install 'ibq[{extra}]'"
