"""What holds for all tests."""

pytest_plugins = ["support.order"]
