"""tools/fit_scaling.py and ibq/scaling/power_law.py: known constants are found again, and doubts are named."""

import csv
import importlib
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from support.processes import run_script

from ibq.config import UserError
from ibq.scaling.law_fit import Runs, Settings, analyse, budgets_to_fit
from ibq.scaling.law_support import findings, supported
from ibq.scaling.power_law import (
    Frontier,
    PowerLaw,
    Problem,
    bootstrap,
    constant_names,
    fit,
    interval,
    objective,
    prediction_interval,
)

tool = importlib.import_module("tools.fit_scaling")

CHINCHILLA = PowerLaw(floor=1.69, coefficients=(406.4, 410.7), exponents=(0.34, 0.28))
SMALL = PowerLaw(floor=1.2, coefficients=(20.0, 3000.0), exponents=(0.3, 0.7))
FLAT = PowerLaw(floor=0.5, coefficients=(2.0, 5.0), exponents=(0.1, 0.15))
GRIDS = {
    "chinchilla": (CHINCHILLA, np.geomspace(5e7, 1.6e10, 6), np.geomspace(1e9, 5e11, 6)),
    "small": (SMALL, np.geomspace(1.3e5, 1.6e7, 6), np.geomspace(6.4e4, 2e6, 6)),
    "flat": (FLAT, np.geomspace(1e5, 1e9, 6), np.geomspace(1e6, 1e10, 6)),
}


def make_runs(law: PowerLaw, sizes, budgets, noise: float = 0.0, seed: int = 0, k: float = 4.1) -> Runs:
    """Every size at every budget; the largest run is held out."""
    rng = np.random.default_rng(seed)
    n, d = (values.ravel() for values in np.meshgrid(sizes, budgets, indexing="ij"))
    losses = law(n, d) * np.exp(noise * rng.standard_normal(len(n)))
    names = tuple(f"n{a}-d{b}" for a in range(len(sizes)) for b in range(len(budgets)))
    held = np.arange(len(n)) == len(n) - 1
    return Runs(names=names, parameters=n, tokens=d, losses=losses, flops=k * n * d, held_out=held)


def pairs(runs: Runs) -> np.ndarray:
    return np.stack([runs.parameters, runs.tokens], axis=1)


def write_runs(file, runs: Runs, **changed) -> None:
    rows = [
        {"run": name, "parameters": n, "tokens": d, "nll": loss, "flops": c}
        for name, n, d, loss, c in zip(runs.names, *(getattr(runs, field).tolist() for field in
                                       ("parameters", "tokens", "losses", "flops")), strict=True)
    ]  # fmt: skip
    rows[1].update(changed)
    if file.suffix == ".csv":
        with open(file, "w", newline="") as target:
            writer = csv.DictWriter(target, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        file.write_text(json.dumps({"runs": rows}))


# --- The arithmetic ---


@pytest.mark.parametrize("predictors", [1, 2])
def test_the_gradient_is_that_of_the_objective(predictors):
    rng = np.random.default_rng(predictors)
    x, y = rng.standard_normal((7, predictors)), rng.standard_normal(7)
    theta, weights = rng.standard_normal(1 + 2 * predictors), rng.integers(0, 3, 7).astype(float)
    _, gradient = objective(theta, x, y, weights, 0.3)
    for index in range(len(theta)):
        step = np.zeros_like(theta)
        step[index] = 1e-6
        ends = [objective(theta + sign * step, x, y, weights, 0.3)[0] for sign in (1, -1)]
        assert gradient[index] == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5, abs=1e-7)


def test_the_objective_is_the_papers():
    runs = make_runs(CHINCHILLA, *GRIDS["chinchilla"][1:], noise=0.01)
    x, y = np.log(pairs(runs)), np.log(runs.losses)
    e, a, b, alpha, beta = 0.4, 5.5, 6.5, 0.36, 0.3
    predicted = np.log(np.exp(e) + np.exp(a - alpha * x[:, 0]) + np.exp(b - beta * x[:, 1]))
    r, delta = np.abs(predicted - y), 1e-3
    huber = np.where(r <= delta, r**2 / 2, delta * (r - delta / 2))
    value, _ = objective(np.array([e, a, b, alpha, beta]), x, y, np.ones(len(y)), delta)
    assert value == pytest.approx(huber.sum() / delta**2, rel=1e-12), "a sum, in units of delta^2"


@pytest.mark.parametrize("name", GRIDS)
def test_exact_losses_give_the_exact_constants(name):
    law, *grid = GRIDS[name]
    runs = make_runs(law, *grid)
    found = fit(pairs(runs), runs.losses)
    assert found.law.constants == pytest.approx(law.constants, rel=1e-3)
    assert found.bounds == () and np.abs(found.residuals).max() < 1e-5
    alone = PowerLaw(floor=law.floor, coefficients=law.coefficients[:1], exponents=law.exponents[:1])
    found = fit(grid[0][:, None], alone(grid[0]))
    assert found.law.constants == pytest.approx(alone.constants, rel=1e-3)


def test_no_start_near_the_truth_ends_lower():
    runs = make_runs(CHINCHILLA, *GRIDS["chinchilla"][1:], noise=0.01, seed=3)
    found = fit(pairs(runs), runs.losses)
    problem, ones = Problem.of(pairs(runs), runs.losses, 1e-3), np.ones(len(runs))
    rng = np.random.default_rng(0)
    logs = np.log(CHINCHILLA.coefficients) - np.array(CHINCHILLA.exponents) * problem.centre
    truth = np.array([np.log(CHINCHILLA.floor), *logs, *CHINCHILLA.exponents])
    ends = [problem.solve([truth + 0.1 * rng.standard_normal(5)], ones)[0] for _ in range(10)]
    assert found.objective <= min(ends) * (1 + 1e-3)


def test_one_wild_run_changes_little():
    runs = make_runs(SMALL, *GRIDS["small"][1:], noise=0.002)
    losses = runs.losses.copy()
    losses[8] *= 1.5
    found = fit(pairs(runs), losses)
    assert found.law.constants == pytest.approx(SMALL.constants, rel=0.4)
    assert np.argmax(np.abs(found.residuals)) == 8


@pytest.mark.parametrize("name", GRIDS)
def test_known_constants_lie_in_their_intervals(name):
    law, *grid = GRIDS[name]
    hits, seeds = np.zeros(5), range(3)
    for seed in seeds:
        runs = make_runs(law, *grid, noise=0.004, seed=seed)
        laws = bootstrap(pairs(runs), runs.losses, 30, np.random.default_rng(0))
        samples = np.array([resampled.constants for resampled in laws])
        for index, truth in enumerate(law.constants):
            low, high = interval(samples[:, index], 0.95, len(runs), 5)
            hits[index] += low <= truth <= high
            assert abs(np.median(samples[:, index]) - truth) < 3 * (high - low), (name, constant_names(2)[index])
    # 95% intervals: of 15, more than two misses have a probability of 4%, and the constants miss together.
    assert hits.sum() >= 5 * len(seeds) - 3, dict(zip(constant_names(2), hits, strict=True))


def test_a_broken_law_is_not_recovered():
    """The control: losses of another law than the one that is compared with miss its intervals."""
    runs = make_runs(CHINCHILLA, *GRIDS["chinchilla"][1:], noise=0.004, seed=1)
    other = make_runs(PowerLaw(floor=1.69, coefficients=(406.4, 410.7), exponents=(0.30, 0.28)),
                      *GRIDS["chinchilla"][1:], noise=0.004, seed=1)  # fmt: skip
    inside = []
    for data in (runs, other):
        laws = bootstrap(pairs(data), data.losses, 40, np.random.default_rng(0))
        low, high = interval(np.array([law.exponents[0] for law in laws]), 0.95, len(data), 5)
        inside.append(low <= 0.34 <= high)
    assert inside == [True, False]


def test_intervals_are_seeded_and_widen_with_few_points():
    runs = make_runs(SMALL, *GRIDS["small"][1:], noise=0.01)
    first, again, other = (
        [law.constants for law in bootstrap(pairs(runs), runs.losses, 3, np.random.default_rng(seed))]
        for seed in (1, 1, 2)
    )
    assert first == again != other
    samples = np.random.default_rng(0).standard_normal(20_000)
    many, few = (interval(samples, 0.95, points, 5) for points in (10_000, 12))
    assert many == pytest.approx((-1.96, 1.96), abs=0.05)
    assert few[1] > 1.5 * many[1]
    low, high = prediction_interval(np.ones(500), np.array([-0.02, 0.02] * 20), 0.9, 5, np.random.default_rng(0))
    assert low < 0.98 and high > 1.02, "the scatter of the runs belongs to a prediction"


def test_the_frontier_is_the_best_use_of_compute():
    frontier = Frontier(law=CHINCHILLA, flops_per_nd=6.0)
    assert frontier.exponents == pytest.approx((0.28 / 0.62, 0.34 / 0.62))
    for flops in (1e18, 1e21):
        n, d, loss = frontier.best(flops)
        assert 6 * n * d == pytest.approx(flops)
        nearby = np.geomspace(n / 3, 3 * n, 501)
        losses = CHINCHILLA(nearby, flops / (6 * nearby))
        assert loss <= losses.min() * (1 + 1e-9) and nearby[np.argmin(losses)] == pytest.approx(n, rel=0.01)


@pytest.mark.parametrize("values, words", [([-1.0], "finite and positive"), ([np.nan], "finite and positive")])
def test_what_has_no_logarithm_is_refused(values, words):
    runs = make_runs(SMALL, *GRIDS["small"][1:])
    with pytest.raises(ValueError, match=words):
        fit(pairs(runs), np.concatenate([runs.losses[:-1], values]))
    with pytest.raises(ValueError, match="4 points cannot determine 5 constants"):
        fit(pairs(runs)[:4], runs.losses[:4])


# --- What the runs support ---

QUICK = Settings(resamples=20)


def judged(runs: Runs):
    analysis = analyse(runs, QUICK)
    return analysis, findings(analysis)


def test_good_runs_are_supported_and_predict_the_largest():
    runs = make_runs(SMALL, *GRIDS["small"][1:], noise=0.003, k=4.1)
    analysis, found = judged(runs)
    assert supported(found, "L(N, D)"), found
    (prediction,) = analysis.joint.predictions
    assert prediction.name == runs.names[-1] and prediction.inside and abs(prediction.error) < 0.02
    assert runs.names[-1] not in analysis.joint.runs.names
    assert analysis.frontier.frontier.flops_per_nd == pytest.approx(4.1) and analysis.frontier.measured
    assert analysis.frontier.a[0] <= 0.7 / 1.0 <= analysis.frontier.a[1]
    assert [law.tokens for law in analysis.by_size] == pytest.approx(GRIDS["small"][2])


def codes(found, law="L(N, D)") -> set[str]:
    return {finding.code for finding in found if finding.law == law and finding.serious}


def test_too_few_sizes_or_budgets_are_named():
    sizes, budgets = GRIDS["small"][1:]
    analysis, found = judged(make_runs(SMALL, sizes[:2], budgets))
    assert analysis.joint is None and codes(found) == {"too_few"} and codes(found, "L(N)") == {"too_few"}
    assert any("11 runs of 2 sizes and 6 token budgets" in finding.text for finding in found)
    analysis, found = judged(make_runs(SMALL, sizes, budgets[:1]))
    assert analysis.joint is None and "too_few" in codes(found) and len(analysis.by_size) == 1


def test_a_loss_that_does_not_depend_on_size_is_named():
    law = PowerLaw(floor=1.2, coefficients=(1e-9, 3000.0), exponents=(0.3, 0.7))
    _, found = judged(make_runs(law, GRIDS["small"][1][::2], GRIDS["small"][2], noise=0.003))
    assert codes(found) & {"bound_A", "bound_alpha", "wide_alpha"}, found


def test_scatter_is_named():
    _, found = judged(make_runs(SMALL, GRIDS["small"][1][::2], GRIDS["small"][2], noise=0.15))
    assert {"residuals"} <= codes(found) and not supported(found, "L(N, D)")


def test_a_larger_run_that_is_off_is_named():
    runs = make_runs(SMALL, *GRIDS["small"][1:], noise=0.003)
    runs.losses[-1] *= 1.2
    _, found = judged(runs)
    assert "held_out" in codes(found)
    (text,) = [finding.text for finding in found if finding.code == "held_out" and finding.law == "L(N, D)"]
    assert f"held-out run {runs.names[-1]} gave {runs.losses[-1]:.4f}, outside of the predicted" in text


def test_losses_of_another_form_are_named():
    runs = make_runs(SMALL, GRIDS["small"][1][::2], GRIDS["small"][2], noise=0.001)
    product = np.log(runs.parameters / 1.3e6) * np.log(runs.tokens / 3.6e5)
    runs = replace(runs, losses=runs.losses * np.exp(-0.01 * product))
    _, found = judged(runs)
    assert "pattern" in codes(found), found
    assert any("larger models gain more from tokens" in finding.text for finding in found)


def test_larger_models_that_lose_are_named():
    runs = make_runs(SMALL, GRIDS["small"][1], GRIDS["small"][2][::2], noise=0.003)
    runs.losses[12] *= 1.1
    _, found = judged(runs)
    (text,) = [finding.text for finding in found if finding.code == "rising"]
    assert text.startswith("at 64k tokens n4-d0 lost to smaller models") and runs.names[12] == "n4-d0"


def test_narrow_runs_are_named():
    runs = make_runs(SMALL, np.geomspace(1e6, 2e6, 3), np.geomspace(1e5, 2e5, 3), noise=0.003)
    _, found = judged(runs)
    assert {"narrow"} <= codes(found)
    assert any("the sizes differ by a factor of 2 only" in finding.text for finding in found)


def test_budgets_are_grouped():
    runs = make_runs(SMALL, GRIDS["small"][1], np.array([1e5, 1.01e5, 3e5]))
    assert [mask.sum() for mask in runs.budgets()] == [12, 6]
    assert len(budgets_to_fit(runs)) == 2


# --- The command ---


@pytest.fixture
def chinchilla_file(tmp_path):
    file = tmp_path / "runs.csv"
    write_runs(file, make_runs(CHINCHILLA, *GRIDS["chinchilla"][1:], noise=0.003))
    return file


def test_the_command_writes_everything(chinchilla_file, tmp_path, capsys):
    tool.main([str(chinchilla_file), "--output", str(tmp_path / "out"), "--resamples", "25"])
    said = capsys.readouterr().out
    written = json.loads((tmp_path / "out/fit.json").read_text())
    law = written["laws"][0]
    for name, truth in zip(constant_names(2), CHINCHILLA.constants, strict=True):
        constant = law["constants"][name]
        assert constant["low"] <= truth <= constant["high"], name
    assert written["supported"] == law["supported"] and written["frontier"]["measured"] is True
    assert written["frontier"]["flops_per_parameter_and_token"] == pytest.approx(4.1)
    (prediction,) = law["predictions"]
    assert prediction["name"] == "n5-d5" and prediction["inside"], "the run with the most FLOPs"
    assert f"measured {prediction['measured']:.4f}: inside" in said
    assert len(written["runs"]) == 36 and sum(run["held_out"] for run in written["runs"]) == 1
    for name in ("size", "tokens", "flops", "residuals"):
        picture = tmp_path / "out" / f"{name}.png"
        assert Image.open(picture).width > 300 and picture.stat().st_size < 150_000


def test_marked_runs_are_held_out_and_doubts_are_told(tmp_path, capsys):
    runs = make_runs(SMALL, GRIDS["small"][1][::2], GRIDS["small"][2], noise=0.2)
    (tmp_path / "sweep").mkdir()
    write_runs(tmp_path / "sweep/results.json", runs, held_out=1)
    tool.main([str(tmp_path / "sweep"), "--resamples", "20"])
    said = capsys.readouterr().out
    assert "held out: n0-d1;" in said and "WARNING: the runs do not support the fit" in said
    written = json.loads((tmp_path / "sweep/fit/fit.json").read_text())
    assert written["supported"] is False and written["findings"]
    everything = tool.hold_out(tool.read_runs(tmp_path / "sweep", "nll", "parameters")[1], ["none"])
    assert not everything.held_out.any()


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"nll": "nan"}, "run n0-d1: nll is nan, not a positive number; train that run again"),
        ({"nll": None}, "run n0-d1: nll is missing"),
        ({"tokens": -5}, "run n0-d1: tokens is -5"),
        ({"flops": "many"}, "run n0-d1: flops is many"),
        ({"run": "n0-d0"}, "run n0-d0 is there twice"),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_rows_of_no_use_are_named(tmp_path, changed, words, suffix):
    file = tmp_path / f"runs{suffix}"
    write_runs(file, make_runs(SMALL, *GRIDS["small"][1:]), **changed)
    with pytest.raises(UserError, match=words) as caught:
        tool.main([str(file)])
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)


def test_files_of_no_use_are_named(chinchilla_file, tmp_path):
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "folder").mkdir()
    for name, words in {
        "nowhere.csv": "not found; give a sweep's folder",
        "empty.json": "holds no runs",
        "list.json": "cannot be read",
        "bad.json": "cannot be read",
        "folder": "no results.json or results.csv; run the sweep",
    }.items():
        with pytest.raises(UserError, match=words):
            tool.main([str(tmp_path / name)])
    for arguments, words in {
        ("--loss", "perplexity"): "has no column 'perplexity', only run, parameters",
        ("--held-out", "d9"): "--held-out: there is no run 'd9'",
        ("--resamples", "3"): "--resamples: 3 give no intervals",
        ("--level", "95"): "--level: 95.0 is no probability",
        ("--delta", "0"): "--delta: 0.0 is not positive",
    }.items():
        with pytest.raises(UserError, match=words):
            tool.main([str(chinchilla_file), *arguments])
    assert not (tmp_path / "fit").exists()


def test_mistakes_end_with_2(tmp_path):
    process = run_script("tools/fit_scaling.py", str(tmp_path / "nowhere.csv"))
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1
