"""Which images of a folder go into which shard, with which labels and under which keys."""

import contextlib
import csv
import hashlib
import json
import math
import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ibq.config import UserError
from ibq.data.counts import BESIDE, reason_of
from ibq.data.index import IMAGE_SUFFIXES, WEBDATASET_OWN
from ibq.data.order import shuffled
from ibq.data.shards import (
    CLASSES_FILE,
    check_is_class,
    names_of_class_folders,
    parse_classes,
    pictures_below,
    problem_of_file,
)
from ibq.files import lock
from ibq.progress import progress_bar, say

HEADER_NAMES = {"file", "file_name", "filename", "id", "image", "image_id", "imageid", "name", "path"}
FORMAT = 1  # of a description
KAGGLE_BOXES = re.compile(r"(\S+)(\s+-?\d+){4}(\s+\S+(\s+-?\d+){4})*")  # class and four numbers a box
WHOLE_NUMBER = re.compile(r"-?\d{1,9}")
MOST_CLASSES = 1_000_000  # a larger label without a class list is no label
BARS_FROM = 100  # class folders


class Source(NamedTuple):
    """One image file."""

    path: str  # relative to the folder
    size: int  # bytes
    label: int | None


class SourceSet(NamedTuple):
    """The images of a folder."""

    images: list[Source]  # in sorted order
    classes: list[str] | None  # None: a set without labels
    passed_over: Mapping[str, int]  # reason -> pictures that are not among them


class LabelLine(NamedTuple):
    """A line of a label file."""

    number: int  # from 1
    name: str
    label: str


def read_sources(folder: Path, *, labels: Path | None, classes: Path | None, labelled: bool) -> SourceSet:
    """The images in `folder`; UserError for labels that do not fit them.

    `labels`: a label file, or None for class folders. `classes`: a classes.json that fixes the numbering.
    """
    try:
        names = None if classes is None else read_classes(classes)
        if not labelled:
            images, passed_over = _images(folder)
            return SourceSet(_sources(folder, ((path, None) for path in images)), None, passed_over)
        if labels is None:
            return _read_class_folders(folder, names)
        return _read_flat_folder(folder, labels, names)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or folder}: {error.strerror}; mend that and try again") from error


def read_classes(path: Path) -> list[str]:
    """The names in a classes.json; UserError if it is none or names a class twice."""
    names = parse_classes(path.read_bytes(), str(path))
    seen = set()
    twice = [name for name in names if name in seen or seen.add(name)]
    if twice:
        raise UserError(f"{path}: the class {twice[0]!r} is there twice; give every class a name of its own")
    return names


def sample_keys(paths: Iterable[str]) -> list[str]:
    """The names of samples in a shard: paths without suffix and dots, because a member's name ends at its first dot.

    Where two would be equal, the later gets its suffix appended, then a number.
    """
    keys: dict[str, None] = {}
    for path in paths:
        stem, _, suffix = path.rpartition(".")
        key = base = re.sub(r"[.\x00-\x1f\x7f]", "_", stem)
        if WEBDATASET_OWN.match(f"{key}.{suffix}"):
            key = base = key[1:]
        number = 1
        while key in keys:
            key = f"{base}_{suffix}" if number == 1 else f"{base}_{suffix}_{number}"
            number += 1
        keys[key] = None
    return list(keys)


def _images(folder: Path) -> tuple[list[Path], Counter]:
    paths, passed_over = _read(folder, pictures_below(folder))
    if not paths:
        raise UserError(f"no images in {str(folder)!r}: expected JPEG, PNG or WebP files")
    return paths, passed_over


def _read(folder: Path, pictures: Sequence[Path]) -> tuple[list[Path], Counter]:
    """(those pictures that are read, reason -> number of the others), which is said."""
    problems = {path: problem for path in pictures if (problem := problem_of_file(path))}
    by_reason: dict[str, list[Path]] = defaultdict(list)
    for path, problem in problems.items():
        by_reason[reason_of(problem)].append(path)
    for paths in by_reason.values():
        say(f"note: {len(paths):,} pictures in {folder} are passed over, such as {paths[0]}: {problems[paths[0]]}")
    read = [path for path in pictures if path not in problems]
    return read, Counter({reason: len(paths) for reason, paths in by_reason.items()})


def _sources(folder: Path, files: Iterable[tuple[Path, int | None]]) -> list[Source]:
    return [Source(path.relative_to(folder).as_posix(), path.stat().st_size, label) for path, label in files]


# --- One folder a class ---


def _read_class_folders(folder: Path, names: Sequence[str] | None) -> SourceSet:
    """Classes are in sorted order, as in `ibq.data.shards.class_folders`, or in that of `names`."""
    found, passed_over = _scan(folder)
    beside, others = _read(folder, pictures_below(folder, deep=False))
    loose = len(beside)
    if not found and loose:
        raise UserError(
            f"{str(folder)!r} holds {loose:,} images but no class folders; give their labels with --labels FILE "
            f"(lines `NAME LABEL`), or add --no-labels for a set without"
        )
    if not found:
        raise UserError(f"no images in {str(folder)!r}: expected one sub-folder a class with JPEG, PNG or WebP files")
    if loose:
        say(f"note: {loose:,} images that lie directly in {folder} belong to no class and are passed over")
    passed_over += others + Counter({BESIDE: loose})
    classes = list(names or found)
    position = {name: label for label, name in enumerate(classes)}
    unknown = [name for name in found if name not in position]
    if unknown:
        raise UserError(
            f"{len(unknown):,} of {len(found):,} folders in {folder} are no class of the --classes file, the first: "
            f"{unknown[0]!r}; rename them, move them away, or leave out --classes"
        )
    images = [image._replace(label=position[name]) for name, rows in found.items() for image in rows]
    return SourceSet(images, classes, passed_over)


def _scan(folder: Path) -> tuple[dict[str, list[Source]], Counter]:
    """(class name -> its images, without labels yet, what is not read); folders without images are no classes."""
    names = names_of_class_folders(folder)
    found, passed_over = {}, Counter()
    with progress_bar("scan", len(names), "folder", disable=len(names) < BARS_FROM) as progress:
        for name in names:
            os.scandir(folder / name).close()  # one that can't be read would look empty, and shift all later labels
            pictures = pictures_below(folder / name)
            check_is_class(folder / name, pictures)
            paths, others = _read(folder / name, pictures)
            passed_over += others
            found[name] = _sources(folder, ((path, None) for path in paths))
            progress.update()
    empty = [name for name in names if not found[name]]
    if empty and len(empty) < len(names):
        say(f"note: {len(empty):,} folders without images are no classes, the first: {empty[0]!r}")
    return {name: rows for name, rows in found.items() if rows}, passed_over


# --- A flat folder and a file with labels ---


def _read_flat_folder(folder: Path, file: Path, names: Sequence[str] | None) -> SourceSet:
    paths, passed_over = _images(folder)
    lines = read_label_lines(file)
    chosen = _match([path.relative_to(folder).as_posix() for path in paths], lines, folder, file)
    values, classes = _numbers(chosen, names, file)
    return SourceSet(_sources(folder, zip(paths, values, strict=True)), classes, passed_over)


def read_label_lines(file: Path) -> list[LabelLine]:
    """The lines `NAME LABEL` of a label file, without its header; UserError for any other line."""
    rows = [
        (number, _split(line.strip()))
        for number, line in enumerate(file.read_text("utf-8-sig", "surrogateescape").split("\n"), 1)
        if line.strip()
    ]
    if not rows:
        raise UserError(f"{file}: empty; expected lines `NAME LABEL`, one for each image")
    if all(len(fields) == 1 for _, fields in rows):
        raise UserError(
            f"{file}: one value a line, without image names (the numbers in ImageNet's "
            f"ILSVRC2012_validation_ground_truth.txt are moreover in another order than the sorted classes that "
            f"published checkpoints use); give lines `NAME LABEL`, such as Kaggle's LOC_val_solution.csv"
        )
    name, *rest = rows[0][1]
    if name.lower() in HEADER_NAMES and not any(WHOLE_NUMBER.fullmatch(word) for word in rest):
        del rows[0]
    for number, fields in rows:
        if len(fields) != 2 or not all(fields):
            raise UserError(
                f"{file}: line {number} is not of the form `NAME LABEL`; write an image's name and its class, "
                f"separated by a tab, a comma or blanks"
            )
    return [LabelLine(number, name.replace("\\", "/"), label) for number, (name, label) in rows]


def _split(line: str) -> list[str]:
    """The fields of a line; names with blanks are told by their suffix."""
    if "\t" in line:
        return [field.strip() for field in line.split("\t")]
    if "," in line:
        fields = [field.strip() for field in next(csv.reader([line], skipinitialspace=True))]
        boxes = KAGGLE_BOXES.fullmatch(fields[-1])
        return [*fields[:-1], boxes[1]] if boxes else fields
    named = re.fullmatch(r"(.+?\.(?:jpe?g|png|webp))\s+(.+)", line, flags=re.IGNORECASE)
    return list(named.groups()) if named else line.split(None, 1)


def _match(paths: Sequence[str], lines: Sequence[LabelLine], folder: Path, file: Path) -> list[LabelLine]:
    """The line of each image; UserError if some are missing, left over or contradict each other."""
    by_stem = defaultdict(list)
    for number, path in enumerate(paths):
        by_stem[PurePosixPath(path).stem].append(number)
    chosen: dict[int, LabelLine] = {}
    unused = []
    for line in lines:
        wanted = PurePosixPath(line.name)
        stem = wanted.stem if wanted.suffix.lower() in IMAGE_SUFFIXES else wanted.name
        ranks = {n: rank for n in by_stem.get(stem, ()) if (rank := _fit(PurePosixPath(paths[n]), wanted))}
        best = [number for number, rank in ranks.items() if rank == max(ranks.values())]
        if len(best) > 1:
            raise UserError(
                f"{file}: line {line.number}: {line.name!r} may be {paths[best[0]]} or {paths[best[1]]}; "
                f"write the whole name"
            )
        if not best:
            unused.append(line)
        elif chosen.setdefault(best[0], line).label != line.label:
            first = chosen[best[0]]
            raise UserError(
                f"{file}: lines {first.number} and {line.number} give {paths[best[0]]} two labels, {first.label!r} and "
                f"{line.label!r}; remove one"
            )
    if unused:
        raise UserError(
            f"{file}: {len(unused):,} of {len(lines):,} lines name no image in {folder}, the first: line "
            f"{unused[0].number} ({unused[0].name!r}); remove these lines or add the images"
        )
    missing = [path for number, path in enumerate(paths) if number not in chosen]
    if missing:
        raise UserError(
            f"{file}: {len(missing):,} of {len(paths):,} images in {folder} have no line, the first: {missing[0]}; add "
            f"lines or move the images away"
        )
    return [chosen[number] for number in range(len(paths))]


def _fit(path: PurePosixPath, wanted: PurePosixPath) -> tuple[int, bool, bool, bool] | None:
    """How well a name in a label file fits an image of the same stem: more is better, None is not at all."""
    have, want = path.parent.parts, wanted.parent.parts
    shared = min(len(have), len(want))
    if have[len(have) - shared :] != want[len(want) - shared :]:
        return None
    return shared, have == want, path.suffix.lower() == wanted.suffix.lower(), path.suffix == wanted.suffix


def _numbers(lines: Sequence[LabelLine], names: Sequence[str] | None, file: Path) -> tuple[list[int], list[str]]:
    """(labels, class names) of lines whose labels are whole numbers or names."""
    if all(WHOLE_NUMBER.fullmatch(line.label) for line in lines):
        return _whole_numbers(lines, names, file)
    classes = list(names) if names is not None else sorted({line.label for line in lines})
    position = {name: label for label, name in enumerate(classes)}
    _refuse(lines, lambda line: line.label not in position, "are no class of the --classes file", file)
    return [position[line.label] for line in lines], classes


def _whole_numbers(lines: Sequence[LabelLine], names: Sequence[str] | None, file: Path) -> tuple[list[int], list[str]]:
    values = [int(line.label) for line in lines]
    top = MOST_CLASSES if names is None else len(names)
    _refuse(lines, lambda line: not 0 <= int(line.label) < top, f"lie outside 0 to {top - 1:,}", file)
    if min(values) == 1:
        say(f"note: no label in {file} is 0; numbers count from 0, subtract 1 from numbers that count from 1")
    classes = [str(number) for number in range(max(values) + 1)] if names is None else list(names)
    known = set(classes)
    shifted = [value for value in values if str(value) in known and classes[value] != str(value)]
    if shifted:
        say(f"note: the labels in {file} are taken as positions: {shifted[0]} is class {classes[shifted[0]]!r}")
    return values, classes


def _refuse(lines: Sequence[LabelLine], wrong: Callable[[LabelLine], bool], problem: str, file: Path) -> None:
    bad = [line for line in lines if wrong(line)]
    if bad:
        raise UserError(
            f"{file}: {len(bad):,} of {len(lines):,} labels {problem}, the first: {bad[0].label!r} in line "
            f"{bad[0].number}; correct them, or give the --classes file that they belong to"
        )


# --- Which image goes into which shard ---


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the shards' bytes depend on, besides the images."""

    size: int | None  # shorter side, in pixels
    format: str  # keep, jpeg, png or webp
    quality: int
    samples_per_shard: int
    order: str  # shuffled or sorted
    seed: int
    check: bool  # decode every image
    no_labels: bool


class Sample(NamedTuple):
    """One image on its way into a shard."""

    path: str  # relative to the source folder
    key: str
    label: int | None


class Job(NamedTuple):
    """One shard to write."""

    shard: Path
    folder: Path
    samples: list[Sample]
    options: Options


class ShardSet:
    """The shards that a set of images makes."""

    def __init__(self, folder: Path, out: Path, prefix: str, sources: SourceSet, options: Options):
        self.folder, self.out, self.prefix, self.sources, self.options = folder, out, prefix, sources, options
        self.file = out / f"{prefix}.plan.json"  # its description, under the name that older runs gave it
        self.summary_file = out / f"{prefix}.make_shards.json"
        self.keys = sample_keys(source.path for source in sources.images)
        count = len(sources.images)
        self.order = range(count) if options.order == "sorted" else shuffled(count, options.seed)
        self.shards = math.ceil(count / options.samples_per_shard)

    @cached_property
    def description(self) -> dict:
        """What decides whether two sets are the same."""
        digest = hashlib.sha256(json.dumps(self.sources.classes).encode())
        for path, size, label in self.sources.images:
            digest.update(f"\0{path}\0{size}\0{label}".encode("utf-8", "surrogateescape"))
        return {
            "format": FORMAT,
            "prefix": self.prefix,
            "images": len(self.sources.images),
            "options": asdict(self.options),
            "fingerprint": digest.hexdigest(),
        }

    def job(self, number: int) -> Job:
        """What has to be done for a shard."""
        first = number * self.options.samples_per_shard
        chosen = [int(place) for place in self.order[first : first + self.options.samples_per_shard]]
        samples = [Sample(self.sources.images[i].path, self.keys[i], self.sources.images[i].label) for i in chosen]
        return Job(self.out / f"{self.prefix}-{number:05d}.tar", self.folder, samples, self.options)

    def jobs(self) -> Iterator[Job]:
        """All shards."""
        return map(self.job, range(self.shards))

    def own_files(self) -> list[Path]:
        """This prefix's shards, index files and summary in OUT."""
        return self._files(rf"{re.escape(self.prefix)}(-\d{{5,}}\.(tar|index\.json)|\.make_shards\.json)")

    def remove_stale_files(self) -> None:
        """Remove what a run that was killed has left half-written."""
        prefix = re.escape(self.prefix)
        own = rf"{prefix}(-\d{{5,}}\.(tar|index\.json)|\.(plan|make_shards)\.json)"
        for path in self._files(rf"\.tmp-\d+-({own}|{re.escape(CLASSES_FILE)})"):
            path.unlink(missing_ok=True)

    def _files(self, pattern: str) -> list[Path]:
        if not self.out.is_dir():
            return []
        return [path for path in sorted(self.out.iterdir()) if re.fullmatch(pattern, path.name)]


def check_same(wanted: ShardSet) -> None:
    """UserError if OUT holds shards of another set, or another numbering of the classes."""
    remedy = "give another OUT or --prefix, or add --fresh to replace them"
    shards = f"{wanted.out} holds other shards {wanted.prefix}-*.tar"
    if wanted.file.exists():
        try:
            there, here = json.loads(wanted.file.read_bytes()), wanted.description
            options = here["options"].items()
            changes = [f"--{name} {there['options'].get(name)} instead of {v}" for name, v in options
                       if there["options"].get(name) != v]  # fmt: skip
            if there["fingerprint"] != here["fingerprint"]:
                changes.append("other images or labels")
        except (ValueError, KeyError, TypeError, AttributeError):
            changes = [f"{wanted.file.name} is damaged"]
        if changes:
            raise UserError(f"{shards} ({', '.join(changes).replace('_', '-')}); {remedy}")
    elif wanted.own_files():
        raise UserError(f"{shards} whose {wanted.file.name} is missing; {remedy}")
    classes = wanted.out / CLASSES_FILE
    if wanted.sources.classes is not None and classes.exists() and read_classes(classes) != wanted.sources.classes:
        raise UserError(
            f"{classes} has other classes; add --classes {classes} to number these images like the shards there, give "
            f"another OUT, or add --fresh to replace it"
        )


@contextlib.contextmanager
def alone(wanted: ShardSet) -> Iterator[None]:
    """Hold the description's file, so that a second run does not take this one's files for stale ones."""
    with open(wanted.file, "rb") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            tries = 20  # processes of a run that was killed end in a moment
            while not lock(file):
                if not (tries := tries - 1):
                    raise UserError(f"another run is making {wanted.prefix}-*.tar in {wanted.out}; let it end")
                time.sleep(0.1)
        yield
