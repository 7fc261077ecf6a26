"""Models as one file: from training runs, from published checkpoints, in other implementations' form, for the Hub.

python tools/convert.py export runs/ar_xxl ar_xxl.safetensors
python tools/convert.py export runs/tokenizer tokenizer.ckpt --format seed-voken
python tools/convert.py import seed-voken imagenet256_16384.ckpt tokenizer_16384.safetensors
python tools/convert.py hub runs/tokenizer my_tokenizer --data 'ImageNet-1k' --license mit --push me/my-tokenizer
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ibq.api import load_tokenizer, same_codes_as
from ibq.config import UserError, exit_on_user_error
from ibq.engine.state_files import StateReader, describe, index_file, write_model
from ibq.progress import say
from ibq.training.checkpoint import DamagedError, checkpoints_in, verify_checkpoint, weights_hash
from ibq.training.start_from.places import known_tokenizer
from tools.lib.convert import hub, published

MODELS = ("transformer", "tokenizer")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="`ibq.load_transformer` and `ibq.load_tokenizer` read the .safetensors files and the checkpoints.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    export = commands.add_parser("export", help="full float32 weights of a checkpoint, from any engine, as one file")
    export.add_argument("checkpoint", type=Path, help="a step-... folder, or a run folder: its last checkpoint")
    export.add_argument("output", type=Path, help="the .safetensors file to write; with --format the .ckpt or .pt file")
    export.add_argument("--weights", choices=("ema", "raw"), default="ema", help="averaged (default) or raw weights")
    export.add_argument(
        "--merge-projector",
        action="store_true",
        help="of a tokenizer: make the codes of its projector (VQBridge, SimVQ) the codebook; codes and images stay",
    )
    published.add_export_options(export)
    published.add_import_options(commands.add_parser("import", help="a published checkpoint as one file"))
    hub.add_options(commands.add_parser("hub", help="a folder with weights, config and model card"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Convert as the command line says."""
    arguments = parse(argv)
    match arguments.command:
        case "import":
            published.import_published(arguments)
        case "hub":
            hub.write_folder(arguments, find)
        case _ if arguments.format and arguments.merge_projector:
            raise UserError("--merge-projector: writes a .safetensors file, which --format takes then; leave one out")
        case _ if arguments.format:
            published.export_published(arguments.checkpoint, arguments, find)
        case _:
            if arguments.tokenizer or arguments.rest:
                raise UserError("--tokenizer and --rest are for --format; leave them out")
            published.require_suffix(arguments.output, {".safetensors"})
            write = export_merged if arguments.merge_projector else export
            write(find(arguments.checkpoint), arguments.output, arguments.weights)


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
    reader = StateReader(checkpoint, name)
    part = "ema" if weights == "ema" else "weight"
    if part not in reader.parts:
        raise UserError(f"{checkpoint}: its run kept no averaged weights; give --weights raw")
    metadata = {"model": json.dumps(reader.model), "weights": weights} | told_of(checkpoint)
    published.whole(output, lambda path: write_model(path, reader, part, metadata))
    say(f"{output}: {len(reader.shapes)} tensors, {output.stat().st_size / 2**30:.2f} GiB, {weights} weights")


def told_of(checkpoint: Path) -> dict[str, str]:
    """Where weights come from, and whose codes they are made for, as far as their run tells."""
    found = {
        "checkpoint": checkpoint.name,
        "codes_of": same_codes_as(checkpoint),
        "tokenizer": known_tokenizer(checkpoint),
    }
    return {name: value for name, value in found.items() if value is not None}


def export_merged(checkpoint: Path, output: Path, weights: str) -> None:
    """Write a tokenizer whose projector has become part of its codebook."""
    tokenizer = load_tokenizer(checkpoint, weights=weights, device="cpu")
    try:
        merged = tokenizer.merged()
    except ValueError as error:
        raise UserError(f"--merge-projector: {error}") from error
    codes_of = {"codes_of": weights_hash(tokenizer.state_dict())}
    metadata = {"model": json.dumps(describe(merged)), "weights": weights} | codes_of | told_of(checkpoint)
    size = published.write_safetensors(output, merged.state_dict(), metadata)
    say(f"{output}: {len(merged.quantizer.codebook):,} codes without their projector, {size / 2**30:.2f} GiB")


if __name__ == "__main__":
    exit_on_user_error(main)
