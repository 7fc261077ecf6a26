"""What holds for all tests."""

import gc
import os
import random
import signal

import numpy as np
import pytest
import torch
from support import ENVIRONMENT

pytest_plugins = ["support.order", "support.needs"]


if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # So it is in a job in the background; all that tests start would ignore Ctrl-C too.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Start every test, and the fixtures made for it, from the same seeds: what fails here fails again."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def environment():
    """Give every file of tests the variables that all began with: some modules set others, such as DeepSpeed."""
    restore_environment()
    gc.collect()
    gc.freeze()  # modules above all, which the tests of this file would look through for garbage again and again
    yield
    restore_environment()


def restore_environment() -> None:
    own = {name: value for name, value in os.environ.items() if name.startswith("PYTEST_")}
    os.environ.clear()
    os.environ.update(ENVIRONMENT | own)
