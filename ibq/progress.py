"""Progress bars with ETA, and messages that do not break them."""

import os
import sys
from collections.abc import Callable, Iterable

from tqdm import tqdm


def progress_bar(title: str, total: int, unit: str, *, initial: int = 0, disable: bool = False) -> tqdm:
    """A bar on stderr; in a log file it writes a line every quarter of a minute instead of redrawing."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=initial,
        desc=title,
        unit=unit,
        disable=disable,
        dynamic_ncols=terminal,
        mininterval=0.5 if terminal else 15.0,
        ascii=not terminal,
    )


def bar_of(title: str, unit: str, *, least: int = 1, disable: bool = False) -> Callable[[int, int], None]:
    """What is told (done, total): a bar that appears with the first word, if there are at least so many to come."""
    bars = []

    def report(done: int, total: int) -> None:
        if not bars:
            bars.append(progress_bar(title, total, unit, disable=disable or total < least))
        bars[0].update(done - bars[0].n)
        if done == total:
            bars[0].close()

    return report


def terminals() -> list[int]:
    """Which of this process's standard streams are a terminal."""
    return [stream for stream in (0, 1, 2) if os.isatty(stream)]


def leave(streams: Iterable[int]) -> None:
    """Let those of these streams lead nowhere whose terminal has been closed: writing to it would be an error."""
    with open(os.devnull, "r+b") as nowhere:
        for stream in streams:
            if not os.isatty(stream):
                os.dup2(nowhere.fileno(), stream)


def say(message: str) -> None:
    """Print a message to stderr above any bar."""
    tqdm.write(message, file=sys.stderr)
