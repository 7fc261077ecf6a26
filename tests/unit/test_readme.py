"""What the README says is true."""

import re
import shlex

import pytest
import torch
from support import ROOT
from support.training import write_best

from ibq.config import load_config
from ibq.models.tokenizer import Tokenizer, TokenizerConfig
from ibq.models.transformer import Transformer, TransformerConfig
from ibq.quantizers import IBQConfig
from ibq.train_ar import ARRunConfig
from ibq.train_tokenizer import TokenizerRunConfig

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def commands() -> list[list[str]]:
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.strip()]


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
    (example,) = blocks("python")
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    # What the comments of the example promise.
    assert "torch.Size([3, 3, 32, 32]) torch.uint8" in capsys.readouterr().out
    assert names["codes"].shape == (3, 8, 8)
    assert names["reconstruction"].shape == (3, 3, 32, 32)


def test_commands_name_files_that_exist():
    scripts = [word for command in commands() for word in command if re.match(r"(ibq|tools|yaml)/\S+\.\w+$", word)]
    assert len(scripts) > 10
    missing = [script for script in scripts if not (ROOT / script).exists()]
    assert not missing, f"the README names files that do not exist: {missing}"


@pytest.mark.parametrize("script, kind", [("train_tokenizer.py", TokenizerRunConfig), ("train_ar.py", ARRunConfig)])
def test_training_commands_load(script, kind):
    found = [command for command in commands() if any(word.endswith(script) for word in command)]
    assert found
    for command in found:
        config = command[command.index("--config") + 1]
        load_config(kind, ROOT / config, [word for word in command if re.match(r"[a-z_.0-9]+=", word)])


def test_links_and_pictures_exist():
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if not target.startswith("http")]
    missing = [target for target in targets if not (ROOT / target).exists()]
    assert not missing, f"the README links to files that do not exist: {missing}"


def test_tour_names_every_module():
    tour = README.split("## A tour of the code")[1]
    modules = [path.name for path in (ROOT / "ibq").rglob("*.py") if path.name != "__init__.py"]
    missing = [name for name in modules if name not in tour]
    assert not missing, f"not in the README's tour of the code: {missing}"
