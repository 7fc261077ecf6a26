"""What the scripts beside this folder are made of; nobody types a path in here."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the project


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
