"""What the processes of one tool agree on."""

import json
from collections.abc import Callable
from typing import TypeVar

from ibq import dist

Result = TypeVar("Result")  # what JSON can say


def on_main(action: Callable[[], Result]) -> Result:
    """Rank 0's result on every rank; an error of rank 0 ends all of them, and it alone says so."""
    result, problem = None, None
    if dist.is_main():
        try:
            result = action()
        except Exception as caught:
            problem = caught
    result, failed = json.loads(dist.text_from_main(json.dumps([result, problem is not None])))
    if problem is not None:
        raise problem
    if failed:
        raise SystemExit(2)
    return result
