"""Sweeps over model sizes and token budgets: the rules, what is found wrong before anything starts, the results."""

import contextlib
import csv
import importlib
import io
import json
import math
import sys

import pytest
import torch
from support import ROOT
from support.processes import run_script
from support.training import CODES, SIDE, make_workplace, scalars

import yaml
from ibq.config import ConfigError, UserError, load_config, parse_config
from ibq.models.transformer import Transformer, TransformerConfig
from ibq.scaling.transformer import transformer_flops
from launchers.lib.run_config import check_run, config_class, is_training_script, load_run
from launchers.lib.sweep.grid import SweepConfig, runs_of
from launchers.lib.sweep.rules import ScalingConfig, scaling_runs

sweep = importlib.import_module("launchers.sweep")

MODEL = TransformerConfig(vocab_size=256, num_classes=9, tokens_per_side=8, depth=4, width=256, heads=4)
TEST_MODEL = TransformerConfig(
    vocab_size=CODES, num_classes=3, tokens_per_side=SIDE, depth=1, width=64, heads=1, class_dropout=0.0
)


def expand(micro_batch: int = 16, **values) -> dict:
    config = parse_config(ScalingConfig, values)
    return {run.name: run for run in scaling_runs(config, MODEL, micro_batch)}


# --- The rules ---


def test_sizes_follow_the_papers_rule():
    runs = expand(depths=[1, 2, 4, 8], tokens=[1e6])
    assert {run.model.depth: (run.model.model_width, run.model.num_heads) for run in runs.values()} == {
        depth: (64 * depth, depth) for depth in (1, 2, 4, 8)
    }
    rest = {(run.model.vocab_size, run.model.num_tokens) for run in runs.values()}
    assert rest == {(256, 64)}, "the rest is the base's"
    (narrow,) = expand(depths=[2], tokens=[1e6], rules={"width_per_depth": 32}).values()
    assert narrow.model.model_width == 64


def test_batch_rate_and_steps_follow_the_stated_powers():
    rules = {
        "batch_size": {"base": 16, "at_tokens": 1e5, "exponent": 0.5, "multiple_of": 4},
        "learning_rate": {"base": 1e-3, "at_width": 256, "width_exponent": -1, "batch_exponent": 0.5},
        "warmup_share": 0.1,
        "validations": 5,
    }
    runs = expand(depths=[1, 4], tokens=[1e5, 4e5, 1e3], rules=rules)
    assert [runs[f"d4-{name}"].batch_size for name in ("100k", "400k", "1k")] == [16, 32, 4]
    assert runs["d4-100k"].learning_rate == 1e-3 and runs["d1-100k"].learning_rate == 4e-3
    assert runs["d4-400k"].learning_rate == pytest.approx(1e-3 * 2**0.5, rel=1e-3)
    run = runs["d4-400k"]
    assert run.steps == round(4e5 / (32 * 64)) and run.warmup_steps == 20 and run.validate_every == 39
    assert run.micro_batch == 16 and runs["d4-1k"].micro_batch == 4, "the largest divisor up to the base's"
    assert expand(5, depths=[4], tokens=[4e5], rules=rules)["d4-400k"].micro_batch == 4
    assert {
        "model.depth=4", "model.width=256", "model.heads=4", "training.batch_size=32", "training.max_steps=195",
        "optimizer.learning_rate=0.001414", "schedule.warmup_steps=20",
    } <= set(run.overrides)  # fmt: skip


def test_the_defaults_are_those_of_the_sources():
    rules = ScalingConfig(depths=(1,), tokens=(1e6,)).rules
    assert rules.width_per_depth == 64 and rules.batch_size.exponent == 0.571
    assert (rules.learning_rate.width_exponent, rules.learning_rate.batch_exponent) == (-1.0, 0.5)
    text = (ROOT / "launchers/lib/sweep/rules.py").read_text()
    assert all(source in text for source in ("2412.02692", "2503.04715", "2203.03466", "2205.10343"))


def test_budgets_may_grow_with_the_model():
    runs = expand(depths=[1, 2], tokens_per_parameter=[0.5, 2])
    assert set(runs) == {"d1-0.5x", "d1-2x", "d2-0.5x", "d2-2x"}
    for run in runs.values():
        with torch.device("meta"):
            count = sum(p.numel() for p in Transformer(run.model).parameters())
        ratio = float(run.name.split("-")[1][:-1])
        seen = run.steps * run.batch_size * 64
        assert seen == pytest.approx(ratio * count, rel=0.5 * run.batch_size * 64 / (ratio * count) + 1e-9)


def test_the_longest_runs_come_first_and_dear_ones_can_be_left_out():
    runs = list(expand(depths=[1, 2, 3], tokens=[1e5, 2e5], held_out=[3]).values())
    costs = [run.flops for run in runs]
    assert costs == sorted(costs, reverse=True) and runs[0].name == "d3-200k"
    assert runs[0].flops == transformer_flops(runs[0].model).textbook * runs[0].batch_size * runs[0].steps
    assert [run.name for run in runs if run.held_out] == ["d3-200k", "d3-100k"]
    fewer = expand(depths=[1, 2, 3], tokens=[1e5, 2e5], max_flops=costs[2])
    assert list(fewer) == [run.name for run in runs[2:]]


@pytest.mark.parametrize(
    "values, words",
    [
        ({"depths": [], "tokens": [1e5]}, "depths: must be different whole numbers from 1"),
        ({"depths": [0], "tokens": [1e5]}, "depths: must be different whole numbers from 1"),
        ({"depths": [1]}, "tokens: give either"),
        ({"depths": [1], "tokens": [1e5], "tokens_per_parameter": [2]}, "tokens: give either"),
        ({"depths": [1], "tokens": [-1]}, "tokens: must be different positive numbers"),
        ({"depths": [1], "tokens": [1e5], "held_out": [2]}, "held_out: 2 is not among the depths"),
        ({"depths": [1], "tokens": [1e5], "rules": {"warmup_share": 1}}, "warmup_share: must lie in [0, 1)"),
        ({"depths": [1], "tokens": [1e5], "rules": {"batch_size": {"base": 0}}}, "base: must be positive"),
        ({"depths": [1], "tokens": [1e5], "rules": {"width_per_depth": 30}}, "rules.width_per_depth: depth 1: heads:"),
        ({"depths": [1], "tokens": [100000, 100001]}, "two budgets have the same name"),
        ({"depths": [1], "tokens": [1e5], "max_flops": 1}, "max_flops: all runs cost more"),
    ],
)
def test_impossible_rules_are_named(values, words):
    with pytest.raises(ValueError) as caught:
        expand(**values)
    assert words in str(caught.value)


# --- Checks before anything starts ---


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("scaling"))


def write_sweep(folder, name="sizes", **values):
    given = {
        "name": name,
        "script": "ibq/train_ar.py",
        "base": str(folder / "transformer.yaml"),
        "output": str(folder / name),
        "evaluation": None,
        "overrides": ["training.log_every=1", "checkpoint.save_every=100"],
    }
    (folder / f"{name}.yaml").write_text(yaml.dump(given | values))
    return folder / f"{name}.yaml"


@pytest.mark.parametrize(
    "values, words",
    [
        (
            {"grid": {"model.heads": [2, 3]}},
            "run heads=3: command line: model.heads: 3 heads do not",
        ),
        ({"grid": {"training.micro_batch": [8, 3]}}, "run micro_batch=3: training.micro_batch: the global batch 8"),
        ({"runs": {"a": [], "b": ["optimizer.eps=x"]}}, "run b: command line: optimizer.eps: expected float"),
        ({"runs": {"a": [], "b": ["model.hats=2"]}}, "run b: command line: model.hats: unknown key"),
        ({"runs": {"b": ["engine={kind: fsdp, tensor_parallel: 3}"]}}, "run b: engine.tensor_parallel: 3 does not"),
        ({"scaling": {"depths": [1], "tokens": [1e3], "rules": {"width_per_depth": 30}}}, "scaling.rules.width_per_de"),
        ({"scaling": {"depths": [1], "tokens": [1e3]}, "script": "ibq/train_tokenizer.py"}, "base: "),
    ],
)
def test_an_impossible_combination_is_named_before_anything_starts(workplace, monkeypatch, values, words):
    monkeypatch.chdir(ROOT)
    file = write_sweep(workplace, "impossible", **values)
    with pytest.raises((ConfigError, UserError)) as caught:
        sweep.main(["--config", str(file)])
    assert words in str(caught.value) and "\n" not in str(caught.value) and str(file) in str(caught.value)
    assert not (workplace / "impossible").exists()


def test_it_ends_with_2_and_leaves_nothing_behind(workplace):
    file = write_sweep(workplace, "never", grid={"training.batch_size": [8, 12]})
    process = run_script("launchers/sweep.py", "--config", str(file))
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr.startswith(f"error: {file}: run batch_size=12: training.micro_batch: the global batch 12 ")
    assert process.stderr.count("\n") == 1 and not (workplace / "never").exists()


def test_configs_are_read_from_any_folder(workplace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert config_class("ibq/train_ar.py").__name__ == "ARRunConfig"
    assert config_class(str(ROOT / "ibq/train_tokenizer.py")).__name__ == "TokenizerRunConfig"
    assert sys.path == before, "the scripts' own change of sys.path is undone"
    config = load_run("ibq/train_ar.py", ["--config", str(workplace / "transformer.yaml"), "model.depth=3"])
    assert config.model.depth == 3
    assert is_training_script("ibq/train_ar.py") and not is_training_script("tools/sample.py")
    with pytest.raises(UserError, match=r"tools/sample\.py: is no training script; take ibq/train_tokenizer\.py or"):
        config_class("tools/sample.py")
    with pytest.raises(UserError, match="required: --config; write --config FILE") as caught:
        load_run("ibq/train_ar.py", ["seed=3"])
    assert "\n" not in str(caught.value)


def test_runs_are_checked_for_their_ranks(workplace):
    config = load_run("ibq/train_ar.py", ["--config", str(workplace / "transformer.yaml")])
    check_run(config)
    with pytest.raises(UserError, match=r"training\.micro_batch: .* on 2 rank"):
        check_run(config, ranks=2)
    tokenizer = ["--config", str(workplace / "tokenizer.yaml"), "codebook_start={kmeans: true, warmup_steps: 9}"]
    with pytest.raises(UserError, match=r"codebook_start\.warmup_steps: 9 must be below the run's 4 steps"):
        check_run(load_run("ibq/train_tokenizer.py", tokenizer))


def test_the_projects_sweep_covers_what_it_promises(monkeypatch):
    monkeypatch.chdir(ROOT)
    file = "yaml/scaling/sweep.yaml"
    runs = runs_of(load_config(SweepConfig, file), file)
    by_depth: dict[int, list] = {}
    for run in runs:
        config = load_run("ibq/train_ar.py", run.parts[0].command[1:])
        by_depth.setdefault(config.model.depth, []).append((config, run))
    assert len(by_depth) >= 5 and all(len(found) >= 3 for found in by_depth.values())
    counts = {}
    for depth, found in by_depth.items():
        with torch.device("meta"):
            counts[depth] = sum(p.numel() for p in Transformer(found[0][0].model).parameters())
        assert found[0][0].model.model_width == 64 * depth and found[0][0].model.num_heads == depth
    assert min(counts.values()) < 0.2e6 and max(counts.values()) > 9e6
    assert {run.held_out for run in runs} == {True, False}


# --- A sweep that is run ---


@pytest.fixture(scope="module")
def finished(workplace):
    """(folder, what was said) of two tiny transformers."""
    scaling = {
        "depths": [1],
        "tokens": [256, 512],
        "held_out": [1],
        "rules": {"batch_size": {"base": 8, "at_tokens": 512, "exponent": 1.0}, "validations": 2},
    }
    file = write_sweep(workplace, scaling=scaling)
    with contextlib.redirect_stdout(io.StringIO()) as said, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.chdir(ROOT)
        assert sweep.main(["--config", str(file), "--max-parallel", "2"]) == 0
    return workplace / "sizes", said.getvalue()


def test_results_hold_what_a_fit_needs(finished):
    folder, _ = finished
    results = json.loads((folder / "results.json").read_text())
    rows = list(csv.DictReader((folder / "results.csv").read_text().splitlines()))
    assert [row["run"] for row in results["runs"]] == [row["run"] for row in rows] == ["d1-512", "d1-256"]
    with torch.device("meta"):
        module = Transformer(TEST_MODEL)
    count = sum(parameter.numel() for parameter in module.parameters())
    embeddings = sum(
        p.numel() for name, p in module.named_parameters() if name.startswith(("tok_emb", "class_emb", "head.weight"))
    )
    for row, found, batch in zip(rows, results["runs"], (8, 4), strict=True):
        logged = scalars(folder / row["run"])
        assert found["parameters"] == int(row["parameters"]) == count
        assert 0 < found["non_embedding_parameters"] <= count - embeddings
        assert found["batch_size"] == batch and found["steps"] == 4 and found["depth"] == 1
        assert found["tokens"] == 4 * batch * SIDE**2
        assert found["flops"] == 4 * batch * transformer_flops(TEST_MODEL).textbook
        assert found["nll"] == float(row["nll"]) == logged["validation/nll"][4]
        assert found["bits_per_image"] == found["nll"] * TEST_MODEL.num_tokens / math.log(2)
        assert found["best_nll"] == min(logged["validation/nll"].values())
        assert found["train_loss"] == logged["loss/total"][4]
        assert max(logged["learning_rate"].values()) <= found["learning_rate"] * 1.0001
        assert found["held_out"] == 1 and found["seconds"] > 0


def test_the_table_and_the_page_show_them(finished):
    folder, said = finished
    assert "2 of 2 runs done" in said and "d1-512" in said and "NLL" in said and "FLOPs" in said
    page = (folder / "report.html").read_text()
    assert "Validation NLL" in page and "usage and perplexity" not in page
    assert "nan" not in (folder / "results.csv").read_text()
    markdown = (folder / "results.md").read_text()
    assert "| `d1-256` |" in markdown


def test_collect_writes_them_again(finished, workplace, capsys):
    folder, _ = finished
    before = (folder / "results.json").read_text()
    (folder / "results.json").unlink()
    assert sweep.main(["--config", str(workplace / "sizes.yaml"), "--collect"]) == 0
    assert "$ python" not in capsys.readouterr().out and (folder / "results.json").read_text() == before
