"""Random places of images, valid but odd, and a model of what they hold that shares nothing with `ibq.data`.

Every picture has a colour of its own, so that pixels tell which picture was read.
"""

import io
import json
import os
import posixpath
import random
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import chain, groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

READ = ("jpg", "jpeg", "jfif", "png", "webp")
OTHERS = ("bmp", "gif", "tif")
LEVELS, SIDE = 8, 16  # of a colour channel; pixels
BROKEN = -1  # what is called a picture and is none
KNOWN: dict[bytes, int] = {}  # file -> its picture


@cache
def picture(number: int, kind: str) -> bytes:
    """A file of one colour; `kind` as Pillow names it."""
    colour = tuple(number // LEVELS**place % LEVELS * 32 + 16 for place in (2, 1, 0))
    buffer = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), colour).save(buffer, kind)
    KNOWN[buffer.getvalue()] = number
    return buffer.getvalue()


def number_of(pixels: np.ndarray) -> int:
    """Which picture has these pixels [H, W, 3]."""
    low, high = ([int(value) // 32 for value in of(axis=(0, 1))] for of in (pixels.min, pixels.max))
    assert low == high, "not of one colour"
    return int(np.dot(low, (LEVELS**2, LEVELS, 1)))


# --- The model ---


Row = tuple[str | None, int]  # (class, picture) of a sample; no class in a set without labels


class Content(NamedTuple):
    """What is to be read of a place."""

    classes: list[str]  # by label
    rows: list[Row]
    unusable: int  # samples that can be counted and named, and no more

    def within(self, limit: float) -> "Content | None":
        """Itself, or None where more than a share of it can't be used."""
        return None if self.unusable > limit * (len(self.rows) + self.unusable) else self


def suffix_of(name: str) -> str:
    return name.rpartition(".")[2].lower() if "." in name[1:] else ""


def pictures_below(place: Path) -> dict[str, bytes | None] | None:
    """Path -> file, None for other kinds of pictures and links to nothing; no dictionary where a link has no end."""
    found = {}
    for root, folders, files in os.walk(place, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "."]
        for path in (Path(root, name) for name in folders + files if name[0] != "."):
            if path.is_symlink() and path.exists() and path.resolve() in map(Path.resolve, path.parents):
                return None
            if path.name in files and suffix_of(path.name) in READ + OTHERS:
                readable = suffix_of(path.name) in READ and path.exists()
                found[str(path.relative_to(place))] = path.read_bytes() if readable else None
    return found


def in_folder(place: Path, labelled: bool) -> Content | None:
    """What a folder holds; None where it is to be refused."""
    dead = {suffix_of(path.name) for path in place.iterdir() if path.name[0] != "." and not path.exists()}
    found = pictures_below(place)
    if found is None or (labelled and dead - {*READ, *OTHERS}):  # a link to nothing may have been a class
        return None
    tops = defaultdict(list)
    for path, data in found.items():
        number = None if data is None else KNOWN.get(data, BROKEN)
        tops[path.partition("/")[0] if "/" in path and labelled else None].append(number)
    loose = tops.pop(None, []) if labelled else []
    read = {top: [number for number in numbers if number is not None] for top, numbers in sorted(tops.items())}
    if not any(read.values()) or (labelled and not all(read.values())):
        return None
    rows = [(top, number) for top, numbers in read.items() for number in numbers]
    return Content([*read], rows, len(loose) + sum(map(len, tops.values())) - len(rows))


class Member(NamedTuple):
    """Of a tar file."""

    name: str
    data: bytes = b""
    kind: bytes = tarfile.REGTYPE
    target: str = ""  # of a link

    @property
    def wanted(self) -> str:
        """The name of the member that a link stands for."""
        folder = posixpath.dirname(self.name) if self.kind == tarfile.SYMTYPE else ""
        return posixpath.normpath(posixpath.join(folder, self.target))


def data_of(members: Sequence[Member], place: int) -> bytes | None:
    """What a member holds; a link what the nearest member of that name before it holds, or else the next behind it."""
    seen = []
    while members[place].target:
        seen.append(place)
        places = [*range(place - 1, -1, -1), *range(place + 1, len(members))]
        names = (n for n in places if posixpath.normpath(members[n].name) == members[place].wanted)
        if (place := next(names, place)) in seen:
            return None
    return members[place].data


def samples(members: Sequence[Member]) -> Iterator[tuple[int, str | None] | None]:
    """(picture, text of its label) of each sample of a shard; None for one that can't be used."""
    fields = []
    for place, (folder, _, name) in enumerate(member.name.rpartition("/") for member in members):
        if members[place].kind != tarfile.DIRTYPE and "." in name and name[0] != ".":
            key, _, field = name.partition(".")
            fields.append((folder + "/" + key, field.lower(), data_of(members, place)))
    runs = [[*run] for _, run in groupby(fields, lambda field: field[0])]
    for key in dict.fromkeys(key for key, _, _ in fields):
        own = [run for run in runs if run[0][0] == key]
        whole = [*chain(*own)]
        alone = all(sum(field in kinds for _, field, _ in whole) <= 1 for kinds in (READ, ["cls"]))
        for run in [whole] if alone else own:
            pictures = [data for _, field, data in run if field in READ]
            labels = [data for _, field, data in run if field == "cls"]
            like = [field for _, field, _ in run if field.rpartition(".")[2] in READ + OTHERS and field not in READ]
            if len(pictures) == 1 and len(labels) <= 1 and pictures[0] is not None:
                yield KNOWN.get(pictures[0], BROKEN), labels[0].decode() if labels and labels[0] is not None else None
            elif pictures or labels or like:
                yield from [None] * (len(pictures) or len(like) or 1)


def class_of(text: str | None, names: list[str] | None) -> str | None:
    """The class that a label means; without a list of names it is the number itself."""
    try:
        label = int(text)
        return None if label < 0 else str((names or range(label + 1))[label])
    except (TypeError, ValueError, IndexError):
        return None


def in_shards(shards: Sequence[tuple[str, Sequence[Member]]], lists: dict, labelled: bool) -> Content | None:
    """What shards (folder, members) hold, whose folders have lists of classes; None where it is to be refused."""
    named = [lists[folder] for folder in dict.fromkeys(folder for folder, _ in shards)]
    alike = all(names == named[0] for names in named)
    if labelled and not alike and any(names is None or len({*names}) < len(names) for names in named):
        return None
    rows, unusable = [], 0
    for folder, members in shards:
        for sample in samples(members):
            name = class_of(sample[1], lists[folder]) if sample and labelled else None
            if sample and (name is not None or not labelled):
                rows.append((name, sample[0]))
            else:
                unusable += 1
    classes = named[0] or [] if alike else [*dict.fromkeys(name for names in named for name in names or ())]
    return Content(classes, rows, unusable) if rows or unusable else None


# --- Folders ---

NAMES = ("cat", "Dog", "b.dogs", "two words", "naïve", "日本", "n01440764", "0", "10", "2", "x.png", "-dash", "Zoo")
STEMS = ("1", "2", "A", "a", "img.05", "with blank", "été", "x..y", "[1]", "#7", "__k__", "end.")


class Draw:
    """Random names, and a new picture for each file."""

    def __init__(self, seed: int, root: Path):
        self.rng, self.root, self.count = random.Random(seed), root, 0

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def new(self) -> bytes:
        self.count += 1
        return picture(self.count % LEVELS**3, self.rng.choice(["PNG", "PNG", "JPEG", "WEBP"]))

    def suffix(self, kinds: Sequence[str] = READ) -> str:
        suffix = self.rng.choice(kinds)
        return self.rng.choice([suffix, suffix, suffix.upper(), suffix.title()])

    def stem(self) -> str:
        return self.rng.choice(STEMS)

    def some(self, forms: Sequence[Callable], rare: Sequence[Callable] = ()) -> list[Callable]:
        """A part of the forms, in any order: a place with all of them would hide what each does."""
        share = self.rng.choice([0.0, 0.1, 0.3])
        chosen = [form for form in forms if self.chance(share)] + [form for form in rare if self.chance(0.02)]
        return self.rng.sample(chosen, len(chosen))


class Tree(Draw):
    """A folder of class folders, and another folder for what links lead to."""

    def __init__(self, seed: int, root: Path):
        super().__init__(seed, root)
        self.place, self.elsewhere = root / "set", root / "else where"
        self.place.mkdir(parents=True)
        self.file_names: list[str] = []
        self.classes = self.rng.sample(NAMES, self.rng.randint(1, 4))
        for name in self.classes if self.chance(0.95) else ():
            for _ in range(self.rng.randint(1, 3)):
                self.file(self.place / name)
        everyday = (self.deep, self.loose, self.loose_other, self.other_kind, self.other_file, self.hidden)
        links = (self.file_link, self.folder_link, self.class_link, self.hard_link, self.empty_class, self.broken)
        names = (self.name_of_bytes, self.same_stem, self.hidden_folder, self.dead_link)
        for form in self.some(everyday + links + names, (self.only_other, self.only_dead, self.dead_class, self.loop)):
            for _ in range(self.rng.randint(1, 2)):
                form()

    def file(self, folder: Path, name: str | None = None, data: bytes | None = None) -> Path:
        path = folder / (name or f"{self.stem()}.{self.suffix()}")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(path):
            path.write_bytes(self.new() if data is None else data)
            self.file_names.append(path.name)
        return path

    def somewhere(self) -> Path:
        """A class folder, or a folder in one."""
        folder = self.place / self.rng.choice(self.classes)
        folder = folder / self.rng.choice(NAMES) if self.chance(0.3) else folder
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def link(self, path: Path, target: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(path):
            path.symlink_to(os.path.relpath(target, path.parent) if self.chance(0.5) else target)

    def deep(self) -> None:
        self.file(self.somewhere() / "deep" / self.rng.choice(NAMES))

    def loose(self) -> None:
        """Perhaps with a name that is there in a class, too."""
        self.file(self.place, self.rng.choice([None, *self.file_names[:3]]))

    def loose_other(self) -> None:
        self.file(self.place, f"{self.stem()}.{self.suffix(OTHERS)}")

    def other_kind(self) -> None:
        self.file(self.somewhere(), f"{self.stem()}.{self.suffix(OTHERS)}")

    def other_file(self) -> None:
        name = self.rng.choice(["notes.txt", "classes.json", "png", "a.png.txt", "LICENSE"])
        self.file(self.rng.choice([self.place, self.somewhere()]), name, b"[]")

    def hidden(self) -> None:
        self.file(self.rng.choice([self.place, self.somewhere()]), f"._{self.stem()}.png")

    def hidden_folder(self) -> None:
        self.file(self.rng.choice([self.place, self.somewhere()]) / ".cache")

    def file_link(self) -> None:
        self.link(self.somewhere() / f"link.{self.suffix()}", self.file(self.elsewhere))

    def folder_link(self) -> None:
        target = self.elsewhere / "more" if self.chance(0.5) else self.place / self.rng.choice(self.classes)
        self.file(target)
        self.link(self.somewhere() / "linked", target)

    def class_link(self) -> None:
        self.file(self.elsewhere / "class" / self.rng.choice(NAMES))
        self.link(self.place / "linked class", self.elsewhere / "class")

    def hard_link(self) -> None:
        path = self.somewhere() / "hard.png"
        if not path.exists():
            path.hardlink_to(self.file(self.elsewhere))

    def empty_class(self) -> None:
        self.file(self.place / "empty" / self.rng.choice(["", "deeper"]), "notes.txt", b"")

    def broken(self) -> None:
        self.file(self.somewhere(), "broken.png", self.rng.choice([b"no picture", b""]))

    def name_of_bytes(self) -> None:
        self.file(self.somewhere(), os.fsdecode(b"\xff\xfe.png"))

    def same_stem(self) -> None:
        folder = self.somewhere()
        for name in self.rng.sample(["twin.png", "twin.PNG", "twin.jpg", "twin_png.png"], 2):
            self.file(folder, name)

    def only_other(self) -> None:
        self.file(self.place / "only other", "1.bmp")

    def dead_link(self) -> None:
        folder = self.rng.choice([self.somewhere(), self.somewhere(), self.place])
        self.link(folder / self.rng.choice(["dead.png", "dead.txt"]), self.root / "nowhere")

    def only_dead(self) -> None:
        self.link(self.place / "only dead" / "1.jpg", self.root / "nowhere")

    def dead_class(self) -> None:
        self.link(self.place / "dead class", self.root / "nowhere")

    def loop(self) -> None:
        folder = self.somewhere()
        self.link(folder / "round", self.rng.choice([folder, folder.parent, self.place]))

    def expected(self, labelled: bool) -> Content | None:
        return in_folder(self.place, labelled)


# --- Shards ---


class Shards(Draw):
    """Tar files in one or several folders, which may have lists of classes."""

    def __init__(self, seed: int, root: Path):
        super().__init__(seed, root)
        folders = [
            root / "shards" / name for name in self.rng.sample(["a", "B 2", "c.d", "é"], self.rng.choice([1, 2, 2, 3]))
        ]
        self.lists = dict(zip(folders, self._lists(len(folders)), strict=True))
        self.shards: dict[Path, list[Member]] = {}
        for folder in folders:
            folder.mkdir(parents=True)
            if self.lists[folder] is not None:
                (folder / "classes.json").write_text(json.dumps(self.lists[folder]))
            for number in range(self.rng.choice([1, 1, 2])):
                self.shards[folder / f"s-{number}.tar"] = self._shard(folder / f"s-{number}.tar")
        self.paths = sorted(self.shards, key=str)

    def _lists(self, count: int) -> list[list[str] | None]:
        """No lists, equal ones, others in every folder, or what can't be matched."""
        names = self.rng.sample(NAMES, 5)
        form = self.rng.choices(["none", "equal", "others", "missing", "twice"], [3, 3, 6, 0.7, 0.7])[0]
        if form in ("none", "equal"):
            return [None if form == "none" else names] * count
        lists = [self.rng.sample(names, self.rng.randint(2, 5)) for _ in range(count)]
        if form == "missing":
            lists[0] = None
        if form == "twice":
            lists[0] = [*lists[0], lists[0][0]]
        return lists

    def _shard(self, path: Path) -> list[Member]:
        """Write a tar file, or several one after the other; all their members."""
        self.names = self.lists[path.parent]
        whole, data = [], b""
        for _ in range(self.rng.choice([1, 1, 1, 1, 2])):
            self.members: list[Member] = []
            for number in range(self.rng.randint(1, 2)):
                self.pair(f"{number}")
            for form in self.some(FORMS):
                form(self)
            data += self._tar() + bytes(512 * self.rng.choice([0, 0, 3]))
            whole += self.members
        path.write_bytes(data)
        return whole

    def _tar(self) -> bytes:
        buffer = io.BytesIO()
        kind = self.rng.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
        with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
            for member in self.members:
                info = tarfile.TarInfo(member.name)
                info.type, info.linkname, info.size = member.kind, member.target, len(member.data)
                tar.addfile(info, io.BytesIO(member.data))
        return buffer.getvalue()

    def add(self, name: str, data: bytes | None = None, **link) -> None:
        self.members.append(Member(name, self.new() if data is None and not link else data or b"", **link))

    def label(self) -> bytes:
        """The text of a label, of the folder's list where it has one."""
        most = len(self.names or range(4))
        return self.rng.choice(["{}", "{}\n", " {} ", "0{}"]).format(self.rng.randrange(most)).encode()

    def key(self) -> str:
        folder = self.rng.choice(["", "", "./", "sub/", "v1.2/", f"{self.rng.choice(NAMES)}/"])
        return folder + self.rng.choice(["k", "K", "with blank", "été", "日本", "_", "-x", "x" * 60, "(1)"])

    def pair(self, key: str | None = None) -> None:
        """A picture and its label."""
        key = key or self.key()
        names = [f"{key}.{self.suffix()}", f"{key}.{self.suffix(['cls'])}"]
        for name in names if self.chance(0.7) else reversed(names):
            self.add(name, self.label() if name.lower().endswith("cls") else None)

    def apart(self) -> None:
        self.add("apart.png")
        self.pair("between")
        self.add("apart.cls", self.label())

    def unlabelled(self) -> None:
        self.add(f"{self.key()}u.png")

    def label_alone(self) -> None:
        self.add("alone.cls", b"0")

    def wrong_label(self) -> None:
        self.add("wrong.png")
        self.add("wrong.cls", self.rng.choice([b"cat", b"-1", b"", b"1.0", b"9"]))

    def side_by_side(self) -> None:
        for suffix in self.rng.choice([("png", "jpg", "cls"), ("png", "cls", "png", "cls"), ("png", "cls", "CLS")]):
            self.add(f"twins.{suffix}", self.label() if suffix.lower() == "cls" else None)

    def again(self) -> None:
        """A key that comes again, behind others."""
        for between in self.rng.choice([["between.txt"], ["between.png", "between.cls"]]):
            self.pair("again")
            self.add(between, self.label() if between.endswith("cls") else None)
            self.pair("again")

    def dotted(self) -> None:
        for name in self.rng.choice([["d.05.png", "d.06.png"], ["d.05.png", "d.06.jpg", "d.cls"], ["d..png"]]):
            self.add(name, self.label() if name.endswith("cls") else None)

    def more_fields(self) -> None:
        self.pair("more")
        for field in self.rng.sample(["json", "txt", "seg.png", "tif", "depth.gif"], 2):
            self.add(f"more.{field}", b"{}")

    def other_files(self) -> None:
        for name in self.rng.sample(["README", "notes.txt", "k.json", "._1.png", ".hidden.jpg", "sub/._2.png"], 3):
            self.add(name, b"{}")

    def other_kind(self) -> None:
        self.add(f"other.{self.suffix(OTHERS)}")
        if self.chance(0.5):
            self.add("other.cls", self.label())

    def folder(self) -> None:
        self.add("sub.png", b"", kind=tarfile.DIRTYPE)

    def hard_link(self) -> None:
        """Two names of one file, as GNU tar writes them; `pool` may be there in every archive."""
        self.add("pool/one")
        self.add("pool/label", self.label())
        self.add("sub/hard.png", kind=tarfile.LNKTYPE, target=self.rng.choice(["pool/one", "./pool/one"]))
        self.add("sub/hard.cls", kind=tarfile.LNKTYPE, target="pool/label")

    def hard_link_to_itself(self) -> None:
        """As GNU tar writes a file of two names that it is given twice."""
        self.add("self.png")
        self.add("self.cls", b"1")
        self.pair("between")
        for suffix in ("png", "cls"):
            self.add(f"self.{suffix}", kind=tarfile.LNKTYPE, target=f"self.{suffix}")

    def soft_link(self) -> None:
        links = [
            ("sub/soft.webp", "../pool/two"),
            ("sub/soft.cls", "../pool/two label"),
            ("other.jpg", "sub/soft.webp"),
        ]
        files = [("pool/two", None), ("pool/two label", self.label())]
        for name, data in files if self.chance(0.7) else ():
            self.add(name, data)
        for name, target in links:
            self.add(name, kind=tarfile.SYMTYPE, target=target)
        for name, data in files if self.chance(0.3) else ():
            self.add(name, data)

    def broken(self) -> None:
        self.add("broken.png", self.rng.choice([b"no picture", b""]))
        self.add("broken.cls", self.label())

    def expected(self, labelled: bool, *, lists: bool = True) -> Content | None:
        """`lists`: whether the lists of classes can be seen."""
        shards = [(str(path.parent), self.shards[path]) for path in self.paths]
        return in_shards(shards, {str(f): names if lists else None for f, names in self.lists.items()}, labelled)


FORMS = [
    *(Shards.apart, Shards.unlabelled, Shards.label_alone, Shards.wrong_label, Shards.side_by_side, Shards.again),
    *(Shards.dotted, Shards.more_fields, Shards.other_files, Shards.other_kind, Shards.folder, Shards.hard_link),
    *(Shards.hard_link_to_itself, Shards.soft_link, Shards.broken, Shards.pair, Shards.pair),
]
