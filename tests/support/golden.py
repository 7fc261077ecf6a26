"""Reading the golden data and comparing with it, with the tolerances that its README states.

The folder is named by the environment variable IBQ_GOLDEN (default: tests/golden), so that another set of the
same form, with other sizes and cases, runs through the golden tests unchanged.
"""

import json
import os
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

DTYPES = {"f32": torch.float32, "f64": torch.float64}
FLOAT32_FACTOR = 20  # times the reference's own float32-against-float64 difference
FLOAT32_FLOOR = 1e-6  # of the largest absolute value
FLOAT64_TOLERANCE = 1e-9  # of the largest absolute value


def golden_dir() -> Path:
    """The folder that holds the golden data."""
    return Path(os.environ.get("IBQ_GOLDEN") or Path(__file__).parents[1] / "golden")


@cache
def golden_json(name: str) -> dict:
    """The JSON file `name`.json."""
    return json.loads((golden_dir() / f"{name}.json").read_text())


@cache
def golden_tensors(name: str) -> dict[str, Tensor]:
    """The tensors of `name`.safetensors."""
    return load_file(golden_dir() / f"{name}.safetensors")


def stored_quantities(file: str, name: str) -> dict[str, dict[str, Tensor]]:
    """quantity -> precision -> value, for every scalar and tensor that the golden data has of a case."""
    case, tensors = golden_json(file)["cases"][name], golden_tensors(file)
    found: dict[str, dict[str, Tensor]] = {}
    for precision in DTYPES:
        for key, value in case[precision].items():
            found.setdefault(key, {})[precision] = torch.tensor(value, dtype=torch.float64)
        prefix = f"{name}/{precision}/"
        for key, value in tensors.items():
            if key.startswith(prefix):
                found.setdefault(key.removeprefix(prefix), {})[precision] = value
    return found


def float32_tolerance(name: str, key: str, expected: Tensor, default_relative: float = 1e-5) -> float:
    """Absolute tolerance of a float32 result: 20 times the reference's own error, never below 1e-6 of the largest
    value.

    `key` is looked up in the file's `float32_vs_float64`; where it is not listed, `default_relative` x largest value.
    """
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    entry = golden_json(name).get("float32_vs_float64", {}).get(key)
    relative = default_relative if entry is None else FLOAT32_FACTOR * (entry["rel_to_max"] or 0.0)
    floor = max(FLOAT32_FLOOR, relative) * largest
    return max(floor, FLOAT32_FACTOR * (entry or {}).get("max_abs_diff", 0.0))


def assert_close(actual: Tensor | float, expected: Tensor | float, tolerance: float, what: str) -> None:
    """Fail unless shapes are equal and the largest absolute difference is within `tolerance`."""
    # A Python float read as float32 would lose what the comparison is about.
    actual, expected = (torch.as_tensor(v, dtype=torch.float64, device="cpu").detach() for v in (actual, expected))
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if actual.numel() == 0:
        return
    difference = float((actual - expected).abs().max())
    # `not <=` also fails on NaN.
    assert difference <= tolerance, f"{what}: differs by {difference:.3e}, tolerance {tolerance:.3e}"


def assert_float32(actual, expected, name: str, key: str, default_relative: float = 1e-5) -> None:
    """Compare a float32 result with the golden value under `float32_tolerance`."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert_close(actual, expected, float32_tolerance(name, key, expected, default_relative), f"{name}:{key}")


def assert_float64(actual, expected, key: str, floor: float = 0.0) -> None:
    """Compare a float64 result with the golden float64 value: 1e-9 of the largest value."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    assert_close(actual, expected, max(FLOAT64_TOLERANCE * largest, floor), key)


def assert_equal_codes(actual: Tensor, expected: Tensor, what: str) -> None:
    """Fail unless the integer codes are equal."""
    assert torch.equal(actual.flatten().cpu(), expected.flatten().cpu()), f"{what}: codes differ"
