"""Generate images of chosen classes, or a balanced set for evaluation.

    python tools/sample.py --tokenizer runs/quickstart/tokenizer --transformer runs/quickstart/transformer \\
        --classes 0 3 --count 8 --output samples
    torchrun --nproc-per-node 8 tools/sample.py --tokenizer runs/tokenizer_16384 --transformer runs/ar_b \\
        --total 50000 --output samples_b
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch import Tensor

from ibq import dist
from ibq.api import load_tokenizer, load_transformer, same_codes_as, trained_on
from ibq.config import UserError, exit_on_user_error
from ibq.decoding import Decoder, settle
from ibq.editing import Edit
from ibq.files import write_array, write_text
from ibq.models.tokenizer import Tokenizer
from ibq.models.transformer import Transformer
from ibq.pixels import pixels_of
from ibq.progress import progress_bar, say
from ibq.sampler import LARGEST_SEED, SAMPLER_VERSION, SamplerConfig
from ibq.sampling import decoder_for, sample_blocks
from ibq.training.checkpoint import weights_hash
from ibq.training.metrics import Stopwatch
from ibq.training.provenance import git_state
from ibq.training.run import set_up_torch
from tools.lib import ROOT, cores
from tools.lib.options import add_device_option, add_settings, add_size_option, device_of, grid_of_size, settings_of
from tools.lib.sample import files
from tools.lib.sample.edit import EditOptions, edit_of

PIECE = 256  # images, or what is the next multiple of a block
MOST_PNG = 1_000  # images that are written as files of their own unless --files says so
EPILOG = """\
Image i of a class is drawn with seed SEED + i. On a given device and precision it depends on the checkpoints, class,
seed and sampler settings alone: not on the number of processes, nor on interruptions, after which the same command goes
on. OUTPUT gets samples.npz (arr_0 uint8 [N, H, W, 3] and arr_1 the classes: ADM's form, which tools/evaluate.py and
other evaluators read), samples.json (what made them), and the images as PNG files or in tar shards.

With --image only a part of it is drawn, to fit the rest and the class; a transformer that was trained with order:
random can draw any part, others one that begins somewhere in a row of tokens and goes on to the end of the image.
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tokenizer", required=True, help="run folder, its `best` folder, or a published .ckpt file")
    add("--transformer", required=True, help="the same for the transformer")
    add("--output", required=True, type=Path, help="folder; all processes must see it")
    add("--classes", type=int, nargs="+", help="class numbers (default: all)")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--count", type=int, help="images per class (default: 8)")
    amount.add_argument("--total", type=int, help="images in all, equally many of every class")
    add_settings(parser, SamplerConfig)
    add_size_option(parser, "as --grid says")
    add_settings(parser, EditOptions)
    add("--seed", type=int, default=0)
    add("--files", choices=["png", "shards", "none"], help=f"beside the .npz (default: png up to {MOST_PNG:,} images)")
    add("--fresh", action="store_true", help="start over: remove what this tool has written to OUTPUT before")
    add_device_option(parser)
    add("--compile", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.size is not None and arguments.grid is not None:
        raise UserError("--size: says the same as --grid, in pixels; leave one of them out")
    if arguments.compile:
        say("note: --compile is not needed any more: on a GPU every step is a CUDA graph of fused kernels")
    return arguments


@dataclass(frozen=True, kw_only=True)
class Request:
    """Which images are drawn: piece by piece, each of some blocks."""

    labels: tuple[int, ...]
    seeds: tuple[int, ...]
    piece: int  # images of one

    @property
    def pieces(self) -> int:
        """How many there are."""
        return -(-len(self.labels) // self.piece)

    def rows(self, number: int) -> tuple[list[str], tuple[int, ...]]:
        """Names of the files and labels of a piece's images."""
        labels, seeds = self.labels[self.part(number)], self.seeds[self.part(number)]
        names = [f"class{label:04d}_seed{seed:06d}" for label, seed in zip(labels, seeds, strict=True)]
        return names, labels

    def part(self, number: int) -> slice:
        """Which images are a piece's."""
        return slice(number * self.piece, min((number + 1) * self.piece, len(self.labels)))


def request_of(arguments: argparse.Namespace, rows_per_block: int, num_classes: int) -> Request:
    """The images that the options name; UserError for impossible ones."""
    classes = list(arguments.classes if arguments.classes is not None else range(num_classes))
    count = 8 if arguments.count is None else arguments.count
    if arguments.total is not None:
        count, rest = divmod(arguments.total, len(classes))
        if rest:
            possible = [str(count * len(classes)) for count in (count, count + 1) if count > 0]
            raise UserError(
                f"--total: {arguments.total} images cannot be equally many of {len(classes)} classes; "
                f"use {' or '.join(possible)}"
            )
    if len(set(classes)) < len(classes):
        raise UserError("--classes: one is there twice; ask for more images of it by --count")
    if count < 1:
        raise UserError(f"{'--total' if arguments.total is not None else '--count'} must be at least 1 image a class")
    if not 0 <= arguments.seed <= LARGEST_SEED - count:
        raise UserError(f"--seed: {arguments.seed} is out of range; use 0 to {LARGEST_SEED - count}")
    for label in classes:
        if not 0 <= label < num_classes:
            raise UserError(f"--classes: {label} is out of range; use 0 to {num_classes - 1}")
    return Request(
        labels=tuple(label for label in classes for _ in range(count)),
        seeds=tuple(arguments.seed + i for _ in classes for i in range(count)),
        piece=max(1, PIECE // rows_per_block) * rows_per_block,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Generate as the command line says."""
    arguments = parse(argv)
    sampler, part = settings_of(SamplerConfig, arguments), settings_of(EditOptions, arguments)
    device_of(arguments)  # names the option if the device is not there
    set_up_torch(training=False)
    device = dist.setup(arguments.device)
    tokenizer = load_tokenizer(arguments.tokenizer, device=device)
    transformer = load_transformer(arguments.transformer, device=device)
    hashes = {"tokenizer": weights_hash(tokenizer.state_dict()), "transformer": weights_hash(transformer.state_dict())}
    check_pair(arguments, tokenizer, transformer, hashes["tokenizer"])
    if arguments.size is not None:
        sampler = replace(sampler, grid=grid_of_size(arguments.size, tokenizer.config))
    own_grid = sampler.grid is None
    try:
        sampler = settle(sampler, transformer.config, device)
    except ValueError as error:  # begins with a setting, which is an option's name
        raise UserError(f"--{str(error).replace('_', '-', 1)}") from error
    # One number of rows for all, also where the GPUs have not the same memory.
    sampler = replace(sampler, rows_per_block=-dist.largest(-sampler.rows_per_block))
    request = request_of(arguments, sampler.rows_per_block, transformer.config.num_classes)
    edit = edit_of(part, sampler, tokenizer, transformer.config)
    form = arguments.files or ("png" if len(request.labels) <= MOST_PNG else "shards")
    description = hashes | described(request, sampler, edit, own_grid=own_grid)
    processes = cores() // dist.local_world_size()
    with explained(sampler), files.Writers(arguments.output, form, processes) as writers:
        if dist.on_main(lambda: files.begin(arguments.output, description, fresh=arguments.fresh)):
            draw(request, tokenizer, transformer, sampler, arguments.output, writers, edit)
            dist.on_main(lambda: finish(request, arguments, description, form))
    dist.barrier()
    if dist.is_main():
        print(f"{len(request.labels)} images in {arguments.output}")
    dist.shutdown()


def described(request: Request, sampler: SamplerConfig, edit: Edit | None, *, own_grid: bool) -> dict:
    """What the images are, beside the weights that draw them."""
    settings = asdict(sampler)
    if own_grid:
        del settings["grid"]  # sets that were drawn before there was a choice have none
    found = {"sampler": settings, "labels_sha256": weights_hash(_as_tensors(request))}
    found |= {"sampler_version": SAMPLER_VERSION, "images": len(request.labels), "piece": request.piece}
    if edit is not None:
        hashed = weights_hash({"codes": edit.codes, "keep": edit.keep})
        found["edit"] = {"sha256": hashed, "kept": edit.kept, "tokens": edit.keep.numel()}
    return found


def check_pair(arguments: argparse.Namespace, tokenizer: Tokenizer, transformer: Transformer, found: str) -> None:
    """UserError for a tokenizer that the transformer cannot be used with, a warning for another than its own."""
    if tokenizer.quantizer.num_codes != transformer.config.vocab_size:
        raise UserError(
            f"{arguments.transformer}: knows {transformer.config.vocab_size} codes, the tokenizer "
            f"{tokenizer.quantizer.num_codes}; give the tokenizer that the transformer was trained on"
        )
    wanted = trained_on(arguments.transformer)
    if wanted not in (None, found, same_codes_as(arguments.tokenizer)) and dist.is_main():
        say(f"WARNING: {arguments.transformer} was trained on codes of another tokenizer than {arguments.tokenizer}")


def draw(
    request: Request,
    tokenizer: Tokenizer,
    transformer: Transformer,
    sampler: SamplerConfig,
    folder: Path,
    writers: files.Writers,
    edit: Edit | None = None,
) -> None:
    """Draw this rank's share of the missing pieces; each is a file that is whole or absent.

    Three things at a time: a GPU draws the codes of a block, and decodes the pixels of the one before, while the host
    writes those before them, and other processes compress pieces.
    """
    dist.barrier()  # all see the same pieces before the first is added
    missing = [number for number in range(request.pieces) if not files.piece_file(folder, number).exists()]
    dist.barrier()
    own = missing[dist.rank() :: dist.world_size()]
    device = next(tokenizer.parameters()).device
    clock, start = Stopwatch(device), time.monotonic()
    count = sum(len(request.labels[request.part(number)]) for number in own)
    with progress_bar("sample", count, "image", disable=not dist.is_main()) as progress:
        for number in [n for n in range(request.pieces) if n not in missing][dist.rank() :: dist.world_size()]:
            writers.add(number, *request.rows(number))  # which an interruption left uncompressed
        if own:
            decoder = decoder_for(transformer, sampler)
            transformer.to("meta")  # its memory is for images
            tell(sampler, decoder)
            codes = timed(codes_of(own, request, decoder, sampler, edit), partial(clock.part, "codes"))
            images = pixels_of(codes, tokenizer, sampler.precision, partial(clock.part, "pixels"))
            for number in own:
                write_array(files.piece_file(folder, number), _piece(images, request.part(number), progress.update))
                writers.add(number, *request.rows(number))
        writers.wait()
    if own:
        report(count, time.monotonic() - start, clock)
    dist.barrier()


def codes_of(
    pieces: Iterable[int], request: Request, decoder: Decoder, sampler: SamplerConfig, edit: Edit | None
) -> Iterator[Tensor]:
    """The codes [n, h, w] of the blocks of these pieces, one block after the other."""
    for number in pieces:
        part = request.part(number)
        yield from sample_blocks(decoder, request.labels[part], request.seeds[part], sampler, edit)


def timed(blocks: Iterable[Tensor], part) -> Iterator[Tensor]:
    """The same, with `part()` entered while each is made."""
    iterator = iter(blocks)
    while True:
        with part():
            block = next(iterator, None)
        if block is None:
            return
        yield block


def _piece(images: Iterator[np.ndarray], part: slice, advance) -> np.ndarray:
    """The blocks of a piece, together."""
    blocks, missing = [], part.stop - part.start
    while missing:
        blocks.append(next(images))
        missing -= len(blocks[-1])
        advance(len(blocks[-1]))
    return np.concatenate(blocks)


def tell(sampler: SamplerConfig, decoder: Decoder) -> None:
    """How it is drawn, in a line."""
    if dist.is_main():
        how = "a CUDA graph a code" if decoder.fused else "one operator after the other, without CUDA graphs"
        say(f"{sampler.rows_per_block} images together (--rows), {sampler.precision}, {decoder.device.type}: {how}")


def report(count: int, seconds: float, clock: Stopwatch) -> None:
    """This rank's speed, and how much of the time each part was at work; on a GPU they are side by side."""
    shares = {name.removeprefix("seconds/"): found / seconds for name, found in clock.means(1).items()}
    if dist.is_main():
        parts = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        ranks = f" on each of {dist.world_size()} processes" if dist.world_size() > 1 else ""
        say(f"{count:,} images in {seconds:.1f} s: {count / seconds:.2f} images/s{ranks}; {parts} of the time")


def finish(request: Request, arguments: argparse.Namespace, description: dict, form: str) -> None:
    """Put the pieces together, as samples.npz and PNG files or shards; then they are removed."""
    folder, count = arguments.output, len(request.labels)
    with progress_bar("write", (1 if form == "none" else 2) * count, "image") as progress:
        files.write_all(folder, request.pieces, request.labels, form, progress.update)
    info = {files.DESCRIPTION: description}
    info |= {name: description[name] for name in ("tokenizer", "transformer", "sampler", "sampler_version")}
    info |= {"seed": arguments.seed, "classes": len(set(request.labels)), "count": count}
    info |= {"precision": description["sampler"]["precision"], "git": git_state(ROOT), "torch": torch.__version__}
    info |= {"tokenizer_path": str(arguments.tokenizer), "transformer_path": str(arguments.transformer)}
    if "edit" in description:
        part = settings_of(EditOptions, arguments)
        given = {name: str(value) for name in ("image", "mask") if (value := getattr(part, name))}
        info["edit"] = description["edit"] | given | ({} if part.box is None else {"box": part.box})
    write_text(folder / files.INFO_FILE, json.dumps(info, indent=1) + "\n")
    files.remove_pieces(folder)


@contextmanager
def explained(sampler: SamplerConfig) -> Iterator[None]:
    """What goes wrong with the folder or the memory is the user's to solve."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--output: cannot be written ({error}); make room or give another folder, then start again"
        ) from error
    except torch.OutOfMemoryError as error:
        rows = sampler.rows_per_block
        remedy = f"use {rows // 2} or less" if rows > 1 else "end what else runs there, or use a larger GPU"
        raise UserError(f"--rows: the GPU has too little memory for {rows} and their pixels; {remedy}") from error


def _as_tensors(request: Request) -> dict[str, Tensor]:
    pairs = {"labels": request.labels, "seeds": request.seeds}
    return {name: torch.from_numpy(np.asarray(values, dtype=np.int64)) for name, values in pairs.items()}


if __name__ == "__main__":
    exit_on_user_error(main)
