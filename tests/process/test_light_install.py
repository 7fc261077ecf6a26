"""A plain installation, without the extras of setup.cfg: what works with it, and what says how to install the rest."""

import re
import shlex
from configparser import ConfigParser
from pathlib import Path

import pytest
from support import ROOT
from support.processes import run_script
from support.training import make_workplace, write_code_folder

from ibq.extras import EXTRA_OF, need, remedy_of

LIGHT = """
import torch
import ibq
from ibq import from_pretrained, save_pretrained
from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.models.transformer import Transformer, TransformerConfig
from ibq.quantizers import IBQ, IBQConfig

layer = IBQ(num_codes=16, dim=4)
layer(torch.randn(2, 6, 4)).loss.backward()
assert layer.codebook.grad.count_nonzero() > 0
quantizer = IBQConfig(num_codes=16, dim=4)
small = dict(resolution=8, channels=32, channel_multipliers=(1, 1), res_blocks=1, attention_resolutions=())
tokenizer = Tokenizer(TokenizerConfig(**small, latent_channels=4, quantizer=quantizer))
transformer = Transformer(
    TransformerConfig(vocab_size=16, num_classes=3, tokens_per_side=4, depth=1, heads=2, width=32)
)
folder = FOLDER
models = [from_pretrained(save_pretrained(model, f"{folder}/{type(model).__name__}"), device="cpu")
          for model in (tokenizer, transformer)]
assert ibq.generate(*models, classes=[0, 2], seed=0).shape == (2, 3, 8, 8)
"""


def listed(extra: str | None = None) -> set[str]:
    """The distributions that setup.cfg asks for: of an extra, or always; with names of one form."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    text = setup["options.extras_require"][extra] if extra else setup["options"]["install_requires"]
    return {plain(re.match(r"[\w.-]+", line)[0]) for line in text.split("\n") if line}


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.slow
def test_layers_loading_and_generating_need_no_extra(tmp_path: Path):
    code = LIGHT.replace("FOLDER", repr(str(tmp_path)))
    result = run_script("tests/support/without_extras.py", shlex.join(["light", code]), fresh=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout == "exit 0\n"


@pytest.mark.slow
def test_commands_that_miss_an_extra_say_so_before_they_do_anything(tmp_path: Path):
    place = make_workplace(tmp_path)
    write_code_folder(place / "codes")
    (place / "runs.csv").write_text("name,parameters,tokens,loss\n")
    output, emoji = place / "output", "tests/data/emoji64/val-*.tar"
    train = f"ibq/train_tokenizer.py --config {place}/tokenizer.yaml"
    commands = {
        f"{train} output={output}": ("tensorboard", "train"),
        f"ibq/train_ar.py --config {place}/transformer.yaml output={output}": ("tensorboard", "train"),
        f"launchers/sweep.py --config yaml/ablations/quantizers.yaml output={output}": ("matplotlib", "report"),
        f"launchers/slurm.py --executor local -- {train} output={output}": ("submitit", "train"),
        f"tools/fit_scaling.py {place}/runs.csv --output {output}": ("scipy", "report"),
        f"tools/lib/quickstart/recipe.py --output {output}": ("tensorboard", "train"),
        f"tools/evaluate.py generation --samples '{emoji}' --reference '{emoji}' --json {output}": (
            "torch_fidelity",
            "evaluate",
        ),
    }
    before = sorted(place.rglob("*"))
    result = run_script("tests/support/without_extras.py", *commands, fresh=True)
    assert result.stdout.split("\n")[:-1] == ["exit 2"] * len(commands), result.stdout + result.stderr[-3000:]
    said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    for line, (module, extra) in zip(said, commands.values(), strict=True):
        remedy = f"python -m pip install -e '.[{extra}]'"
        assert line == f"error: this needs {module}, which is not installed: {remedy}"
    assert sorted(place.rglob("*")) == before


def test_extras_are_those_of_setup_cfg():
    for module, extra in EXTRA_OF.items():
        assert plain(module) in listed(extra), module
        assert plain(module) not in listed(), module
    assert listed("all") == set.union(*(listed(extra) for extra in ("train", "evaluate", "report", "demo", "wandb")))
    assert listed("all") < listed("test")


def test_what_is_missing():
    need("torch", "json")
    with pytest.raises(ModuleNotFoundError) as caught:
        need("torch", "no_such_module")
    assert remedy_of(caught.value) is None  # a mistake in the code: its traceback is wanted
    assert remedy_of(ValueError("x")) is None and remedy_of(ModuleNotFoundError("x")) is None
    assert remedy_of(ModuleNotFoundError("x", name="lpips.pretrained_networks")).endswith("'.[evaluate]'")
