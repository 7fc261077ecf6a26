"""The suite of benches: in time, in order, and honest about what did not run."""

import pytest

from tools.bench import BENCHES
from tools.lib.bench import suite
from tools.lib.bench.suite import STAGES, Stage, run_stages, table


@pytest.mark.slow
def test_stages_run_fail_are_stopped_and_left_out():
    stages = [
        Stage("works", "quantizer --codes 64 --dim 8 --images 1 --repeats 1 --no-picture --device cpu", 1),
        Stage("fails", "quantizer --codes 0", 1),
        Stage("is stopped", "-m http.server --bind 127.0.0.1 0", 1, most_s=3),
        Stage("says something", "-m platform", 1),
        Stage("has no time", "growth", 10_000),
    ]
    found = run_stages(stages, 600)
    assert list(found) == [stage.name for stage in stages]
    assert found["works"]["figures"]["ratio"]["speedup"] > 0 and found["works"]["seconds"] > 0
    assert "--codes" in found["fails"]["problem"] and found["is stopped"]["problem"] == "stopped after 3 s"
    assert found["has no time"] == {"command": "growth", "problem": "no time was left"}
    del found["works"]
    text = table({"device": "x", "versions": {"torch": "1", "cuda": None}, "stages": found})
    assert text.startswith("x: torch 1\n") and "has no time" in text and "stopped after 3 s" in text


@pytest.mark.parametrize("device", STAGES)
def test_stages_are_commands_that_exist(device):
    """Their options are read by the benches themselves."""
    from tools.bench import parse

    for stage in STAGES[device]:
        words = stage.words.split()
        if words[0] != "-m":
            assert words[0] in BENCHES and words[0] in suite.HEADLINES
            if "--device" in words:  # which the machine of the tests may lack
                place = words.index("--device")
                del words[place : place + 2]
            parse(words)


def test_headlines():
    step = {"ours": {"tokens_per_second": 1000.0, "mfu": 0.5, "peak_gib": 2.0}, "ratio": {"speedup": 2.0}}
    rows = {"bf16": 10.0}
    sample = {"images_per_second": rows, "ms_a_step": rows, "share_of_roofline": {"bf16": 0.5}}
    sample |= {"ratio": {"speedup": 3.0}, "with_pixels": {"ratio": 0.8}}
    stages = {
        "a": {"command": "ar-step x", "figures": step},
        "b": {"command": "sample", "figures": {"rows": {"32": sample}}},
    }
    text = table({"device": "x", "versions": {}, "stages": stages})
    assert "1,000.0 tokens/s, 50% of the products' limit, 2.0 GiB, 2.00 x the plain form" in text
    assert "32 images: 10.0 images/s, 10.00 ms a step, 50% of the roofline, 3.0 x the textbook form; with" in text
