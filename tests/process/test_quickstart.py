"""The quickstart, on somebody's own folder of images, in a dozen steps a stage."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import ROOT
from support.points import HANG_S, Points

KEYS = {
    "reconstruction": ["psnr", "thumbnail_psnr", "ssim"],
    "codebook": ["num_codes", "dim", "usage", "perplexity"],
    "ar": ["val_nll", "unigram_nll", "bigram_nll"],
    "classifier": ["generated_accuracy", "validation_accuracy", "chance", "generated_nearest_pixel"],
}


def quickstart(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/lib/quickstart/recipe.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_S)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, size in (("round ones", (40, 56)), ("square ones", (33, 33))):
        (folder / name).mkdir()
        for i in range(60):
            Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.mark.slow
def test_own_images_from_folder_to_report(images, tmp_path):
    output = tmp_path / "run"
    arguments = ["--smoke", "--data", str(images), "--output", str(output)]
    done = quickstart(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = json.loads((output / "metrics.json").read_text())
    for section, names in KEYS.items():
        assert all(np.isfinite(metrics[section][name]) for name in names)
    assert metrics["tokens_per_image"] <= 64 and metrics["seconds"] > 0
    page = (output / "report.html").read_text()
    assert "round ones" in page and "square ones" in page
    assert metrics["classifier"]["chance"] == 0.5 and "Samples recognised" in page
    assert "Traceback" not in done.stdout + done.stderr

    before = (output / "report.html").read_bytes()
    again = quickstart(*arguments)
    assert again.returncode == 0 and "is finished" in again.stdout
    assert (output / "report.html").read_bytes() == before

    # Interrupted after the first stage: only the rest is done, and trained weights are not touched.
    weights = output / "tokenizer/best/model.safetensors"
    stamp = weights.stat().st_mtime_ns
    for name in ("metrics.json", "report.html", "reconstruction.json"):
        (output / name).unlink()
    shutil.rmtree(output / "transformer")
    resumed = quickstart(*arguments)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert (output / "report.html").exists() and weights.stat().st_mtime_ns == stamp

    other = quickstart("--smoke", "--output", str(output))
    assert other.returncode == 2 and "--fresh" in other.stderr


@pytest.mark.slow
def test_killed_run_goes_on_with_the_same_choices(images, tmp_path):
    output = tmp_path / "run"
    command = [
        sys.executable,
        "tools/lib/quickstart/recipe.py",
        "--minutes",
        "0.1",
        "--data",
        str(images),
        "--output",
        str(output),
    ]
    points = Points(
        tmp_path / "points", {"second save": ("shutil.rmtree", r"/run/tokenizer/checkpoints/\.tmp-step-\d+ ", 2)}
    )
    environment = os.environ | points.environment
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        points.wait("second save", process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    choices = json.loads((output / "plan.json").read_text())
    step = max(int(path.name[5:]) for path in output.glob("tokenizer/checkpoints/step-*"))
    assert 0 < step < choices["tokenizer"]
    # The same command goes on with those choices, without measuring the speed again.
    resumed = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        first = next(line for line in resumed.stdout if line.startswith("$"))
    finally:
        os.killpg(resumed.pid, signal.SIGKILL)
        resumed.wait()
    assert "calibration" not in first and f"training.max_steps={choices['tokenizer']}" in first


def test_bad_input_is_one_line(tmp_path):
    empty = quickstart("--data", str(tmp_path), "--output", str(tmp_path / "run"))
    assert empty.returncode == 2
    assert empty.stderr.startswith("error: ") and empty.stderr.count("\n") == 1
    assert quickstart("--minutes", "-1").returncode == 2
