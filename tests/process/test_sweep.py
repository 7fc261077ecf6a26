"""launchers/sweep.py: what runs, what is run again, what is shown."""

import contextlib
import csv
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image
from support import ROOT
from support.points import HANG_S, Points
from support.training import make_workplace

import yaml
from ibq.config import ConfigError, UserError, load_config
from ibq.reports.ablation import COLUMNS, AblationData, best_runs, cell
from ibq.reports.seeds import mean_curve, over_seeds
from ibq.training.ar_config import ARRunConfig
from ibq.training.tokenizer_config import TokenizerRunConfig
from tools import evaluate, sample

sweep = importlib.import_module("launchers.sweep")
results = importlib.import_module("launchers.lib.sweep.results")
RUN_CONFIGS = {"tokenizer": TokenizerRunConfig, "transformer": ARRunConfig}
grid_module = importlib.import_module("launchers.lib.sweep.grid")
state_module = importlib.import_module("launchers.lib.sweep.state")
table_module = importlib.import_module("launchers.lib.sweep.table")

# A run without any training: it says what runs say, and notes that it was started.
QUICK_SCRIPT = """
import json, pathlib, sys, time
given = dict(text.split("=", 1) for text in sys.argv if "=" in text)
folder = pathlib.Path(given["output"])
folder.mkdir(parents=True, exist_ok=True)
with open(folder / "starts", "a") as file:
    file.write("x")
starts = len((folder / "starts").read_text())
if "broken" in given:
    print("error: seed: a mistake; mend it\\nnoise after it")
    sys.exit(2)
if starts <= int(given.get("crashes", 0)):
    sys.exit("an accident")
row = {"step": 3, "seconds/step": 0.5 + int(given.get("seed", 0)), "validation/psnr": 20.5}
(folder / "metrics.jsonl").write_text(json.dumps(row) + "\\n")
(folder / "status.json").write_text(json.dumps({"state": "finished", "step": 3, "total_steps": 3}))
"""


def write_sweep(file: Path, **values) -> Path:
    """A sweep file; by default without evaluation, of a script that only pretends to train."""
    script, base = file.with_suffix(".py"), file.with_suffix(".base.yaml")
    script.write_text(QUICK_SCRIPT)
    base.write_text("seed: 0\nquantizer: {kind: ibq, dim: 8}\n")
    given = {"name": "test", "script": str(script), "base": str(base), "evaluation": None,
             "output": str(file.with_suffix(""))} | values  # fmt: skip
    file.write_text(yaml.dump({key: value for key, value in given.items() if value != "absent"}))
    return file


def start(file: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "launchers/sweep.py", "--config", str(file), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def starts(folder: Path) -> int:
    return len((folder / "starts").read_text()) if (folder / "starts").exists() else 0


# --- Trained tokenizers ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(sweep file, output folder, what was said) of two tokenizers; the training of the first fails at first."""
    folder = make_workplace(tmp_path_factory.mktemp("sweep"))
    script = folder / "flaky.py"
    script.write_text(
        "import pathlib, runpy, sys\n"
        f"mark = pathlib.Path({str(folder / 'mark')!r})\n"
        "if 'num_codes=16' in ' '.join(sys.argv) and not mark.exists():\n"
        "    mark.touch()\n"
        "    sys.exit(1)\n"
        f"sys.argv[0] = {str(ROOT / 'ibq/train_tokenizer.py')!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    file = write_sweep(
        folder / "sizes.yaml",
        script=str(script),
        base=str(folder / "tokenizer.yaml"),
        title="Sizes & <codes>",
        overrides=["loss.gan.enabled=false"],
        grid={"model.quantizer.num_codes": [16, 32]},
        evaluation={"pictures": 3},
    )
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert sweep.main(["--config", str(file), "--max-parallel", "2"]) == 0
    return file, folder / "sizes", said.getvalue()


@pytest.mark.slow
def test_the_sweep_says_what_it_does(trained):
    _, folder, said = trained
    assert said.count("$ python tools/evaluate.py reconstruction") == 4
    assert said.count("flaky.py --config") == 3, "two runs, one of them twice"
    assert "num_codes=16: train ended with exit code 1" in said and "once more" in said
    assert "2 of 2 runs done" in said and f"page {folder / 'report.html'}" in said
    assert "\x1b" not in said, "no redrawing where there is no terminal"
    assert "$ python tools/evaluate.py" in (folder / "num_codes=16/sweep.log").read_text()


@pytest.mark.slow
def test_tables_hold_the_figures(trained):
    _, folder, said = trained
    results = json.loads((folder / "results.json").read_text())
    assert results["missing"] == [] and [row["run"] for row in results["runs"]] == ["num_codes=16", "num_codes=32"]
    rows = list(csv.DictReader((folder / "results.csv").read_text().splitlines()))
    for row, found, codes in zip(rows, results["runs"], (16, 32), strict=True):
        run = folder / row["run"]
        measured = {name: json.loads((run / f"{name}.json").read_text()) for name in ("reconstruction", "usage")}
        assert found["psnr"] == float(row["psnr"]) == measured["reconstruction"]["metrics"]["psnr"]
        assert found["usage"] == measured["usage"]["metrics"]["usage"]
        assert measured["usage"]["images"].endswith("train-*.tar")
        assert measured["reconstruction"]["images"].endswith("val-*.tar")
        assert int(row["num_codes"]) == codes and found["tokens_per_code"] == 40 * 16 / codes
        assert found["steps"] == 4 and 0 < found["seconds_per_step"] < found["seconds"] and found["peak_memory_gib"] > 0
        assert row["settings"] == f"model.quantizer.num_codes={codes}"
    assert results["runs"][1]["parameters"] - results["runs"][0]["parameters"] == 16 * 16, "codes of 16 dimensions"
    assert cell(results["runs"][0], "psnr") in said


@pytest.mark.slow
def test_the_page_is_whole_and_by_itself(trained):
    _, folder, _ = trained
    page = (folder / "report.html").read_text()
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(?!data:)[\w/.]", page.split("</style>")[1])
    assert "https:" not in page and "Sizes &amp; &lt;codes&gt;" in page
    assert page.count("<img") == 3 * 3, "originals and two runs"
    assert page.count("<svg") == 4
    for text in ("PSNR", "Perplexity", "num_codes=16", "loss.gan.enabled=false", "launchers/sweep.py"):
        assert text in page


@pytest.mark.slow
def test_pictures_and_markdown_for_documents(trained):
    _, folder, _ = trained
    drawing = ElementTree.parse(folder / "pictures/curves.svg").getroot()
    assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
    text = " ".join(drawing.itertext())
    assert all(word in text for word in ("PSNR", "SSIM", "Codebook usage", "num_codes=32", "--s0"))
    sheet = Image.open(folder / "pictures/reconstructions.png")
    assert sheet.height == 3 * (64 + 6) + 6, "originals and two runs"
    page = (folder / "results.md").read_text()
    assert "![" in page and "pictures/curves.svg" in page and "pictures/reconstructions.png" in page
    (line,) = [line for line in page.splitlines() if line.startswith("| `num_codes=32` |") and "dB" not in line][:1]
    assert line.count("|") == page.splitlines()[page.splitlines().index(line) - 2].count("|")


@pytest.mark.slow
def test_what_is_done_is_not_run_again(trained, capsys):
    file, folder, _ = trained
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("*/best/*")}
    assert sweep.main(["--config", str(file)]) == 0
    assert "all 2 runs are done" in (said := capsys.readouterr().out) and "$ python" not in said
    assert stamps == {path: path.stat().st_mtime_ns for path in folder.glob("*/best/*")}
    with pytest.raises(
        UserError, match=r"run num_codes=16 was trained .*optimizer\.eps: .*--only num_codes=16 --fresh "
    ):
        sweep.main(["--config", str(file), "overrides=[loss.gan.enabled=false, optimizer.eps=1e-4]"])


@pytest.mark.slow
def test_a_stopped_sweep_goes_on(tmp_path, capsys):
    make_workplace(tmp_path)
    script = tmp_path / "train.py"  # the second run only pretends to train
    script.write_text(
        "import runpy, sys\n"
        f"quick, real = {str(tmp_path / 'sweep.py')!r}, {str(ROOT / 'ibq/train_tokenizer.py')!r}\n"
        "sys.argv[0] = quick if sys.argv[-1].endswith('second') else real\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    file = write_sweep(
        tmp_path / "sweep.yaml",
        script=str(script),
        base=str(tmp_path / "tokenizer.yaml"),
        overrides=["training.max_steps=40", "training.log_every=2", "checkpoint.save_every=1000"],
        runs={"first": [], "second": []},
    )
    points = Points(tmp_path / "points", {"logged": ("open", r"/metrics\.jsonl a", 3)})
    process, metrics = start(file, **points.environment), tmp_path / "sweep/first/metrics.jsonl"
    points.wait("logged", process)
    process.send_signal(signal.SIGTERM)
    points.wait("logged.signalled", process)  # the sweep has passed it on
    points.release("logged")
    said, errors = process.communicate(timeout=HANG_S)
    assert process.returncode == 143, said + errors
    assert "stopping 1 runs" in said and "Traceback" not in said + errors
    assert re.search(r"first +stopped", said) and re.search(r"second +queued", said)
    status = json.loads((tmp_path / "sweep/first/status.json").read_text())
    assert status["state"] == "stopped" and 0 < status["step"] < 40
    assert not (tmp_path / "sweep/second/status.json").exists()

    assert sweep.main(["--config", str(file)]) == 0
    assert "2 of 2 runs done" in capsys.readouterr().out
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [row["step"] for row in rows if "seconds/step" in row]
    assert steps == sorted(set(steps)) and steps[-1] == 40, "gone on, not begun again"
    assert sorted(path.name for path in metrics.parent.glob("checkpoints/*"))[0] == f"step-{status['step']:08d}"


# --- Order, failures, changes: runs without training ---


def test_retries_and_mistakes(tmp_path, capsys):
    runs = {"fine": [], "shaky": ["crashes=2"], "hopeless": ["crashes=9"], "mistaken": ["broken=true"]}
    file = write_sweep(tmp_path / "sweep.yaml", runs=runs)
    assert sweep.main(["--config", str(file), "--retries", "2"]) == 1
    out, err = capsys.readouterr()
    folder = tmp_path / "sweep"
    assert [starts(folder / name) for name in runs] == [1, 3, 3, 1], "exit code 2 is not worth a second trial"
    assert err.startswith("2 of 4 runs failed: hopeless (train ended with exit code 1: an accident)")
    assert "mistaken (train ended with exit code 2: error: seed: a mistake; mend it)" in err and err.count("\n") == 1
    results = json.loads((folder / "results.json").read_text())
    assert [row["run"] for row in results["runs"]] == ["fine", "shaky"] and results["missing"] == list(runs)[2:]
    assert "fine" in out and "Without results: hopeless, mistaken" in (folder / "report.html").read_text()
    # A mistake is mended: what is done stays.
    write_sweep(file, runs=runs | {"hopeless": [], "mistaken": []})
    assert sweep.main(["--config", str(file)]) == 0
    assert [starts(folder / name) for name in runs] == [1, 3, 4, 2]


def test_changed_settings_are_noticed(tmp_path, capsys):
    file = write_sweep(tmp_path / "sweep.yaml", runs={"a": ["quantizer.dim=4"], "b": ["quantizer.kind=vq"]})
    folder = tmp_path / "sweep"
    assert sweep.main(["--config", str(file), "--max-parallel", "2"]) == 0
    base = file.with_suffix(".base.yaml")
    base.write_text("seed: 0\n# said otherwise\nquantizer: {dim: 16, kind: ibq}\n")
    assert sweep.main(["--config", str(file)]) == 0, "of this neither run takes anything"
    base.write_text("seed: 1\nquantizer: {kind: ibq, dim: 8}\n")
    with pytest.raises(
        UserError, match=r"run a was trained with other settings \(seed: 0 -> 1\); --only a --fresh trains"
    ):
        sweep.main(["--config", str(file)])
    with pytest.raises(UserError, match="run b was trained with other settings"):
        sweep.main(["--config", str(file), "--only", "b"])
    assert [starts(folder / name) for name in "ab"] == [1, 1]
    (folder / "a/notes.txt").write_text("mine")
    assert sweep.main(["--config", str(file), "--fresh"]) == 0
    assert [starts(folder / name) for name in "ab"] == [2, 2]
    assert (folder / "a/notes.txt").exists(), "files of others stay"
    assert sweep.main(["--config", str(file), "--fresh", "--only", "b", "title=a new title"]) == 0
    assert [starts(folder / name) for name in "ab"] == [2, 3]
    capsys.readouterr()
    assert sweep.main(["--config", str(file), "--collect"]) == 0
    assert "$ python" not in capsys.readouterr().out


def test_a_folder_of_another_run_is_left_alone(tmp_path):
    file = write_sweep(tmp_path / "sweep.yaml", runs={"a": []})
    (tmp_path / "sweep/a").mkdir(parents=True)
    (tmp_path / "sweep/a/status.json").write_text("{}")
    with pytest.raises(UserError, match="holds a run that is not of this sweep; set another `output`"):
        sweep.main(["--config", str(file)])


def test_a_run_that_does_not_finish_has_failed(tmp_path, capsys):
    file = write_sweep(tmp_path / "sweep.yaml", runs={"a": []})
    file.with_suffix(".py").write_text("print('that is all')")
    assert sweep.main(["--config", str(file), "--retries", "0"]) == 1
    out, err = capsys.readouterr()
    assert "train ended with exit code 0: that is all" in err and "there are no results yet" in out


# --- Seeds ---


def test_tables_show_means_over_seeds_and_their_intervals(tmp_path, capsys):
    """Seconds a step of 0.5, 1.5 and 2.5: the half width is 4.3027 / sqrt(3) by the tables of Student's t."""
    file = write_sweep(tmp_path / "sweep.yaml", runs={"a": [], "b": ["crashes=1"]}, seeds=[0, 1, 2])
    folder = tmp_path / "sweep"
    assert sweep.main(["--config", str(file), "--only", "a.seed-1"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"a +3 +1,500 ms", out) and "±" not in out and "b.seed-2" in (folder / "results.md").read_text()
    assert sweep.main(["--config", str(file), "--max-parallel", "2"]) == 0
    assert sorted(path.parent.name for path in folder.glob("*/metrics.jsonl")) == [
        f"{name}.seed-{seed}" for name in "ab" for seed in (0, 1, 2)
    ]
    results = json.loads((folder / "results.json").read_text())
    assert [row["seconds_per_step"] for row in results["runs"]] == [0.5, 0.5, 1.5, 1.5, 2.5, 2.5]
    assert [row["run"] for row in results["runs"][:3]] == ["a.seed-0", "b.seed-0", "a.seed-1"] and not results[
        "missing"
    ]
    one, other = results["groups"]
    assert (one["run"], other["run"], one["seeds"], other["settings"]) == ("a", "b", [0, 1, 2], ["crashes=1"])
    assert one["mean"]["seconds_per_step"] == 1.5 and "steps" not in one["interval"]
    assert one["interval"]["seconds_per_step"] == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    for text in (capsys.readouterr().out, *((folder / name).read_text() for name in ("results.md", "report.html"))):
        assert text.count("1,500 ms ± 2,484 ms") == 2
    assert "Seeds: 0, 1, 2." in (folder / "report.html").read_text()


def test_the_best_of_means_is_marked_with_those_that_it_does_not_clearly_beat():
    rows = {"best": {"psnr": 20.0}, "near": {"psnr": 19.5}, "far": {"psnr": 18.0}, "once": {"psnr": 19.9}}
    intervals = {"best": {"psnr": 0.2}, "near": {"psnr": 0.4}, "far": {"psnr": 0.4}}
    empty = {"settings": {}, "common": (), "missing": (), "curves": {}, "reconstructions": {}, "command": ""}
    data = AblationData(title="", about="", rows=rows, originals=torch.empty(0), intervals=intervals, **empty)
    assert best_runs(data, "psnr") == {"best", "near"}
    assert best_runs(replace(data, intervals={}), "psnr") == {"best"}
    assert data.texts("near") == {"psnr": "19.50 ± 0.40"} and data.texts("once") == {"psnr": "19.90"}


def test_a_mean_curve_is_of_the_steps_that_all_have():
    assert mean_curve([[(1, 2.0), (2, 4.0)], [(1, 4.0), (2, 5.0), (3, 1.0)]]) == [(1, 3.0), (2, 4.5)]
    assert mean_curve([[]]) == []


def test_figures_that_one_seed_lacks_have_no_mean():
    means, intervals = over_seeds([{"nll": 1.0, "psnr": 2.0}, {"nll": 3.0}])
    assert means == {"nll": 2.0} and intervals["nll"] == pytest.approx(12.7062 * 1.0, rel=1e-5)


# --- What a sweep file says ---


def runs_of(tmp_path: Path, **values) -> list:
    file = write_sweep(tmp_path / "sweep.yaml", **values)
    return grid_module.runs_of(load_config(grid_module.SweepConfig, file), str(file))


def test_a_grid_is_every_combination(tmp_path):
    runs = runs_of(tmp_path, grid={"a.dim": [1, 2], "b.dim": ["x", [3, 4]], "b.on": [True]})
    assert [run.name for run in runs] == [
        "a.dim=1,b.dim=x,b.on=true",
        "a.dim=1,b.dim=3-4,b.on=true",
        "a.dim=2,b.dim=x,b.on=true",
        "a.dim=2,b.dim=3-4,b.on=true",
    ]
    assert runs[1].overrides == ("a.dim=1", "b.dim=[3, 4]", "b.on=true")
    assert runs[1].settings["b.dim"] == [3, 4] and runs[1].settings["b.on"] is True
    short = runs_of(tmp_path, grid={"model.quantizer.num_codes": [1024], "optimizer.learning_rate": ["1e-4", "true"]})
    assert short[0].name == "num_codes=1024,learning_rate=1e-4"
    assert short[1].overrides[1] == 'optimizer.learning_rate="true"', "text that would be read as something else"


def test_commands_hold_what_all_share_before_what_differs(tmp_path):
    (run,) = runs_of(tmp_path, overrides=["seed=3", "x.y=1"], runs={"a": ["seed=4"]})
    assert run.settings == {"seed": 4, "x.y": 1, "quantizer.kind": "ibq", "quantizer.dim": 8}
    command = run.parts[0].command
    assert command[3:] == ("seed=3", "x.y=1", "seed=4", f"output={tmp_path / 'sweep' / 'a'}")


def test_evaluation_takes_the_images_of_the_config(tmp_path):
    data = ["data.train=some/train-*.tar"]
    (run,) = runs_of(tmp_path, overrides=data, runs={"a": []}, evaluation="absent")
    commands = {part.name: " ".join(part.command) for part in run.parts}
    assert list(commands) == ["train", "reconstruction", "usage"]
    assert "--images some/train-*.tar --split validation --validation-every 10" in commands["reconstruction"]
    assert "--split train" in commands["usage"]
    (run,) = runs_of(tmp_path, overrides=data, runs={"a": []}, evaluation={"validation": "v.tar", "usage": "u.tar"})
    assert "--images v.tar" in " ".join(run.parts[1].command) and "--images u.tar" in " ".join(run.parts[2].command)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"runs": "absent"}, "give either `runs`"),
        ({"runs": {"a": []}, "grid": {"seed": [1]}}, "give either `runs`"),
        ({"runs": {"../a": []}}, "cannot name a run's folder"),
        ({"runs": {"pictures": []}}, "cannot name a run's folder"),
        ({"grid": {"seed": []}}, "seed has no values"),
        ({"runs": {"a": ["seed"]}}, "runs.a: seed: this is no setting; write key.path=value"),
        ({"runs": {"a": ["output=x"]}}, "every run gets a folder of its own"),
        ({"runs": {"a": ["x=[1"]}}, "not valid YAML"),
        ({"runs": {"a": []}, "base": "nowhere.yaml"}, "base: nowhere.yaml: file not found"),
        ({"runs": {"a": []}, "script": "nowhere.py"}, "script: nowhere.py does not exist"),
        ({"runs": {"a": []}, "evaluation": {}}, "evaluation.validation: the base config names no single place"),
        ({"runs": {"a": []}, "evaluation": {"pictures": 99}}, "evaluation.pictures: must lie in [1, 24]"),
        ({"runs": {"a": []}, "overides": []}, "did you mean overrides"),
        ({"runs": {"a": []}, "seeds": [1, 1]}, "seeds: must be different numbers from 0, got [1, 1]"),
        ({"runs": {"a": ["seed=3"]}, "seeds": [1]}, "seeds: run a has a seed of its own; leave out either"),
        ({"runs": {"a": []}, "seeds": [1], "overrides": ["seed=2"]}, "seeds: run a has a seed of its own"),
        ({"scaling": {"depths": [1], "tokens": [1e3]}, "seeds": [1]}, "seeds: a scaling law is fitted to single runs"),
        (
            {"runs": {"a": []}, "evaluation": {}, "generation": {"tokenizer": "t", "images": "i", "total": 9}},
            "evaluation: is of tokenizers, and `generation` of transformers; set `evaluation: null`",
        ),
        (
            {"runs": {"a": []}, "generation": {"reconstructions": True, "images": "i"}, "evaluation": None},
            "evaluation: makes the reconstructions that `generation` judges; leave it in",
        ),
        (
            {"runs": {"a": []}, "generation": {"reconstructions": True, "tokenizer": "t", "images": "i"}},
            "tokenizer: give it where the runs are transformers, or `transformer` or `reconstructions` where they are",
        ),
        (
            {"runs": {"a": []}, "generation": {"reconstructions": True, "images": "i", "total": 9}},
            "total: give it, and perhaps `sampler`, where images are drawn, and only there",
        ),
    ],
)
def test_mistakes_in_the_file_are_one_line(tmp_path, values, words):
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        runs_of(tmp_path, **values)
    assert "\n" not in str(caught.value) and "sweep.yaml" in str(caught.value)


def test_a_transformers_images_are_drawn_and_judged(tmp_path):
    """By commands that the tools understand."""
    generation = {"tokenizer": "t", "images": "some/train-*.tar", "total": 9, "sampler": ["--top-k", "5"]}
    (run,) = runs_of(tmp_path, runs={"a": []}, seeds=[4], generation=generation)
    assert [part.name for part in run.parts] == ["train", "sample", "generation"]
    drawn = sample.parse(run.parts[1].command[1:])
    assert (drawn.total, drawn.top_k, drawn.transformer, drawn.files) == (9, 5, str(run.folder), "none")
    judged = evaluate.parse(run.parts[2].command[1:])
    assert judged.samples == str(drawn.output / "samples.npz") and judged.json == run.folder / "generation.json"
    assert (judged.classifier, judged.classifier_validation) == ("some/train-*.tar", None)
    assert judged.classifier_steps == evaluate.parse(["generation", "--samples", "x"]).classifier_steps
    run.folder.mkdir(parents=True)
    metrics = {"classifier": {"generated_accuracy": 0.25, "generated_frechet": 3.0}}
    (run.folder / "generation.json").write_text(json.dumps({"metrics": metrics}))
    (run.folder / "sweep.json").write_text('{"parts": {}}')
    assert results.figures(run) == {"recognised": 0.25, "frechet": 3.0}


def test_reconstructions_are_judged_as_drawn_images_are(tmp_path):
    generation = {"reconstructions": True, "images": "some/train-*.tar", "validation": "some/val.tar"}
    evaluation = {"validation": "v", "usage": "u"}
    (run,) = runs_of(tmp_path, runs={"a": []}, generation=generation, evaluation=evaluation)
    assert [part.name for part in run.parts] == ["train", "reconstruction", "usage", "generation"]
    measured, used, judged = (evaluate.parse(part.command[1:]) for part in run.parts[1:])
    assert judged.samples == str(measured.samples) and str(run.folder) in judged.samples and used.samples is None
    assert (judged.classifier, judged.classifier_validation) == ("some/train-*.tar", "some/val.tar")


def finish(run) -> state_module.RunState:
    """A run of which every part has ended well."""
    (run.folder / "samples").mkdir(parents=True)
    state = state_module.open_run(run, fresh=False)
    (run.folder / "status.json").write_text('{"state": "finished"}')
    for part in run.parts:
        state.begin(part, 0.0)
        state.end(1.0, done=True)
    return state


def test_what_is_measured_anew_is_judged_anew(tmp_path):
    """Other reconstructions make those judged before them say nothing, though the command stays the same."""
    generation = {"reconstructions": True, "images": "i"}
    (run,) = runs_of(tmp_path, runs={"a": []}, generation=generation, evaluation={"validation": "v", "usage": "u"})
    assert finish(run).next_part() is None
    (again,) = runs_of(tmp_path, runs={"a": []}, generation=generation, evaluation={"validation": "w", "usage": "u"})
    state = state_module.open_run(again, fresh=False)
    assert state.next_part().name == "reconstruction"
    state.make_room(state.next_part())
    assert not (run.folder / "samples").exists()
    state.begin(state.next_part(), 0.0)
    state.end(1.0, done=True)
    assert state.next_part().name == "usage" and "generation" not in state.record["parts"]


def test_images_of_other_settings_make_room(tmp_path):
    """tools/sample.py does not write over them; those of the same command stay, as it goes on with them."""
    generation = {"tokenizer": "t", "images": "i", "total": 9}
    (run,) = runs_of(tmp_path, runs={"a": []}, generation=generation)
    (run.folder / "samples").mkdir(parents=True)
    state = state_module.open_run(run, fresh=False)
    state.begin(run.parts[1], 0.0)
    state.end(1.0, done=True)
    for total, stays in ((9, True), (12, False)):
        (again,) = runs_of(tmp_path, runs={"a": []}, generation=generation | {"total": total})
        state_module.open_run(again, fresh=False).make_room(again.parts[1])
        assert (run.folder / "samples").exists() == stays


@pytest.mark.parametrize("kind", ["tokenizer", "transformer"])
def test_other_weights_in_the_same_place_are_drawn_with_anew(tmp_path, kind):
    """Also after a part was begun by a version that did not note them: those images stay."""
    model = tmp_path / "model"
    (model / "best").mkdir(parents=True)
    (model / "best/info.json").write_text('{"step": 1}')
    evaluation = {"validation": "v", "usage": "u"} if kind == "transformer" else None
    generation = {kind: str(model), "images": "i", "total": 9}
    (run,) = runs_of(tmp_path, runs={"a": []}, generation=generation, evaluation=evaluation)
    finish(run)
    assert state_module.open_run(run, fresh=False).state == "done"
    (model / "best/info.json").write_text('{"step": 2}')
    state = state_module.open_run(run, fresh=False)
    assert state.next_part().name == "sample"
    state.make_room(state.next_part())
    assert not (run.folder / "samples").exists()
    for noted in state.record["parts"].values():
        noted.pop("models")
    assert state.next_part() is None


def test_mistakes_on_the_command_line_end_with_2(tmp_path):
    file = write_sweep(tmp_path / "sweep.yaml", runs={"a": []})
    process = start(file, "--only", "b")
    said, errors = process.communicate(timeout=HANG_S)
    assert process.returncode == 2 and said == ""
    assert errors == "error: --only: there is no run 'b'; the sweep has a\n"
    for arguments in (["--max-parallel", "0"], ["--retries", "-1"], ["--collect", "--fresh"], ["--only", "c"]):
        with pytest.raises(UserError, match=re.escape(arguments[0])):
            sweep.main(["--config", str(file), *arguments])


@pytest.mark.parametrize("file", sorted((ROOT / "yaml/ablations").glob("*.yaml")), ids=lambda file: file.stem)
def test_sweeps_that_come_with_the_project(file, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    kind = "transformer" if "transformer" in file.stem else "tokenizer"
    if kind in file.stem:
        load_config(RUN_CONFIGS[kind], file)
        return
    runs = grid_module.runs_of(load_config(grid_module.SweepConfig, file), str(file))
    assert len(runs) > 1
    for run in runs:
        kind = "transformer" if run.parts[0].command[0] == "ibq/train_ar.py" else "tokenizer"
        config = load_config(RUN_CONFIGS[kind], run.parts[0].command[2], run.parts[0].command[3:])
        assert config.output == str(run.folder)
        assert kind == "transformer" or not config.loss.gan.enabled or "discriminator" in file.stem


# --- The table ---


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_table_is_redrawn_on_a_terminal(tmp_path, monkeypatch):
    monkeypatch.setattr(table_module.shutil, "get_terminal_size", lambda: os.terminal_size((100, 30)))
    states = [state_module.open_run(run, fresh=False) for run in runs_of(tmp_path, runs={"a": [], "b": []})]
    terminal = Terminal()
    table = table_module.SweepTable(states, 1, terminal)
    folder = states[0].run.folder
    folder.mkdir(parents=True)
    (folder / "status.json").write_text('{"state": "running", "step": 0, "total_steps": 100}')
    states[0].begin(states[0].run.parts[0], 0.0)
    for now, step in ((10.0, 10), (20.0, 20)):
        (folder / "metrics.jsonl").write_text(f'{{"step": {step}}}\n{{"step": 9')  # the last line is being written
        table.update(now)
    frames = terminal.getvalue().split("\x1b[4F\x1b[J")
    assert len(frames) == 2 and "left" in frames[0]
    assert re.search(r"a +running: train +20/100 +20.0 s +1 min 20 s\n", frames[1])
    assert "0 of 2 runs done, about 3 min 00 s left" in frames[1], "80 s for this one, 100 s as this one for the other"
    table.say("hello")
    assert terminal.getvalue().endswith("\x1b[4F\x1b[Jhello\n")


def test_figures_are_printed_with_their_units():
    row = {"psnr": 21.768, "seconds_per_step": 0.3456, "seconds": 185.0, "parameters": 2_345_678, "usage": 0.5}
    printed = {name: cell(row, name) for name in COLUMNS}
    assert printed["psnr"] == "21.77" and printed["seconds_per_step"] == "346 ms" and printed["lpips"] == "–"
    assert printed["seconds"] == "3 min 05 s" and printed["parameters"] == "2.35M" and printed["usage"] == "50.0%"
