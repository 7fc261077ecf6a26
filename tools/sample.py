"""Generate images of chosen classes, or a balanced set for evaluation.

    python tools/sample.py --tokenizer runs/quickstart/tokenizer --transformer runs/quickstart/transformer \\
        --classes 0 3 --count 8 --output samples
    torchrun --nproc-per-node 8 tools/sample.py --tokenizer runs/tokenizer_16384 --transformer runs/ar_b \\
        --total 50000 --precision bf16 --output samples_b
"""

import argparse
import io
import json
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from PIL import Image

from ibq import dist
from ibq.api import decode_in_blocks, load_tokenizer, load_transformer, trained_on
from ibq.config import UserError, exit_on_user_error
from ibq.files import remove, whole_file, write_array, write_text
from ibq.models.tokenizer import Tokenizer
from ibq.models.transformer import Transformer
from ibq.progress import progress_bar, say
from ibq.sampler import SAMPLER_VERSION, SamplerConfig
from ibq.sampling import LARGEST_SEED, decoder_for, sample_codes
from ibq.training.checkpoint import weights_hash
from ibq.training.provenance import git_state
from ibq.training.run import set_up_torch
from tools.lib import ROOT
from tools.lib.options import add_device_option, add_settings, device_of, settings_of

PIECES, SET_FILE, INFO_FILE = ".pieces", "samples.npz", "samples.json"
DESCRIPTION_FILE, DESCRIPTION = ".pieces/plan.json", "plan"  # by the names that earlier runs gave them
SHARD_ROWS = 10_000  # images of a tar shard
MOST_PNG = 1_000  # images that are written as files of their own unless --files says so
EPILOG = """\
Image i of a class is drawn with seed SEED + i. On a given device and precision it depends on the checkpoints, class,
seed and sampler settings alone: not on the number of processes, nor on interruptions, after which the same command goes
on. OUTPUT gets samples.npz (arr_0 uint8 [N, H, W, 3] and arr_1 the classes: ADM's form, which tools/evaluate.py and
other evaluators read), samples.json (what made them), and the images as PNG files or in tar shards.
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
    add("--seed", type=int, default=0)
    add("--files", choices=["png", "shards", "none"], help=f"beside the .npz (default: png up to {MOST_PNG:,} images)")
    add("--fresh", action="store_true", help="start over: remove what this tool has written to OUTPUT before")
    add_device_option(parser)
    return parser.parse_args(argv)


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

    @property
    def names(self) -> list[str]:
        """Of the images' files."""
        pairs = zip(self.labels, self.seeds, strict=True)
        return [f"class{label:04d}_seed{seed:06d}" for label, seed in pairs]

    def part(self, number: int) -> slice:
        """Which images are a piece's."""
        return slice(number * self.piece, min((number + 1) * self.piece, len(self.labels)))


def request_of(arguments: argparse.Namespace, sampler: SamplerConfig, num_classes: int) -> Request:
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
        piece=max(1, 256 // sampler.rows_per_block) * sampler.rows_per_block,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Generate as the command line says."""
    arguments = parse(argv)
    sampler = settings_of(SamplerConfig, arguments)
    device_of(arguments)  # names the option if the device is not there
    set_up_torch(training=False)
    device = dist.setup(arguments.device)
    tokenizer = load_tokenizer(arguments.tokenizer, device=device)
    transformer = load_transformer(arguments.transformer, device=device)
    hashes = {"tokenizer": weights_hash(tokenizer.state_dict()), "transformer": weights_hash(transformer.state_dict())}
    check_pair(arguments, tokenizer, transformer, hashes["tokenizer"])
    request = request_of(arguments, sampler, transformer.config.num_classes)
    description = {**hashes, "sampler": asdict(sampler), "labels_sha256": weights_hash(_as_tensors(request))}
    description |= {"sampler_version": SAMPLER_VERSION, "images": len(request.labels), "piece": request.piece}
    with explained():
        if dist.on_main(lambda: begin(arguments.output, description, fresh=arguments.fresh)):
            draw(request, tokenizer, transformer, sampler, arguments.output)
            dist.on_main(lambda: finish(request, arguments, description))
    dist.barrier()
    if dist.is_main():
        print(f"{len(request.labels)} images in {arguments.output}")
    dist.shutdown()


def check_pair(arguments: argparse.Namespace, tokenizer: Tokenizer, transformer: Transformer, found: str) -> None:
    """UserError for a tokenizer that the transformer cannot be used with, a warning for another than its own."""
    if tokenizer.quantizer.num_codes != transformer.config.vocab_size:
        raise UserError(
            f"{arguments.transformer}: knows {transformer.config.vocab_size} codes, the tokenizer "
            f"{tokenizer.quantizer.num_codes}; give the tokenizer that the transformer was trained on"
        )
    wanted = trained_on(arguments.transformer)
    if wanted is not None and wanted != found and dist.is_main():
        say(f"WARNING: {arguments.transformer} was trained on codes of another tokenizer than {arguments.tokenizer}")


def draw(request: Request, tokenizer: Tokenizer, transformer: Transformer, sampler: SamplerConfig, folder: Path):
    """Draw this rank's share of the missing pieces; each is a file that is whole or absent."""
    dist.barrier()  # all see the same pieces before the first is added
    missing = [number for number in range(request.pieces) if not piece_file(folder, number).exists()]
    dist.barrier()
    own = missing[dist.rank() :: dist.world_size()]
    decoder = decoder_for(transformer, sampler) if own else None
    device = next(tokenizer.parameters()).device
    images = sum(len(request.labels[request.part(number)]) for number in own)
    with progress_bar("sample", images, "image", disable=not dist.is_main()) as progress:
        for number in own:
            part, start = request.part(number), progress.n
            codes = sample_codes(
                decoder,
                request.labels[part],
                request.seeds[part],
                sampler,
                progress=lambda done, _all, start=start: progress.update(start + done - progress.n),
            )
            with torch.autocast(device.type, torch.bfloat16, enabled=sampler.precision != "fp32"):
                pixels = decode_in_blocks(tokenizer, codes)
            write_array(piece_file(folder, number), pixels.permute(0, 2, 3, 1).numpy())
    dist.barrier()


def finish(request: Request, arguments: argparse.Namespace, description: dict) -> None:
    """Put the pieces together, as samples.npz and PNG files or shards; then they are removed."""
    folder, count = arguments.output, len(request.labels)
    form = arguments.files or ("png" if count <= MOST_PNG else "shards")
    with progress_bar("write", (1 if form == "none" else 2) * count, "image") as progress:
        images = read_pieces(folder, request, progress.update)
        if form == "png":
            for name, image in zip(request.names, images, strict=True):
                Image.fromarray(image).save(folder / f"{name}.png")
        if form == "shards":
            write_shards(folder, request, images)
        write_npz(folder, request, progress.update)
    info = {DESCRIPTION: description, "tokenizer": description["tokenizer"], "transformer": description["transformer"]}
    info |= {name: description[name] for name in ("sampler", "sampler_version")}
    info |= {"seed": arguments.seed, "classes": len(set(request.labels)), "count": count}
    info |= {"precision": arguments.precision, "git": git_state(ROOT), "torch": torch.__version__}
    info |= {"tokenizer_path": str(arguments.tokenizer), "transformer_path": str(arguments.transformer)}
    write_text(folder / INFO_FILE, json.dumps(info, indent=1) + "\n")
    shutil.rmtree(folder / PIECES)


def _as_tensors(request: Request) -> dict[str, torch.Tensor]:
    pairs = {"labels": request.labels, "seeds": request.seeds}
    return {name: torch.from_numpy(np.asarray(values, dtype=np.int64)) for name, values in pairs.items()}


# --- Files: pieces while it runs, then one set of images in several forms ---


@contextmanager
def explained() -> Iterator[None]:
    """What goes wrong with the folder is the user's to solve."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--output: cannot be written ({error}); make room or give another folder, then start again"
        ) from error


def begin(folder: Path, description: Mapping, *, fresh: bool) -> bool:
    """Prepare the folder for what is described; whether there is any to draw. UserError where another command's is."""
    if fresh:
        remove(folder, (PIECES, SET_FILE, INFO_FILE))
    if (folder / INFO_FILE).exists() and not (folder / DESCRIPTION_FILE).exists():
        if _description_of(folder / INFO_FILE) != json.loads(json.dumps(description)):
            raise UserError(
                f"{folder}: holds the samples of another command or version; give another --output, or --fresh"
            )
        return False
    text = json.dumps(description, indent=1, sort_keys=True) + "\n"
    if (folder / DESCRIPTION_FILE).exists() and (folder / DESCRIPTION_FILE).read_text() != text:
        raise UserError(f"{folder}: holds pieces of another command or version; give another --output, or --fresh")
    write_text(folder / DESCRIPTION_FILE, text)
    return True


def _description_of(path: Path) -> object:
    """What a finished set was made by; None where its file does not tell."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))[DESCRIPTION]
    except (ValueError, KeyError, TypeError):
        return None


def piece_file(folder: Path, number: int) -> Path:
    """Where the images [n, H, W, 3] of a piece go."""
    return folder / PIECES / f"{number:06d}.npy"


def read_pieces(folder: Path, request: Request, advance: Callable[[int], None]) -> Iterator[np.ndarray]:
    """The images [H, W, 3], one after the other."""
    for number in range(request.pieces):
        images = np.load(piece_file(folder, number), allow_pickle=False)
        yield from images
        advance(len(images))


def write_shards(folder: Path, request: Request, images: Iterator[np.ndarray]) -> None:
    """Tar shards of KEY.png and KEY.cls, as the project's other tools read them, with the names of the classes."""
    rows = zip(request.names, request.labels, images, strict=True)
    for shard in range(-(-len(request.labels) // SHARD_ROWS)):
        with whole_file(folder / f"samples-{shard:05d}.tar") as file, tarfile.open(fileobj=file, mode="w") as tar:
            for _, (name, label, image) in zip(range(SHARD_ROWS), rows, strict=False):
                buffer = io.BytesIO()
                Image.fromarray(image).save(buffer, "PNG")
                for suffix, data in (("png", buffer.getvalue()), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{name}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    write_text(folder / "classes.json", json.dumps([str(number) for number in range(max(request.labels) + 1)]) + "\n")


def write_npz(folder: Path, request: Request, advance: Callable[[int], None]) -> None:
    """`arr_0` uint8 [N, H, W, 3] and `arr_1` the classes: ADM's form; never in memory as a whole."""
    first = np.load(piece_file(folder, 0), mmap_mode="r", allow_pickle=False)
    with whole_file(folder / SET_FILE) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            shape = (len(request.labels), *first.shape[1:])
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            for number in range(request.pieces):
                images = np.load(piece_file(folder, number), allow_pickle=False)
                member.write(images.tobytes())
                advance(len(images))
        with archive.open("arr_1.npy", "w") as member:
            np.lib.format.write_array(member, np.asarray(request.labels, dtype=np.int64), allow_pickle=False)


if __name__ == "__main__":
    exit_on_user_error(main)
