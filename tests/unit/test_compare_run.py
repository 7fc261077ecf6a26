"""A run against the references: whose config is the same, what is said of the curves, what is added and refused."""

import json
import shutil
from pathlib import Path

import pytest
from support import ROOT

import yaml
from ibq.config import ConfigError, UserError
from tools import compare_run
from tools.lib.compare import references, verdict

OWN = "ablation_quantizers_ibq"


@pytest.fixture(scope="module")
def reference():
    return json.loads((compare_run.COMMITTED / f"{OWN}.seed-1.json").read_text())


@pytest.fixture
def run(reference, tmp_path):
    """A run's folder: a reference's own curves, or what `change` makes of them, with other settings perhaps."""

    def make(change=lambda row: row, steps=10**9, **settings):
        folder = tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        config = json.loads(json.dumps(reference["config"])) | {"output": "elsewhere", "device": "cpu"}
        for key, value in settings.items():
            section, _, name = key.partition("__")
            (config[section] if name else config)[name or section] = value
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        rows = [change(dict(row)) for row in reference["rows"] if row["step"] <= steps]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3')
        return folder

    return make


def louder(row):
    return {name: value * (1.5 if name == "loss/l1" else 1) for name, value in row.items()}


def test_every_reference_can_be_read_and_says_where_it_comes_from():
    found = references.read_references([compare_run.COMMITTED])
    assert {"quickstart_tokenizer", "quickstart_transformer", OWN} <= {one.name for one in found}
    for one in found:
        assert one.origin["edited"] is False and one.origin["revision"] and one.origin["cpu"], one.name
        assert one.curve("loss/total"), one.name
        assert all(one.config[key] in (None, references.ABSENT) for key in references.PLACES if key in one.config)
    assert all(file.stat().st_size < 40_000 for file in compare_run.COMMITTED.glob("*.json"))


def test_references_of_one_config_have_one_name():
    found = references.read_references([compare_run.COMMITTED])
    for one in found:
        for other in found:
            same = not references.differences(one, other) and not references.differences(one, other, said=True)
            assert same == (one.name == other.name), (one.name, other.name)


def test_a_run_like_the_references_is_within(run, capsys):
    folder = run(seed=7, steps=200, training__log_every=10)
    compare_run.main([str(folder)])
    said = capsys.readouterr().out
    assert f"{OWN}: " in said and "seed 0, 1" in said and "differs" not in said
    lines = [line for line in said.splitlines() if line.startswith(verdict.JUDGED)]
    assert len(lines) == 4 and all(line.endswith("within") and " 200 " in line for line in lines)
    page = (folder / "compare.html").read_text()
    assert page.count("<svg") >= 6 and "this run" in page and 'class="key area"' in page


def test_a_run_that_is_worse_is_above(run, capsys):
    compare_run.main([str(run(louder))])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("loss/l1")]
    assert "above by 0.07" in line


def test_what_may_differ_is_said(run, capsys):
    compare_run.main([str(run(precision="bf16"))])
    assert "differs, as it may, in precision=bf16 (there fp32)" in capsys.readouterr().out


def test_another_config_is_compared_only_on_request(run, capsys):
    folder = run(ema_decay=0.9)
    with pytest.raises(UserError, match=rf"nearest, {OWN}.*differs in ema_decay=0.9 \(there 0.995\)"):
        compare_run.main([str(folder)])
    assert not (folder / "compare.html").exists()
    compare_run.main([str(folder), "--reference", OWN])
    assert "ANOTHER CONFIG: ema_decay=0.9" in capsys.readouterr().out


def test_other_data_is_another_config(run):
    def fewer(row):
        return row | ({"data/epoch": 2 * row["data/epoch"]} if "data/epoch" in row else {})

    with pytest.raises(UserError, match=r"samples an epoch=1719 \(there 343\d\)"):
        compare_run.main([str(run(fewer))])


def test_a_run_becomes_a_reference(run, tmp_path, capsys):
    folder, own = run(optimizer__learning_rate=3e-3), tmp_path / "own"
    add = [str(folder), "--add", "mine", "--references", str(own)]
    compare_run.main(add)
    compare_run.main([str(folder), "--references", str(own)])
    assert "mine: 1 run (seed 1)" in capsys.readouterr().out
    with pytest.raises(UserError, match="is there already"):
        compare_run.main(add)
    run(seed=2)
    with pytest.raises(UserError, match=r"another config: optimizer.learning_rate=0.001 \(there 0.003\)"):
        compare_run.main(add)
    assert [path.name for path in own.iterdir()] == ["mine.seed-1.json"]


def test_a_run_from_weights_with_frozen_parts_becomes_a_reference(run, tmp_path, capsys):
    settings = {"optimizer__groups": {"encoder.*": "frozen", "quant*": 0.5}, "start_from": "my/weights"}
    settings |= {"codebook_start__kmeans": False, "codebook_start__warmup_steps": 0}
    folder, to = run(**settings), ["--references", str(tmp_path / "mine")]
    compare_run.main([str(folder), "--add", "tuned", *to])
    assert "my/weights" not in (tmp_path / "mine" / "tuned.seed-1.json").read_text()
    compare_run.main([str(folder), *to])
    assert "tuned" in capsys.readouterr().out
    for other in ({"optimizer__groups": {"encoder.*": "frozen"}}, {"start_from": None}):
        folder = run(**settings | other)
        with pytest.raises(UserError, match=next(iter(other)).replace("__", "[.]")):
            compare_run.main([str(folder), *to])


def test_sources_are_compared_but_for_their_places():
    here, there = ([{"train": f"{place}/t", "validation": f"{place}/v", "weight": 2.0}] for place in ("/a", "/b"))
    kept = references._without_places("data.sources", here)
    assert kept == [{"train": "-", "validation": "-", "weight": 2.0}]
    assert references._equal("data.sources", here, there) and references._equal("data.sources", kept, there)
    assert not references._equal("data.sources", kept, [there[0] | {"weight": 1.0}])
    assert not references._equal("data.sources", kept, None)


def test_a_reference_is_thin():
    rows = [{"step": step, "loss/total": 1 / step, "seconds/step": 2.0} for step in range(1, 1001)]
    rows += [{"step": 1000, "validation/psnr": 20.123456789}]
    found = references.thinned(rows)
    assert 100 <= len(found) <= references.MOST_ROWS + 1 and found[-1] == {"step": 1000, "validation/psnr": 20.123}
    assert found[-2] == {"step": 1000, "loss/total": 0.001}


def test_the_band_of_one_reference_is_its_own_wobble():
    line = [(step, 1.0 - step / 100) for step in range(10)]
    assert verdict.wobble(line, 9) == pytest.approx(0, abs=1e-9)
    rough = [(step, 1.0 + 0.1 * (-1) ** step) for step in range(10)]
    middle, margin = verdict.band_at([rough], 9, "loss/total")
    assert middle == pytest.approx(0.98) and 0.2 < margin < 0.5
    (_, apart) = verdict.band_at([line, [(step, y + 1) for step, y in line]], 9, "loss/total")
    assert apart == pytest.approx(2 * 0.5**0.5 * 1.5**0.5)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: shutil.rmtree(folder), "has no config.yaml; give the folder of a run"),
        (lambda folder: (folder / "metrics.jsonl").unlink(), "no loss is logged yet"),
        (
            lambda folder: (folder / "config.yaml").write_text("loss: {}"),
            "config.yaml: data, training: required and missing",
        ),
        (lambda folder: None, "there is no 'absent'; there are ablation"),
    ],
)
def test_bad_input_is_one_line(run, spoil, words):
    folder = run()
    spoil(folder)
    with pytest.raises((UserError, ConfigError), match=words) as caught:
        compare_run.main([str(folder), "--reference", "absent"])
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_a_damaged_reference_is_named(run, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own/x.json").write_text('{"name": "x"}')
    with pytest.raises(UserError, match=r"own/x.json: is no reference"):
        compare_run.main([str(run()), "--references", str(tmp_path / "own")])
    with pytest.raises(UserError, match=r"--references: .* is no folder"):
        compare_run.main([str(run()), "--references", str(tmp_path / "absent")])
    with pytest.raises(UserError, match="--add: where"):
        compare_run.main([str(run()), "--add", "x"])


def test_free_and_said_settings_exist():
    """Of today's configs: a setting that is renamed must not become one that is compared."""
    flat = {key for one in references.read_references([Path(ROOT) / "tools/references"]) for key in one.config}
    optional = {"data.tokenizer", "data.allow_other_tokenizer"}  # of images that are encoded at every step
    for key in {*references.FREE, *references.SAID} - optional:
        assert any(name == key or name.startswith(f"{key}.") for name in flat), key
