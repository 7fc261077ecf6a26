"""The bytes of shards: local files, or URLs through a cache of bounded size, with retries."""

import contextlib
import hashlib
import itertools
import os
import re
import shlex
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.parse import urlsplit

from ibq.config import UserError
from ibq.data.index import NO_CHECKSUM, ImageEntry, sha256_of
from ibq.files import lock

T = TypeVar("T")
OPEN_FILES = 256  # kept open per process
COPY_BYTES = 2**22
ROOM_TRIES = 300  # a tenth of a second apart, while other processes fill the cache
FIRST_WAIT_SECONDS = 0.5  # before the first retry; doubled for every other
LOST_SECONDS = 300.0  # a shard that could not be read is tried again after this time
_SCHEME = re.compile(r"(pipe:|[a-z][a-z0-9+.-]*://)", re.IGNORECASE)


def is_url(place: str) -> bool:
    """Whether a place is for webdataset's opener (`pipe:`, `s3://`, `https://` ...), not a local file."""
    return bool(_SCHEME.match(place))


def cache_root() -> Path:
    """Where this project keeps what it can make or fetch again: `$XDG_CACHE_HOME/ibq`, or `~/.cache/ibq`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ibq"


def shard_name(shard: str) -> str:
    """The file name that a path or URL ends with."""
    return shard.rsplit("/", 1)[-1].split("?")[0].strip()


@contextlib.contextmanager
def open_url(url: str) -> Iterator[BinaryIO]:
    """A stream of a URL's bytes by webdataset's opener; OSError when it ends early.

    `pipe:COMMAND` runs a shell command: a data place is as trusted as a script. `s3://` goes through the `aws` command
    unless webdataset is told otherwise (GOPEN_REWRITE, USE_AIS_FOR).
    """
    import webdataset  # slow to import, and needed for URLs alone

    scheme = urlsplit(url).scheme.lower()
    if scheme == "s3" and "GOPEN_REWRITE" not in os.environ and "USE_AIS_FOR" not in os.environ:
        url = f"pipe:aws s3 cp --only-show-errors {shlex.quote(url)} -"
    try:
        with webdataset.gopen(url) as stream:
            yield stream
    except (ValueError, AssertionError) as error:  # no opener for this kind of URL
        raise OSError(f"{url}: cannot be opened ({error})") from error


class ShardStore:
    """Reads samples of shards.

    A URL is fetched whole into `cache` before its first sample is read; the least recently used shards make room, so
    that the cache never holds more than `limit_bytes`. Processes of one machine share it. `checks` (size and SHA-256 by
    shard, where known) tells a broken download from a good one. Relative paths are those of the folder in which it was
    made, and a local shard stays the file that it first opened: what was indexed is what is read.
    """

    _numbers = itertools.count()

    def __init__(
        self,
        *,
        cache: Path | None = None,
        limit_bytes: int = 50 * 2**30,
        retries: int = 3,
        checks: Mapping[str, tuple[int, str | None]] | None = None,
    ):
        self.cache = cache_root() / "shards" if cache is None else cache
        self.limit_bytes, self.retries = limit_bytes, retries
        self.checks = dict(checks or {})
        self._lost: dict[str, tuple[float, str]] = {}
        self._folder, self._number = os.getcwd(), next(self._numbers)

    def read(self, entry: ImageEntry) -> bytes:
        """The bytes of an image file. OSError if the shard can't be had, ValueError if the bytes are not whole."""
        data = self._retrying(entry.shard, lambda: self._read_once(entry))
        if len(data) != entry.size:
            raise ValueError(f"the shard ends after {len(data):,} of the image's {entry.size:,} bytes")
        if entry.crc32 not in (NO_CHECKSUM, zlib.crc32(data)):
            raise ValueError("its bytes are not those that were indexed (the checksum differs)")
        return data

    def head(self, entry: ImageEntry, size: int) -> bytes:
        """The first bytes of an image file, at most `size`. OSError if the shard can't be had."""
        return self._retrying(entry.shard, lambda: self._read_once(entry._replace(size=min(size, entry.size))))

    def _read_once(self, entry: ImageEntry) -> bytes:
        if not is_url(entry.shard):
            # Not seek and read: forked workers share the position in a file that was open before.
            file = _open_file(os.path.join(self._folder, entry.shard), self._number)
            return os.pread(file.fileno(), entry.size, entry.offset)
        with self._open_cached(entry.shard) as file:
            return os.pread(file.fileno(), entry.size, entry.offset)

    def _retrying(self, shard: str, action: Callable[[], T]) -> T:
        """Try with growing pauses; a shard that stays away is left alone for a while."""
        until, reason = self._lost.get(shard, (0.0, ""))
        if time.monotonic() < until:
            raise OSError(reason)
        for attempt in range(self.retries + 1):
            try:
                return action()
            except OSError as error:
                last = error
                if attempt < self.retries:
                    time.sleep(FIRST_WAIT_SECONDS * 2**attempt)
        self._lost[shard] = time.monotonic() + LOST_SECONDS, f"the shard cannot be read ({last})"
        raise OSError(self._lost[shard][1]) from last

    # --- URLs ---

    def fetch(self, url: str) -> Path:
        """The file in the cache that holds a URL's bytes; OSError if it can't be had in spite of retries."""
        return self._retrying(url, lambda: self._fetch_once(url))

    def _open_cached(self, url: str) -> BinaryIO:
        # Opened for every read: a file that another process removes to make room must give its space back.
        for _ in range(3):
            with contextlib.suppress(FileNotFoundError):
                return open(self._fetch_once(url), "rb")
        raise OSError(f"{url} leaves the cache as fast as it is fetched; raise data.cache_gib")

    def _fetch_once(self, url: str) -> Path:
        path = self.cache / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.tar"
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)  # used now
            return path
        self.cache.mkdir(parents=True, exist_ok=True)
        with self._lock(path.name):  # one process fetches, the others wait for it
            if not path.exists():
                self._download(url, path)
        return path

    def _download(self, url: str, path: Path) -> None:
        expected, sha256 = self.checks.get(url, (None, None))
        part = path.with_suffix(".part")
        try:
            with open_url(url) as stream, open(part, "wb") as file:
                self._reserve(part, expected or COPY_BYTES)
                written = 0
                while data := stream.read(COPY_BYTES):
                    if written + len(data) > (expected or COPY_BYTES):
                        self._reserve(part, written + len(data))
                    file.write(data)
                    written += len(data)
                file.truncate(written)
            if expected is not None and written != expected:
                raise OSError(f"{url}: {written:,} bytes came instead of {expected:,}")
            if sha256 is not None and sha256_of(part) != sha256:
                raise OSError(f"{url}: its bytes are not those that were indexed (SHA-256 differs); index it again")
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    def _reserve(self, part: Path, size: int) -> None:
        """Set aside `size` bytes for a file that is being fetched, which other processes then count with."""
        for _ in range(ROOM_TRIES):
            with self._lock("room"):
                others = self._make_room(size, part)
                if others is None:
                    os.truncate(part, size)  # sparse: it takes the space on the disk only as it is filled
                    return
            if not others:
                raise UserError(
                    f"data.cache_gib: {self.limit_bytes / 2**30:.3g} GiB do not hold a shard of {size / 2**30:.3g} GiB "
                    "or more; raise it"
                )
            time.sleep(0.1)
        raise OSError("the cache is full of shards that are being fetched; raise data.cache_gib")

    def _make_room(self, size: int, part: Path) -> int | None:
        """Remove the least recently used shards until `size` bytes fit; else how many others are being fetched."""
        files = {}
        # Those being fetched first: one that is whole meanwhile is found as what it has become.
        for file in [*self.cache.glob("*.part"), *self.cache.glob("*.tar")]:
            for name in (file, file.with_suffix(".tar")):
                with contextlib.suppress(FileNotFoundError):
                    files[name] = name.stat()
                    break
        files.pop(part, None)
        for file in [file for file in files if file.suffix == ".part" and self._is_abandoned(file)]:
            file.unlink(missing_ok=True)
            del files[file]
        total = sum(status.st_size for status in files.values())
        for file in sorted(files, key=lambda file: files[file].st_mtime_ns):
            if total + size > self.limit_bytes and file.suffix == ".tar":
                file.unlink(missing_ok=True)
                total -= files[file].st_size
        if total + size <= self.limit_bytes:
            return None
        return sum(file.suffix == ".part" for file in files)

    def _is_abandoned(self, part: Path) -> bool:
        """Whether the process that was fetching a shard is no more: it would hold the lock."""
        with open(self.cache / f"{part.stem}.tar.lock", "w") as file:
            return lock(file)

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        with open(self.cache / f"{name}.lock", "w") as file:
            lock(file, wait=True)
            yield


@lru_cache(maxsize=OPEN_FILES)
def _open_file(path: str, _store: int) -> BinaryIO:
    # Kept open per process: a shard is read thousands of times. Another store's index may be of what is there by now.
    return open(path, "rb")
