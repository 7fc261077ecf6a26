"""What tools/plan.py proposes for 1, 4 and 8 GPUs of every kind."""

import json
import re
import shlex

import pytest
from support import ROOT

from ibq.config import exit_on_user_error, load_config
from ibq.scaling.hardware import GIB, GPUS
from ibq.training.ar_config import ARRunConfig
from ibq.training.tokenizer_config import TokenizerRunConfig
from tools.plan import main

YAML = ROOT / "yaml"
KINDS = {"short/b": ARRunConfig, "short/tokenizer_16384": TokenizerRunConfig, "xxl": ARRunConfig}


def run_plan(*argv) -> int:
    with pytest.raises(SystemExit) as end:
        exit_on_user_error(lambda: main([str(item) for item in argv]))
    return end.value.code


def survey(path, *argv):
    assert run_plan("--json", path, *argv) == 0
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", KINDS)
def test_proposals_fit_and_add_up(name, tmp_path, capsys):
    found = survey(tmp_path / "plan.json", "--config", YAML / f"{name}.yaml")
    machines, batch = found["machines"], found["training"]["batch_size"]
    assert [(m["gpu"]["name"], m["gpus"]) for m in machines] == [(kind, n) for kind in GPUS for n in (1, 4, 8)]
    for machine in machines:
        assert machine["fits"] and machine["memory_bytes"] <= machine["usable_bytes"]
        assert batch % (machine["micro_batch"] * machine["gpus"]) == 0 and machine["micro_batch"] >= 4
        assert machine["days"] == pytest.approx(machine["seconds_per_step"] * found["steps"] / 86400)
        price = machine["gpu"]["price"]
        assert machine["usd"] == pytest.approx(machine["days"] * 24 * machine["gpus"] * price)
        assert machine["images_per_second"] * machine["seconds_per_step"] == pytest.approx(batch)
        config = load_config(KINDS[name], YAML / f"{name}.yaml", shlex.split(machine["settings"]))
        assert config.training.micro_batch == machine["micro_batch"]
        assert config.model.gradient_checkpointing == (machine["recomputes"] != "nothing")
    text = capsys.readouterr().out
    rows = re.findall(r"^(\d) x (\S+)  .*[\d,]+$", text, re.M)
    assert len(rows) == len(machines) and "Assumed, not yours (--price): list prices of" in " ".join(text.split())
    share = 0.1 if "tokenizer" in name else 0.34
    assert found["mfu"] == share and f"all FLOPs at {share:.0%} of the GPU's dense bf16 rate" in " ".join(text.split())


def test_recomputation_and_engines_are_proposed_where_memory_is_short(tmp_path):
    path, config = tmp_path / "plan.json", ("--config", YAML / "tokenizer_16384.yaml")
    by_memory = {}
    for gib in (8, 40):
        first, *_ = survey(path, *config, "--gpu-memory-gib", gib)["machines"]
        by_memory[gib] = first
        assert first["usable_bytes"] == (gib - 4) * GIB
    assert [by_memory[gib]["recomputes"] != "nothing" for gib in (8, 40)] == [True, False]
    one, *_ = survey(path, "--config", YAML / "xxl.yaml", "--gpu", "4090")["machines"]
    assert one["layout"] == "ZeRO-3, optimizer on cpu"


def test_what_is_missing_is_said(tmp_path, capsys):
    found = survey(tmp_path / "plan.json", "--config", YAML / "l.yaml", "--gpu-memory-gib", 4.2)
    assert not any(machine["fits"] for machine in found["machines"])
    for machine in found["machines"]:
        assert machine["missing_bytes"] == pytest.approx(machine["memory_bytes"] - machine["usable_bytes"])
    text = capsys.readouterr().out
    assert text.count("nothing fits: even ") == 3 and re.search(r"lacks 0\.\d GiB a GPU", text)
    uneven = survey(tmp_path / "plan.json", "--config", YAML / "b.yaml", "--gpu", "h100", "training.batch_size=12")
    assert [machine["fits"] for machine in uneven["machines"]] == [True, True, False]
    assert "8 x h100       the batch of 12 does not divide by 8" in capsys.readouterr().out


def test_prices_are_the_users(tmp_path, capsys):
    path, config = tmp_path / "plan.json", ("--config", YAML / "short/b.yaml")
    common = (*config, "--gpu", "h100", "--gpu", "4090")
    found = survey(path, *common, "--price", 2, "--price", "4090=0.5")["machines"]
    assert {(machine["gpu"]["name"], machine["gpu"]["price"]) for machine in found} == {("h100", 2), ("4090", 0.5)}
    assert "USD per GPU hour: h100 2, 4090 0.5. By --price" in capsys.readouterr().out
    other = survey(path, *config, "--gpu-memory-gib", 48)["machines"]
    assert all(machine["usd"] is None for machine in other) and "? (give --price)" in capsys.readouterr().out
    planned = survey(path, *config, "--gpus", 8, "--price", 3)
    best = next(row for row in planned["layouts"] if row["name"] == planned["recommended"]["name"])
    assert planned["recommended"]["usd"] == pytest.approx(best["days"] * 24 * 8 * 3)
    assert planned["training"]["micro_batch"] == 96, "auto is what fits the config's own engine"


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--price", "much"], ["--price: much", "is no price"]),
        (["--price", "h100=-1"], ["--price", "is no price"]),
        (["--price", "v100=1"], ["--price: v100=1", "no such kind", "4090"]),
        (["--gpus", "8", "--gpu", "h100", "--gpu", "4090"], ["--gpu", "give --gpu once"]),
        (["--gpus", "3"], ["--gpus 3", "does not divide"]),
        (["training.micro_batch=most"], ["training.micro_batch", "int or auto"]),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(argv, words, tmp_path, capsys):
    path = tmp_path / "plan.json"
    assert run_plan("--config", YAML / "short/tokenizer_16384.yaml", "--json", path, *argv) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and all(word in said.err for word in words) and not path.exists()
