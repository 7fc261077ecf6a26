"""Turn what a training run writes into one file for use.

python tools/convert.py export runs/ar_xxl ar_xxl.safetensors
python tools/convert.py export runs/ar_xxl/checkpoints/step-00100000 raw.safetensors --weights raw
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from ibq.config import UserError, exit_on_user_error
from ibq.engine.shard_files import ShardReader, index_file, write_model
from ibq.progress import say
from ibq.training.checkpoint import DamagedError, checkpoints_in, verify_checkpoint

MODELS = ("transformer", "tokenizer")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="`ibq.load_transformer` and `ibq.load_tokenizer` read the file as well as the checkpoint itself.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    export = commands.add_parser("export", help="full float32 weights of a checkpoint, from any engine, as one file")
    export.add_argument("checkpoint", type=Path, help="a step-... folder, or a run folder: its last checkpoint")
    export.add_argument("output", type=Path, help="the .safetensors file to write")
    export.add_argument("--weights", choices=("ema", "raw"), default="ema", help="averaged (default) or raw weights")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Convert as the command line says."""
    arguments = parse(argv)
    if arguments.output.suffix != ".safetensors":
        raise UserError(f"{arguments.output}: give a name that ends with .safetensors")
    export(find(arguments.checkpoint), arguments.output, arguments.weights)


def find(path: Path) -> Path:
    """The checkpoint that is meant; UserError if there is none, or if it is damaged."""
    if not (path / "manifest.json").exists():
        found = checkpoints_in(path / "checkpoints") or checkpoints_in(path)
        if not found:
            raise UserError(f"{path}: no checkpoint there; give a step-... folder or a run folder")
        path = found[-1]
    try:
        verify_checkpoint(path)
    except DamagedError as error:
        raise UserError(f"{path}: {error}; take another checkpoint") from error
    return path


def export(checkpoint: Path, output: Path, weights: str) -> None:
    """Write the model's weights, one parameter in memory at a time."""
    name = next((name for name in MODELS if (checkpoint / index_file(name)).exists()), None)
    if name is None:
        raise UserError(f"{checkpoint}: holds no {' or '.join(MODELS)}")
    reader = ShardReader(checkpoint, name)
    part = "ema" if weights == "ema" else "weight"
    if part not in reader.parts:
        raise UserError(f"{checkpoint}: its run kept no averaged weights; give --weights raw")
    metadata = {"model": json.dumps(reader.model), "weights": weights, "checkpoint": checkpoint.name}
    temporary = output.with_name(f".tmp-{output.name}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_model(temporary, reader, part, metadata)
        temporary.replace(output)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error}); make room or give another place") from error
    finally:
        temporary.unlink(missing_ok=True)
    say(f"{output}: {len(reader.shapes)} tensors, {output.stat().st_size / 2**30:.2f} GiB, {weights} weights")


if __name__ == "__main__":
    exit_on_user_error(main)
