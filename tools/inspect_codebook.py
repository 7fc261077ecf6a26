"""Look at the codebook of a tokenizer: usage, dead codes, norms, distances between codes, and a picture of them.

python tools/inspect_codebook.py runs/tokenizer --output codebook.png
python tools/inspect_codebook.py tokenizer.safetensors --images 'shards/val-*.tar' --json codebook.json
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ibq.config import UserError, exit_on_user_error
from tools.lib.options import add_device_options, add_image_options, check_least, device_of

EPILOG = """\
Without --images there is the geometry of the codebook, and what a run's training has noted last; with them, which codes
a set of images selects, and how its latents stand to the codes. What the figures tell: ibq/quantizers/COLLAPSE.md.
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("tokenizer", help="run folder, its `best` folder, a checkpoint folder, or a published or exported file")
    add_image_options(parser, required=False)
    add(
        "--neighbours",
        type=int,
        default=4_096,
        metavar="N",
        help="codes whose nearest other one is looked for, each among all (default: %(default)s)",
    )
    add("--weights", choices=["ema", "raw"], default="ema", help="raw: those of a checkpoint that are not averaged")
    add("--output", type=Path, metavar="FILE.png", help="write a picture here")
    add("--json", type=Path, metavar="FILE", help="write the figures, and which codes are dead, here")
    add_device_options(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Look at a codebook as the command line says."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = parse(argv)
    check_least(arguments, neighbours=1, batch_size=1, workers=0, validation_every=2)
    if arguments.output is not None and arguments.output.suffix != ".png":
        raise UserError(f"--output {arguments.output}: the picture is a PNG file; give a name that ends in .png")
    device = device_of(arguments)
    from tools.lib.codebook import look  # reads PyTorch, for which --help should not wait

    look.run(arguments, argv, device)


if __name__ == "__main__":
    exit_on_user_error(main)
