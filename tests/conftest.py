"""What holds for all tests."""

import os

import pytest

pytest_plugins = ["support.order", "support.needs"]


@pytest.fixture(scope="module", autouse=True)
def environment():
    """Take back the variables that a file of tests has set: loading DeepSpeed sets some, for all that come after it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
