"""Progress bars with ETA, and messages that do not break them."""

import sys

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


def say(message: str) -> None:
    """Print a message to stderr above any bar."""
    tqdm.write(message, file=sys.stderr)
