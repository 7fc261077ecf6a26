"""Write webdataset tar shards from a folder of images, or index the shards that are there.

Every shard gets an index file (NAME.index.json: keys, byte offsets, labels, checksums). The same input gives the same
bytes, whatever the number of processes; a second call goes on where the first was interrupted.
"""

import argparse
import contextlib
import glob
import io
import json
import math
import re
import shlex
import signal
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from PIL import Image

from ibq.config import UserError, exit_on_user_error
from ibq.data.counts import DAMAGED, PictureCount, reason_of
from ibq.data.index import ShardIndex, index_file, read_shard_index, write_shard_index
from ibq.data.shards import CLASSES_FILE
from ibq.data.transforms import decode_rgb
from ibq.files import whole_file, write_text
from ibq.progress import progress_bar, say
from tools.lib import cores
from tools.lib.processes import context as process_context
from tools.lib.processes import prepare
from tools.lib.shards.labels import Job, Options, Sample, ShardSet, alone, check_same, read_sources

MAX_LEFT_OUT = 0.05  # of all images
EXAMPLES = """
examples:
  ImageNet, as its archives unpack: one folder a class for training, one flat folder for validation
    python tools/make_shards.py imagenet/train shards --prefix train
    python tools/make_shards.py imagenet/val shards --prefix val --labels LOC_val_solution.csv \\
        --classes shards/classes.json
  the same with the shorter side at 256 pixels
    python tools/make_shards.py imagenet/train shards256 --size 256
  images without labels, to train a tokenizer (data.labels=false)
    python tools/make_shards.py photos shards --no-labels
  shards that others have made
    python tools/make_shards.py --index 'shards/*.tar'

Labels are the places of the class folders' names in sorted order, as in published checkpoints; they are written to
OUT/classes.json. A label file has lines `NAME LABEL`, separated by blanks, a tab or a comma; NAME with or without
folder and suffix, LABEL a class name or its number from 0.
"""


class Result(NamedTuple):
    """What became of a shard."""

    shard: Path
    samples: int
    bytes: int
    left_out: list[tuple[str, str]]  # (image, why)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", type=Path, nargs="?", help="one sub-folder a class, or images and --labels")
    add("out", metavar="OUT", type=Path, nargs="?", help="folder for the shards")
    add("--prefix", default="train", help="the shards are PREFIX-00000.tar, ... (default: train)")
    add("--labels", metavar="FILE", type=Path, help="the images' labels, where there are no class folders")
    add("--no-labels", action="store_true", help="shards without labels, for tokenizers")
    add("--classes", metavar="FILE", type=Path, help="a classes.json that fixes the numbers of the classes")
    add("--size", type=int, help="resize to this shorter side; smaller images stay (default: as they are)")
    add("--format", choices=["keep", "jpeg", "png", "webp"], default="keep", help="default: keep each image's own")
    add("--quality", type=int, default=95, help="of JPEG and WebP files that are encoded anew (default: 95)")
    add("--samples-per-shard", type=int, default=5000, help="images in each shard (default: 5000)")
    add("--order", choices=["shuffled", "sorted"], default="shuffled", help="default: shuffled, so that classes mix")
    add("--seed", type=int, default=0, help="of the shuffled order")
    add("--processes", type=int, default=min(8, cores()), help=f"default here: {min(8, cores())}")
    add("--check", action="store_true", help="decode every image and leave out those that are damaged")
    add("--fresh", action="store_true", help="remove this prefix's shards in OUT and start over")
    add("--index", metavar="SHARDS", nargs="+", help="write index files beside these tar files (paths or globs)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Make or index shards as the command line says; the exit code."""
    arguments = parse(argv)
    for name, least, most in (
        ("size", 1, 65_535),
        ("quality", 1, 100),
        ("samples_per_shard", 1, math.inf),
        ("seed", 0, math.inf),
        ("processes", 1, math.inf),
    ):
        value = getattr(arguments, name)
        if value is not None and not least <= value <= most:
            limit = f"at least {least}" if most == math.inf else f"{least} to {most}"
            raise UserError(f"--{name.replace('_', '-')} must be {limit}, got {value}")
    if arguments.index:
        if arguments.folder:
            raise UserError("--index takes tar files alone; leave out FOLDER and OUT, or --index")
        return index_shards(arguments.index, arguments.processes)
    check_places(arguments)
    make_shards(arguments)
    return 0


def check_places(arguments: argparse.Namespace) -> None:
    """UserError for names and folders that can't be meant."""
    folder, out = arguments.folder, arguments.out
    if folder is None or out is None:
        raise UserError("give a folder of images and a folder for the shards: make_shards.py FOLDER OUT (see --help)")
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give the folder that holds the images")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a folder for the shards")
    if folder.resolve() in (out.resolve(), *out.resolve().parents):
        raise UserError(f"OUT ({out}) lies in FOLDER ({folder}) and would be taken for a class; give one outside")
    if not re.fullmatch(r"\w[\w.-]*", arguments.prefix):
        raise UserError(f"--prefix {arguments.prefix!r}: use letters, digits, '_', '-' and '.' only")
    if arguments.no_labels and (arguments.labels or arguments.classes):
        raise UserError("--no-labels makes shards without labels; leave out --labels and --classes, or --no-labels")


# --- Making shards ---


def make_shards(arguments: argparse.Namespace) -> None:
    """Write the shards that the command line asks for, as far as they are missing."""
    options = Options(**{option.name: getattr(arguments, option.name) for option in fields(Options)})
    labelled = not arguments.no_labels
    sources = read_sources(arguments.folder, labels=arguments.labels, classes=arguments.classes, labelled=labelled)
    wanted = ShardSet(arguments.folder, arguments.out, arguments.prefix, sources, options)
    if not arguments.fresh:
        check_same(wanted)
    try:
        with contextlib.ExitStack() as stack:
            if arguments.fresh and wanted.file.exists():
                stack.enter_context(alone(wanted))
            for path in wanted.own_files() if arguments.fresh else ():
                path.unlink()
            if arguments.fresh or not wanted.file.exists():
                write_text(wanted.file, json.dumps(wanted.description, indent=1) + "\n")
            stack.enter_context(alone(wanted))
            wanted.remove_stale_files()
            classes = wanted.out / CLASSES_FILE
            if sources.classes is not None and (arguments.fresh or not classes.exists()):
                write_text(classes, json.dumps(sources.classes, indent=1) + "\n")
            write_set(wanted, arguments.processes)
    except OSError as error:
        raise UserError(
            f"cannot write to {wanted.out}: {error.strerror or error}; mend that, then the same command goes on"
        ) from error


def write_set(wanted: ShardSet, processes: int) -> None:
    """Write the shards that are missing and the summary."""
    results = {job.shard: result for job in wanted.jobs() if (result := finished(job))}
    complete = len(results) == wanted.shards and wanted.summary_file.exists()
    if not complete:
        write_missing(wanted, results, processes)
    rows = summary(wanted, list(results.values()))
    if not complete:
        write_text(wanted.summary_file, json.dumps(rows, indent=1) + "\n")
    tell(wanted, rows, complete)


def write_missing(wanted: ShardSet, results: dict[Path, Result], processes: int) -> None:
    """Write the shards that `results` lacks and add them to it."""
    jobs = [number for number, job in enumerate(wanted.jobs()) if job.shard not in results]
    total = len(wanted.sources.images)
    initial = sum(result.samples + len(result.left_out) for result in results.values())
    with progress_bar(f"make {wanted.prefix}", total, "image", initial=initial) as progress:
        try:
            in_processes(
                write_shard,
                map(wanted.job, jobs),
                min(processes, max(1, len(jobs))),
                done=lambda result: results.update({result.shard: result}),
                tick=lambda count: progress.update(initial + count - progress.n),
            )
        except BaseException as error:
            wanted.remove_stale_files()
            if isinstance(error, KeyboardInterrupt):
                say("interrupted; the same command goes on")
            raise


def finished(job: Job) -> Result | None:
    """The result of a shard that an earlier call has written, or None if it has to be written."""
    try:
        index = ShardIndex.from_json(Path(index_file(str(job.shard))).read_bytes(), str(job.shard))
        if index.bytes != job.shard.stat().st_size or index.sha256 is None:
            return None
    except (OSError, UserError):
        return None
    there = set(index.keys)
    if index.keys != [sample.key for sample in job.samples if sample.key in there]:
        return None
    left_out = []
    for sample in job.samples:
        if sample.key not in there:
            try:
                load(job, sample)
                return None  # it could not be read then: the disk was away, say
            except ValueError as error:
                left_out.append((sample.path, str(error)))
    return Result(job.shard, len(index.keys), index.bytes, left_out)


def write_shard(job: Job) -> Result:
    """Write a shard and its index file; UserError if that can't be done."""
    keys, left_out = [], []
    try:
        with whole_file(job.shard) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for sample in job.samples:
                try:
                    suffix, data = load(job, sample)
                except ValueError as error:
                    left_out.append((sample.path, str(error)))
                else:
                    add_member(tar, f"{sample.key}.{suffix}", data)
                    if sample.label is not None:
                        add_member(tar, f"{sample.key}.cls", str(sample.label).encode())
                    keys.append(sample.key)
                count_one()
        index = write_shard_index(job.shard)
    except OSError as error:
        raise UserError(
            f"cannot write {job.shard}: {error.strerror or error}; make room there, then the same command goes on"
        ) from error
    assert index.keys == keys and not index.problems, f"{job.shard} does not read back as it was written"
    return Result(job.shard, len(keys), index.bytes, left_out)


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a file without time and owner, so that the same input gives the same bytes."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
    tar.members = []  # or they would pile up


def load(job: Job, sample: Sample) -> tuple[str, bytes]:
    """(suffix, bytes) of an image as it goes into its shard; ValueError if it can't be used."""
    try:
        data = (job.folder / sample.path).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror or error}") from error
    return convert(data, kind_of(data, sample.path), job.options)


def kind_of(data: bytes, path: str) -> str:
    """jpeg, png or webp: by the first bytes, else by the suffix."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpeg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return {"png": "png", "webp": "webp"}.get(path.rpartition(".")[2].lower(), "jpeg")


def convert(data: bytes, kind: str, options: Options) -> tuple[str, bytes]:
    """(suffix, bytes) of an image in the size and format that the options ask for; ValueError if it is damaged.

    It stays as it is, byte for byte, where it is small enough and of the right format.
    """
    wanted = kind if options.format == "keep" else options.format
    suffix = "jpg" if wanted == "jpeg" else wanted
    if options.size is None and options.format == "keep" and not options.check:
        return suffix, data
    image = decode_rgb(data)
    shorter = min(image.size)
    if options.size is not None and shorter > options.size:
        size = tuple(max(1, round(side * options.size / shorter)) for side in image.size)
        image = image.resize(size, Image.Resampling.LANCZOS)
    elif wanted == kind:
        return suffix, data
    buffer = io.BytesIO()
    image.info = {}  # a colour profile is not that of the RGB pixels
    try:
        image.save(buffer, wanted, **({} if wanted == "png" else {"quality": options.quality}))
    except (OSError, ValueError) as error:  # WebP has at most 16,383 pixels a side
        raise ValueError(f"cannot be written as {wanted}: {error}") from error
    return suffix, buffer.getvalue()


def summary(wanted: ShardSet, results: Sequence[Result]) -> dict:
    """What the summary file says."""
    left_out = sorted(pair for result in results for pair in result.left_out)
    return {
        **wanted.description,
        "source": str(wanted.folder.resolve()),
        "images": sum(result.samples for result in results),
        "shards": len(results),
        "bytes": sum(result.bytes for result in results),
        "classes": None if wanted.sources.classes is None else len(wanted.sources.classes),
        "left_out": [{"image": image, "reason": reason} for image, reason in left_out],
        "pictures": counted(wanted, len(left_out)).to_json(),
    }


def counted(wanted: ShardSet, left_out: int) -> PictureCount:
    """What became of the pictures in the folder, of which so many could not be used."""
    passed_over = wanted.sources.passed_over
    found = len(wanted.sources.images) + sum(passed_over.values())
    return PictureCount(found, +Counter({**passed_over, DAMAGED: left_out}))


def tell(wanted: ShardSet, rows: dict, complete: bool) -> None:
    """Say what is there and what to do next; UserError if too many images had to be left out."""
    left_out, total = rows["left_out"], len(wanted.sources.images)
    for row in left_out[:3]:
        say(f"left out: {row['image']}: {row['reason']}")
    lost = f"{len(left_out):,} of {total:,} images had to be left out, the first: "
    if len(left_out) > MAX_LEFT_OUT * total:
        raise UserError(
            f"{lost}{left_out[0]['image']}: {left_out[0]['reason']}; all are named in {wanted.summary_file}: replace "
            f"them or take them away, then start over with --fresh (the shards stay usable)"
        )
    place = wanted.out / f"{wanted.prefix}-*.tar"
    classes = f", {rows['classes']:,} classes" if rows["classes"] else ""
    lost = f"; {len(left_out):,} left out, named in {wanted.summary_file}" if left_out else ""
    print(
        f"{'finished already: ' if complete else ''}{rows['images']:,} images in {rows['shards']:,} shards "
        f"({rows['bytes'] / 1e6:,.1f} MB{classes}): {place}{lost}"
    )
    train = wanted.out / "train-*.tar"
    settings = [f"data.train={place}"]
    if wanted.prefix.startswith("val") and glob.glob(glob.escape(str(wanted.out)) + "/train-*.tar"):
        settings = [f"data.train={train}", f"data.validation={place}"]
    if rows["classes"] is None:
        settings.append("data.labels=false")
    print("next: python ibq/train_tokenizer.py --config yaml/tokenizer_16384.yaml " + shlex.join(settings))
    print(f"{wanted.folder}: {counted(wanted, len(left_out))}")


# --- Indexing shards that are there ---


def index_shards(patterns: Sequence[str], processes: int) -> int:
    """Write the index files that are missing beside shards; the exit code, 2 if a shard could not be indexed."""
    paths = [path for pattern in patterns for path in (sorted(glob.glob(pattern)) or [pattern])]
    paths = [Path(path) for path in dict.fromkeys(paths)]
    if not any(path.is_file() for path in paths):
        raise UserError(f"no shards at {' '.join(patterns)!r}: give tar files on this machine, such as 'shards/*.tar'")
    done = []
    with progress_bar("index", len(paths), "shard") as progress:
        in_processes(
            index_one,
            paths,
            min(processes, len(paths)),
            done=lambda result: (done.append(result), progress.update()),
            tick=lambda count: None,
        )
    for message in sorted(result.message for result in done if result.message):
        say(message)
    broken = sum(result.broken for result in done)
    kept = sum(result.kept for result in done)
    left_out = sum((result.left_out for result in done), Counter())
    print(
        f"{PictureCount(sum(result.samples for result in done), left_out)}, in {len(done) - broken:,} indexed shards"
        + (f", {kept:,} of which had their index already" if kept else "")
    )
    if broken:
        raise UserError(f"{broken:,} of {len(done):,} shards could not be indexed (named above); fetch them again")
    return 0


class Indexed(NamedTuple):
    """What became of a shard that was to be indexed."""

    samples: int
    left_out: Counter  # reason -> samples that can't be used, whatever their labels
    kept: bool  # its index file was there
    broken: bool
    message: str


def index_one(path: Path) -> Indexed:
    """Write the index file of a shard, if there is none that fits.

    That of a shard which has been cut off since is kept: it alone knows what was lost.
    """
    try:
        index = existing_index(path)
        kept = index is not None
        index = index or write_shard_index(path)
        broken = index.bytes > path.stat().st_size
    except (OSError, UserError) as error:
        return Indexed(0, Counter(), False, True, str(error))
    message = ""
    if index.problems:
        number, reason = next(iter(index.problems.items()))
        message = f"{path}: {len(index.problems):,} of {len(index.keys):,} samples can't be used, the first: "
        message += f"{index.keys[number]}: {reason}"
    return Indexed(len(index.keys), Counter(map(reason_of, index.problems.values())), kept, broken, message)


def existing_index(path: Path) -> ShardIndex | None:
    """What a shard's index file says, or None where it is missing, damaged, without checksums or of another shard."""
    if not Path(index_file(str(path))).is_file():
        return None
    try:
        index = read_shard_index(path)
    except UserError:
        return None
    return None if index.sha256 is None else index


# --- Processes ---

_counter = None  # images done by all processes together


def in_processes(
    work: Callable, jobs: Iterable, processes: int, *, done: Callable[..., object], tick: Callable[[int], object]
) -> None:
    """Call `work(job)` for all jobs and `done(result)` with each result; `tick` is told the images done so far.

    When one fails or Ctrl-C is pressed, all processes end at once.
    """
    context = process_context()
    counter = context.Value("q", 0)
    stop, stopper = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(processes, context, _start_worker, (counter, stop))
    jobs = iter(jobs)
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until the processes are ready to ignore it
        running = {pool.submit(work, job) for job in islice(jobs, 2 * processes)}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        while running:
            ended, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            tick(counter.get_obj().value)  # without its lock, which a process that was killed may hold
            for future in ended:
                done(future.result())
            running |= {pool.submit(work, job) for job in islice(jobs, len(ended))}
    except BrokenProcessPool as error:
        raise UserError(
            "a process was killed, perhaps for want of memory; the same command goes on (with fewer --processes)"
        ) from error
    except BaseException:
        stopper.send_bytes(b"stop")
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(counter, stop) -> None:
    """Prepare a process, which the main one ends by a word on `stop`."""
    global _counter
    _counter = counter
    prepare(stop)


def count_one() -> None:
    """Tell the progress bar that an image is done."""
    if _counter is not None:
        with _counter.get_lock():
            _counter.value += 1


if __name__ == "__main__":
    exit_on_user_error(main)
