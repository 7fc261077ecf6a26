"""Schedules against the reference's values: Python floats, relative tolerance 1e-12."""

import re

import pytest
import torch
from support.golden import assert_close, golden_json

from ibq.training.schedule import ar_schedule, linear_warmup, linear_warmup_cosine, multi_step_lr

RELATIVE = 1e-12
GOLDEN = golden_json("lr_schedule")
TOKENIZER = GOLDEN["tokenizer"]


def assert_relative(actual, expected, what):
    # Tensors, because a bare float would be compared in torch's default float32, coarser than the tolerance.
    pair = (torch.tensor(value, dtype=torch.float64) for value in (actual, expected))
    assert_close(*pair, RELATIVE * abs(expected), what)


def ar_values(step, settings):
    return ar_schedule(
        step,
        peak_lr=settings["peak_lr"],
        warmup_steps=settings["wp_it"],
        max_steps=settings["max_it"],
        warmup_start=settings["wp0"],
        end=settings["wpe"],
        weight_decay=settings["wd"],
        end_weight_decay=settings["twde"],
    )


@pytest.mark.parametrize("name", GOLDEN["ar"]["series"])
def test_ar_series(name):
    case = GOLDEN["ar"]["series"][name]
    assert case["series"]
    for row in case["series"]:
        values = ar_values(row["it"], case["settings"])
        # Both groups get the same values: the reference overwrites the 'no decay' group's weight decay.
        expected = {
            "lr": (values.lr, [row["lr"], row["no_decay_group_lr"]]),
            "weight decay": (values.weight_decay, [row["weight_decay"], row["no_decay_group_weight_decay"]]),
        }
        for what, (actual, stored) in expected.items():
            for value in stored:
                assert_relative(actual, value, f"{name}: {what} at step {row['it']}")


@pytest.mark.parametrize("name", GOLDEN["ar"]["official"])
def test_ar_official_settings_reach_their_ends(name):
    official, iterations = GOLDEN["ar"]["official"][name], 7
    max_steps = official["max_epochs"] * iterations
    settings = {"peak_lr": GOLDEN["ar"]["optimizer"]["lr"], "wd": 0.05, "wp0": 0.005, "max_it": max_steps}
    settings |= {"wp_it": official["wp"] * iterations, "wpe": official["wpe"], "twde": official["twde"]}
    peak = settings["peak_lr"]
    assert_relative(ar_values(0, settings).lr, peak * 0.005, "first step")
    assert_relative(ar_values(settings["wp_it"], settings).lr, peak, "end of warm-up")
    last = ar_values(max_steps - 1, settings)
    assert_relative(last.lr, peak * official["wpe"], "last step")
    assert_relative(last.weight_decay, official["twde"] or 0.05, "last weight decay")
    assert ar_values(max_steps + 100, settings) == last


@pytest.mark.parametrize("model", TOKENIZER["lr_drop_epoch"])
def test_tokenizer_rule(model):
    rule, drops = TOKENIZER["rule"], TOKENIZER["lr_drop_epoch"][model]
    base_lr = float(re.search(r"constant learning rate (\S+)", rule)[1])
    drop_rate = float(re.search(r"lr_drop_rate = (\S+)", rule)[1])
    lr = base_lr
    for epoch in range(TOKENIZER["max_epochs"][model]):
        assert_relative(multi_step_lr(epoch, base_lr, drops, drop_rate), lr, f"{model}: epoch {epoch}")
        if epoch + 1 in drops:
            lr *= drop_rate
    assert lr < base_lr or not drops


def test_tokenizer_optional_multipliers():
    optional = TOKENIZER["optional_schedules"]
    settings = optional["settings"]
    warmup, minimum = settings["warmup_steps"], settings["multiplier_min"]
    columns = optional["linear_warmup_multiplier"], optional["linear_warmup_cosine_multiplier"]
    for step, linear, cosine in zip(optional["steps"], *columns, strict=True):
        assert_relative(linear_warmup(step, warmup_steps=warmup), linear, f"linear warm-up at step {step}")
        value = linear_warmup_cosine(step, warmup_steps=warmup, max_steps=settings["max_steps"], minimum=minimum)
        assert_relative(value, cosine, f"warm-up and cosine at step {step}")


def test_a_perturbed_value_fails():
    """The comparison is not vacuous: ten tolerances away fails in every series, and so does NaN."""
    for case in GOLDEN["ar"]["series"].values():
        row = case["series"][-1]
        values = ar_values(row["it"], case["settings"])
        for actual, expected in ((values.lr, row["lr"]), (values.weight_decay, row["weight_decay"])):
            perturbed = [actual * (1 + 10 * RELATIVE), actual * (1 - 10 * RELATIVE)] if expected else [1e-300]
            for wrong in (*perturbed, float("nan")):
                with pytest.raises(AssertionError, match="differs by"):
                    assert_relative(wrong, expected, "perturbed")


def test_a_perturbed_python_float_fails():
    with pytest.raises(AssertionError, match="differs by"):
        assert_close(0.1 * (1 + 1e-11), 0.1, 1e-13, "perturbed")


@pytest.mark.parametrize(
    "step, warmup_steps, max_steps, field",
    [(-1, 0, 10, "step"), (0, 0, 0, "max_steps"), (0, -1, 10, "warmup_steps")],
)
def test_impossible_step_counts(step, warmup_steps, max_steps, field):
    with pytest.raises(ValueError, match=rf"^{field}: .*; "):
        ar_values(
            step,
            {
                "peak_lr": 1,
                "wd": 0,
                "twde": 0,
                "wp_it": warmup_steps,
                "max_it": max_steps,
                "wp0": 0,
                "wpe": 0,
            },
        )
    with pytest.raises(ValueError, match=rf"^{field}: .*; "):
        linear_warmup_cosine(step, warmup_steps=warmup_steps, max_steps=max_steps)


def test_shortest_runs_have_no_division_by_zero():
    settings = {"peak_lr": 1.0, "wd": 0.1, "twde": 0.2, "wp0": 0.5, "wpe": 0.1}
    assert ar_values(0, settings | {"wp_it": 0, "max_it": 1}) == (1.0, 0.1)
    assert ar_values(1, settings | {"wp_it": 1, "max_it": 2}).lr == 1.0
    assert ar_values(1, settings | {"wp_it": 2, "max_it": 2}).lr == 0.75
    assert ar_values(9, settings | {"wp_it": 20, "max_it": 2}).lr == 0.525  # warm-up longer than the training
    assert linear_warmup(0, warmup_steps=0) == 1.0
    assert linear_warmup_cosine(3, warmup_steps=3, max_steps=3) == 1.0
