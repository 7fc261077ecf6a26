"""Paths that pages once named answer with the new one: one line, exit code 2; runs made with them go on."""

import json
import shutil

import pytest
from support import ROOT
from support.processes import run_script

from ibq import train_ar, train_tokenizer
from ibq.config import ConfigError, exit_on_user_error, load_config, load_section
from ibq.config_yaml import MOVED
from ibq.models.transformer import TransformerConfig
from ibq.training.tokenizer_config import TokenizerRunConfig
from launchers import sweep
from launchers.lib.sweep.grid import SweepConfig, runs_of
from tools import plan
from tools.lib.quickstart import recipe


def said(capsys, main, *argv: str) -> str:
    """The error that a command ends with."""
    with pytest.raises(SystemExit) as ended:
        exit_on_user_error(lambda: main(list(argv)))
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("old", MOVED)
def test_old_configs_name_the_new_ones(old, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert not (ROOT / "yaml" / old).exists() and (ROOT / "yaml" / MOVED[old]).is_file()
    with pytest.raises(ConfigError) as error:
        load_config(TokenizerRunConfig, f"yaml/{old}")
    assert str(error.value) == f"yaml/{old}: moved to yaml/{MOVED[old]}"


@pytest.mark.parametrize(
    ("main", "old", "options"),
    [
        (train_tokenizer.main, "quickstart_tokenizer.yaml", []),
        (train_ar.main, "quickstart_transformer.yaml", []),
        (sweep.main, "ablation_quantizers.yaml", []),
        (plan.main, "scaling_transformer.yaml", ["--gpus", "8"]),
    ],
)
def test_commands_end_with_the_new_path(main, old, options, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert said(capsys, main, "--config", f"yaml/{old}", *options) == f"error: yaml/{old}: moved to yaml/{MOVED[old]}\n"


def test_own_files_that_build_on_an_old_one(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    shutil.copytree(ROOT / "yaml", tmp_path / "yaml")
    own = tmp_path / "yaml" / "own.yaml"
    own.write_text("output: runs/own\ninherit: tokenizer_base.yaml\n")
    with pytest.raises(ConfigError, match=r"own\.yaml:2: inherit: .*yaml/tokenizer_base\.yaml moved to .*yaml/base/to"):
        load_config(TokenizerRunConfig, own)
    own.write_text("name: own\nbase: yaml/ablation_tokenizer.yaml\nruns: {a: []}\n")
    error = said(capsys, sweep.main, "--config", str(own))
    assert "own.yaml: base: yaml/ablation_tokenizer.yaml: moved to yaml/ablations/tokenizer.yaml" in error
    with pytest.raises(ConfigError, match=r"ar_base\.yaml: moved to .*base/transformer\.yaml"):
        load_section(TransformerConfig, tmp_path / "yaml" / "ar_base.yaml", "model")


def test_only_the_projects_files_have_moved(tmp_path):
    for folder in (tmp_path, tmp_path / "yaml"):  # the second has no new file to name
        folder.mkdir(exist_ok=True)
        with pytest.raises(ConfigError, match=r"tokenizer_base\.yaml: file not found"):
            load_config(TokenizerRunConfig, folder / "tokenizer_base.yaml")


def test_a_script_that_was_typed():
    done = run_script("tests/test_triton_compile.py", fresh=True)
    assert done.returncode == 2
    assert done.stderr == "error: tests/test_triton_compile.py: moved to tests/gpu/test_triton_compile.py\n"


def test_a_quickstart_begun_before_goes_on_with_its_plan(tmp_path, monkeypatch):
    train, validation = recipe.EMOJI
    written = {"data": {"train": train, "validation": validation, "smoke": False}}
    written |= {"seconds": {"train_tokenizer": 31.5}, "precision": "bf16", "tokenizer": 1550}
    (tmp_path / "plan.json").write_text(json.dumps(written))
    quickstart = recipe.Quickstart(tmp_path, recipe.Place(train=train, validation=validation), minutes=8.5, smoke=False)
    started = []
    monkeypatch.setattr(recipe, "watch", lambda command, *_: started.append(command))
    recipe.train_tokenizer(quickstart)
    assert len(started) == 1 and {"training.max_steps=1550", "precision=bf16"} <= set(started[0])
    assert "codebook_start.warmup_steps=150" in started[0]
    assert quickstart.elapsed() == 31.5


@pytest.mark.parametrize("file", ["ablations/quantizers", "scaling/sweep"])
def test_sweeps_begun_before_go_on(file, monkeypatch):
    """What says whether a run was trained with other settings holds no config's path."""
    monkeypatch.chdir(ROOT)
    runs = runs_of(load_config(SweepConfig, f"yaml/{file}.yaml"), f"yaml/{file}.yaml")
    assert runs and not any("yaml" in json.dumps(run.settings, default=str) for run in runs)
