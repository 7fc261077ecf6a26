"""Turn images into codes with a trained tokenizer, once, for the transformer to train on.

python tools/encode_shards.py --tokenizer runs/tokenizer --images 'shards/train-*.tar' --output codes/train
python tools/encode_shards.py ... --views 4 --flip          # the centre crop and three random views of each image
python tools/encode_shards.py ... --size 512                # another size than the tokenizer was trained at
python tools/encode_shards.py ... --size 192 320            # no squares: 192 pixels high, 320 wide
torchrun --nproc-per-node 8 tools/encode_shards.py ... --ten-crop   # ten fixed views, shared by eight GPUs
"""

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

import ibq
from ibq import dist
from ibq.api import load_tokenizer
from ibq.config import UserError, exit_on_user_error
from ibq.data.codes import META_FILE, CodesMeta, code_files, write_code_shard, write_codes_meta
from ibq.data.counts import BadSample, count
from ibq.data.images import ImageDataset, Subset
from ibq.data.index import ImageIndex
from ibq.data.loader import validation_batches
from ibq.data.shards import ImageDataConfig
from ibq.data.storage import ShardStore
from ibq.data.transforms import AugmentConfig, FixedView, ten_crop, to_unit_range
from ibq.files import remove, write_text
from ibq.models.tokenizer import Tokenizer
from ibq.progress import progress_bar, say
from ibq.training.post_training import codes_hash
from ibq.training.run import set_up_torch
from tools.lib.options import (
    add_device_options,
    add_image_options,
    add_size_option,
    autocast_of,
    check_least,
    device_of,
    grid_of_size,
    open_images_of,
)

DESCRIPTION_FILE = "plan.json"  # by the name that earlier runs gave it
DESCRIPTION_FORMAT = 1
# What this tool writes, whole or half-written by a run that was killed; --fresh removes these and nothing else.
OWN_FILE = re.compile(r"(\.tmp-\d+-)?((codes|labels)-\d{5,}\.npy|plan\.json|meta\.json)")
NAMED = 20  # images that can't be used are named, up to so many
POLL_SECONDS = 0.5
EPILOG = """\
OUTPUT gets plan.json (what is encoded, written first), pairs codes-00000.npy and labels-00000.npy with up to
--rows-per-shard images each, all images in the first view, then all in the second ..., and meta.json (written last:
the rest is whole). The same command goes on where it was stopped, with any number of processes; a shard does not
depend on them. Another command in the same folder is refused unless --fresh starts over.

Images that can't be read are left out in all views, named here and counted in meta.json.
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tokenizer", required=True, help="run folder, its `best` folder, or a published .ckpt file")
    add_image_options(parser)
    add_size_option(parser, "the square that the tokenizer was trained at")
    add_device_options(parser)
    add("--output", required=True, type=Path, help="folder for the codes; all processes must see it")
    add("--views", type=int, help="views of each image: the centre crop, and others with a random crop (default: 1)")
    add("--flip", action="store_true", help="mirror half of the random views")
    add("--ten-crop", action="store_true", help="ten views instead: centre and corners, plain and mirrored")
    add("--max-zoom", type=float, default=1.1, help="how far random views zoom in, and all of --ten-crop do (1.1)")
    add("--seed", type=int, default=0, help="of the random views (0)")
    add("--rows-per-shard", type=int, default=65_536, help="images in each pair of files (65536)")
    add("--max-bad-fraction", type=float, default=0.05, help="of the images that may be left out (0.05)")
    add("--fresh", action="store_true", help="start over: remove what this tool has written to OUTPUT before")
    return parser.parse_args(argv)


def check(arguments: argparse.Namespace) -> None:
    """UserError for options that are impossible."""
    if arguments.ten_crop and (arguments.views is not None or arguments.flip):
        raise UserError("--ten-crop: is ten views, five of them mirrored; leave out --views and --flip")
    check_least(arguments, views=1, rows_per_shard=1, seed=0)
    if not 1 <= arguments.max_zoom < math.inf:
        raise UserError(f"--max-zoom must be at least 1, got {arguments.max_zoom}; 1 crops at full size")
    if not 0 <= arguments.max_bad_fraction <= 1:
        raise UserError(f"--max-bad-fraction must lie in [0, 1], got {arguments.max_bad_fraction}")


def main(argv: Sequence[str] | None = None) -> None:
    """Encode as the command line says."""
    arguments = parse(argv)
    check(arguments)
    device_of(arguments)  # names the option if the device is not there
    set_up_torch(training=False)
    device = dist.setup(arguments.device)
    tokenizer = load_tokenizer(arguments.tokenizer, device=device)
    grid = grid_of_size(arguments.size or [tokenizer.config.resolution], tokenizer.config)
    job = Job(tokenizer, dist.main_first(lambda: open_usable(arguments)), arguments, grid)
    with explained(arguments.output):
        if dist.on_main(lambda: prepare(job, fresh=arguments.fresh)):
            check_same(job)
            encode_own_shards(job)
            wait_for_all(job)
            dist.on_main(lambda: finish(job))
    dist.shutdown()


def open_usable(arguments: argparse.Namespace) -> ImageIndex:
    """The images; UserError if there are none, or if the index already tells that too many can't be used."""
    index = open_images_of(arguments, ImageDataConfig(train=arguments.images, max_bad_fraction=1.0))
    if not len(index):
        raise UserError(f"--split {arguments.split}: no images are left of {arguments.images!r}; use --split all")
    problems = index.problems()
    if len(problems) > arguments.max_bad_fraction * len(index):
        number, reason = problems[0]
        raise too_many(BadSample(index[number].shard, index.key(number), reason), len(problems), len(index), arguments)
    return index


def too_many(example: BadSample, bad: int, count: int, arguments: argparse.Namespace) -> UserError:
    """What to say when more images can't be used than is allowed."""
    return UserError(
        f"{bad:,} of {count:,} images can't be used, such as {described(example)}; mend them, or raise "
        f"--max-bad-fraction {arguments.max_bad_fraction:g}"
    )


def described(sample: BadSample) -> str:
    """Where a sample lies and what is wrong with it."""
    return f"image {sample.key!r} in {sample.shard}: {sample.reason}"


@contextmanager
def explained(output: Path) -> Iterator[None]:
    """What goes wrong with the folder or the memory is the user's to solve."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--output {output}: {error}; the same command goes on when that is solved") from error
    except torch.OutOfMemoryError as error:
        raise UserError("--batch-size: the device has too little memory for it; lower it") from error


# --- What there is to do ---


@dataclass(frozen=True)
class Job:
    """The images and views to encode; shard `view * chunks + chunk` holds one view of one chunk of the images."""

    tokenizer: Tokenizer
    index: ImageIndex
    arguments: argparse.Namespace
    grid: tuple[int, int]  # rows and columns of codes of an image

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        height, width = (side * self.tokenizer.config.downsampling for side in self.grid)
        return height, width

    @property
    def folder(self) -> Path:
        """Where the codes go."""
        return self.arguments.output

    @cached_property
    def views(self) -> list[AugmentConfig | FixedView | None]:
        """How each view is cut."""
        zoom = self.arguments.max_zoom
        if self.arguments.ten_crop:
            return ten_crop(zoom)
        others = (self.arguments.views or 1) - 1
        return [None] + [AugmentConfig(flip=self.arguments.flip, max_zoom=zoom)] * others

    @property
    def chunks(self) -> int:
        """How many shards one view takes."""
        return math.ceil(len(self.index) / self.arguments.rows_per_shard)

    @property
    def shards(self) -> range:
        """All shards' numbers."""
        return range(len(self.views) * self.chunks)

    def images(self, shard: int) -> range:
        """Which images a shard holds, as far as they can be used."""
        start = shard % self.chunks * self.arguments.rows_per_shard
        return range(start, min(start + self.arguments.rows_per_shard, len(self.index)))

    def missing(self, shards: Sequence[int]) -> list[int]:
        """Those shards that are not there yet."""
        return [shard for shard in shards if not all(file.exists() for file in code_files(self.folder, shard))]

    @cached_property
    def description(self) -> dict:
        """Everything that the codes depend on, but for the rounding of devices and batches."""
        arguments = self.arguments
        return {
            "format": DESCRIPTION_FORMAT,
            "tokenizer": codes_hash(self.arguments.tokenizer, self.tokenizer),
            "images": self.index.fingerprint(),
            "image_count": len(self.index),
            "classes": len(self.index.classes),
            "resolution": self.size[0] if self.size[0] == self.size[1] else [*self.size],
            "precision": arguments.precision,
            "views": len(self.views),
            "ten_crop": arguments.ten_crop,
            "flip": arguments.flip,
            "max_zoom": arguments.max_zoom,
            "seed": arguments.seed,
            "rows_per_shard": arguments.rows_per_shard,
        }

    @cached_property
    def meta(self) -> CodesMeta:
        """The meta data, as far as they are known from the start."""
        return CodesMeta(
            num_codes=self.tokenizer.quantizer.num_codes,
            grid=self.grid,
            classes=self.index.classes,
            tokenizer=self.description["tokenizer"],
            views=len(self.views),
        )


# --- The folder ---


def prepare(job: Job, *, fresh: bool) -> bool:
    """Make the folder ready for this job; whether anything is left to do. UserError if it holds another one's codes."""
    folder = job.folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: is a file; give a folder")
    if fresh:
        remove(folder, own_files(folder))
    if set(own_files(folder)) - set(half_written(folder)):
        check_same(job)
    else:
        write_text(folder / DESCRIPTION_FILE, json.dumps(job.description, indent=1))
    if job.missing(job.shards):
        remove(folder, [META_FILE])
    elif (folder / META_FILE).exists():
        say(f"{folder}: is finished already; --fresh starts over")
        return False
    return True


def own_files(folder: Path) -> list[str]:
    """What this tool has written into a folder; the description comes last."""
    return sorted(path.name for path in folder.glob("*") if OWN_FILE.fullmatch(path.name))


def half_written(folder: Path) -> list[str]:
    """What runs that were killed have left of the files that they were writing."""
    return [name for name in own_files(folder) if name.startswith(".tmp-")]


def check_same(job: Job) -> None:
    """UserError unless the folder holds codes of the same description."""
    remedy = "give another --output, or --fresh to start over"
    try:
        found = json.loads((job.folder / DESCRIPTION_FILE).read_text())
        differing = [name for name in {**found, **job.description} if found.get(name) != job.description.get(name)]
    except FileNotFoundError as error:
        raise UserError(
            f"--output {job.folder}: holds codes without {DESCRIPTION_FILE}, or is not one folder for all processes; "
            f"{remedy}"
        ) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{job.folder / DESCRIPTION_FILE}: not written by this tool ({error}); {remedy}") from error
    if differing:
        shown = "; ".join(
            f"{name}: {_short(found.get(name))}, now {_short(job.description.get(name))}" for name in differing
        )
        raise UserError(f"--output {job.folder}: holds codes that were made otherwise ({shown}); {remedy}")


def _short(value: object) -> str:
    return str(value)[:12]


# --- Encoding ---


class LeftOut:
    """Names this rank's images that can't be used, once each, and stops when they are too many."""

    def __init__(self, job: Job):
        self.job = job
        self.limit = job.arguments.max_bad_fraction * len(job.index)
        self.named = max(1, NAMED // dist.world_size())
        self._known: set[tuple[str, str]] = set()

    def report(self, samples: Sequence[BadSample], *, first_view: bool) -> None:
        """Take note of what had to be left out of a batch; they are the same in every view, and named in the first."""
        for sample in samples:
            self._known.add((sample.shard, sample.key))
            if first_view and len(self._known) <= self.named:
                more = "; further ones are only counted" if len(self._known) == self.named else ""
                say(f"left out: {described(sample)}{more}")
            if len(self._known) > self.limit:
                raise too_many(sample, len(self._known), len(self.job.index), self.job.arguments)


def encode_own_shards(job: Job) -> None:
    """Write this rank's shards that are missing, with a progress bar on rank 0."""
    own = job.shards[dist.rank() :: dist.world_size()]
    missing = job.missing(own)
    total, left = (sum(len(job.images(shard)) for shard in shards) for shards in (own, missing))
    store, left_out = ShardStore(checks=job.index.checks), LeftOut(job)
    title = f"encode {job.folder.name}" + (f" (rank 0 of {dist.world_size()})" if dist.world_size() > 1 else "")
    with progress_bar(title, total, "image", initial=total - left, disable=not dist.is_main()) as progress:
        for shard in missing:
            codes, labels = encode_shard(job, shard, store, left_out, progress.update)
            write_code_shard(job.folder, shard, codes, labels, job.meta)


def encode_shard(
    job: Job, shard: int, store: ShardStore, left_out: LeftOut, advance: Callable[[int], object]
) -> tuple[np.ndarray, np.ndarray]:
    """Codes [rows, tokens] and labels [rows] of one shard; batches start anew, so nothing depends on other shards."""
    number, device = shard // job.chunks, next(job.tokenizer.parameters()).device
    view = job.views[number]
    dataset = ImageDataset(job.index, job.size, augment=view, seed=job.arguments.seed + number, store=store)

    def report(samples: Sequence[BadSample]) -> None:
        left_out.report(samples, first_view=number == 0)
        advance(len(samples))

    # They stay on the device until the shard is whole: to fetch every batch would let the device wait.
    codes = [torch.empty(0, job.meta.num_tokens, dtype=torch.int32, device=device)]
    labels = [torch.empty(0, dtype=torch.int64, device=device)]
    for images, classes in validation_batches(
        Subset(dataset, job.images(shard)),
        job.arguments.batch_size,
        workers=job.arguments.workers,
        device=device,
        report=report,
    ):
        with autocast_of(job.arguments):
            codes.append(job.tokenizer.encode(to_unit_range(images)).flatten(1).to(torch.int32))
        labels.append(classes)
        advance(len(images))
    return torch.cat(codes).cpu().numpy(), torch.cat(labels).cpu().numpy()


def wait_for_all(job: Job) -> None:
    """Until all shards are there. Not a barrier: it would give up on a slow rank; the launcher ends us if one fails."""
    if dist.is_main() and job.missing(job.shards):
        say("waiting for the other processes' shards")
    while job.missing(job.shards):
        time.sleep(POLL_SECONDS)


def finish(job: Job) -> None:
    """Check that all views hold the same images, and write the meta data."""
    rows = rows_of_views(job)
    images, kept = len(job.index), int(rows[0].sum())
    if images - kept > job.arguments.max_bad_fraction * images or not kept:
        raise UserError(
            f"{images - kept:,} of {images:,} images could not be used; mend them and use --fresh, or raise "
            f"--max-bad-fraction {job.arguments.max_bad_fraction:g}"
        )
    pictures = count(job.index, used=kept)
    remove(job.folder, half_written(job.folder))
    made_by = {
        **job.description,
        "images_left_out": images - kept,
        "pictures": pictures.to_json(),
        "ibq": ibq.__version__,
        "torch": str(torch.__version__),
    }
    write_codes_meta(job.folder, replace(job.meta, rows=rows.flatten().tolist(), made_by=made_by))
    say(f"{job.folder}: {len(rows)} view(s) of {kept:,} images")
    say(f"{job.arguments.images}: {pictures}")


def rows_of_views(job: Job) -> np.ndarray:
    """Rows of the shards, [views, chunks]; UserError if an image is in one view and missing in another."""
    rows, differing = np.zeros((len(job.views), job.chunks), np.int64), []
    for chunk in range(job.chunks):
        shards = job.shards[chunk :: job.chunks]
        labels = [np.load(code_files(job.folder, shard)[1], allow_pickle=False) for shard in shards]
        rows[:, chunk] = [len(part) for part in labels]
        if not all(np.array_equal(part, labels[0]) for part in labels):
            differing += shards
    if differing:
        remove(job.folder, [file.name for shard in differing for file in code_files(job.folder, shard)])
        raise UserError(
            f"--output {job.folder}: some images could be read for one view but not for another; the "
            f"{len(differing)} shards with them are removed, and the same command encodes them again (--fresh: all)"
        )
    return rows


if __name__ == "__main__":
    exit_on_user_error(main)
