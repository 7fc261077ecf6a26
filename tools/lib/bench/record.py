"""Where a bench's figures are kept."""

import argparse
import os
import re
import time
from pathlib import Path

# PyTorch is imported where it is needed: --help should not wait for it.


def file_of(place: Path, arguments: argparse.Namespace) -> Path:
    """The JSON file of a bench with these options: `place`, or in a folder one named BENCH_MODEL_HARDWARE_YYYYMM.json.

    The model is the config's, or the number of codes, or the size of the images, with the precision where there is a
    choice; or all of a bench that has several.
    """
    if not place.is_dir():
        return place
    if hasattr(arguments, "config"):
        model = Path(arguments.config).stem
    elif hasattr(arguments, "codes"):
        model = f"{arguments.codes}-codes"
    else:
        model = f"{arguments.size}px" if hasattr(arguments, "size") else "all"
    model += f"-{arguments.precision}" if hasattr(arguments, "precision") else ""
    words = [arguments.name, model, _hardware(getattr(arguments, "device", "cpu")), time.strftime("%Y%m")]
    return place / f"{'_'.join(word.replace('_', '-') for word in words)}.json"


def _hardware(device: str) -> str:
    """Such as nvidia-h100-80gb-hbm3, or cpu-2-cores."""
    if device == "cpu":
        return f"cpu-{os.cpu_count()}-cores"
    import torch

    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
