"""Files in object stores, on web servers and in archives, named by their URL: s3://, gs://, hf://, https://, zip://.

fsspec reads and writes them, and is imported when the first URL is used. Credentials and addresses come from where each
protocol's own package looks for them, such as AWS_PROFILE, or from the files in ~/.config/fsspec. An object appears
whole or not at all, because a store shows a new object once all its bytes are there; stores need no rename for it.
"""

from __future__ import annotations

import copy
import errno
import io
import logging
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote, unquote
from zipfile import BadZipFile

from ..errors import UserError, WriteError
from .ahead import ahead
from .patience import S3_TRIES, patience, reason, remedy, tried
from .ranges import Ranges

SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")  # two letters at least: C:/ is a disk
# the package behind a protocol
PACKAGES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "http": "aiohttp",
    "https": "aiohttp", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs", "sftp": "paramiko",
    "ssh": "paramiko", "oss": "ossfs", "webdav": "webdav4", "libarchive": "libarchive-c",
}  # fmt: skip
ARCHIVES = ("zip", "tar", "libarchive")
# stores whose folders are parts of names: what holds these, such as a bucket, is never made
BUCKETS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "hf")
# under which a listing keeps what changes with the bytes of a file, the most telling first
STAMPS = (
    "ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "blob_id", "CRC", "crc32c", "LastModified",
    "last_modified", "Last-Modified", "updated", "mtime", "created",
)  # fmt: skip
RECENT_BYTES, RECENT_S = 2**28, 10.0  # of files that are kept, because a header is read before its picture
LARGE_BYTES = 2**26  # from which on a file is read by blocks
SMALL_BYTES = 2**18  # up to which a file is fetched whole even where little of it is read
BLOCK_BYTES, SPARSE_BLOCK_BYTES = 2**22, 2**16  # of a request to a large file, and where little of it is read
FETCHED = 8  # files that are fetched ahead

Item = TypeVar("Item")


class Remote(str):
    """The URL of a file or folder in a store, with the attributes of pathlib.Path that readers and writers need.

    Attributes:
        size: bytes; None where no listing gave them.
        stamp: text that changes with the content; "" where no listing gave it.
        offset: where the file begins in the uncompressed archive that contains it; None for any other file.
    """

    size: int | None
    stamp: str
    offset: int | None

    def __new__(cls, url: str, size: int | None = None, stamp: str = "", offset: int | None = None) -> Remote:
        remote = super().__new__(cls, url)
        remote.size, remote.stamp, remote.offset = size, stamp, offset
        return remote

    def __reduce__(self) -> tuple[Any, ...]:  # so that processes can hand it on
        return Remote, (str(self), self.size, self.stamp, self.offset)

    @property
    def protocol(self) -> str:
        return self.partition("://")[0].lower()

    @property
    def _inner(self) -> str:
        """The path in the innermost store."""
        return self.partition("::")[0].partition("://")[2]

    @property
    def archive(self) -> str:
        """The path or URL of the archive that contains it, "" outside of archives."""
        return self.partition("::")[2]

    def _with(self, inner: str) -> Remote:
        return Remote(f"{self.partition('://')[0]}://{inner}" + (f"::{self.archive}" if self.archive else ""))

    @property
    def name(self) -> str:
        inner = self._inner
        if self.protocol in ("http", "https"):
            inner = unquote(re.split("[?#]", inner)[0])
        return inner.rstrip("/").rpartition("/")[2] or PurePosixPath(self.archive).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).stem

    @property
    def parent(self) -> Remote:
        return self._with(self._inner.rstrip("/").rpartition("/")[0])

    def __truediv__(self, name: str | PurePosixPath) -> Remote:
        above = self._inner.rstrip("/")
        below = quote(str(name), safe="/%") if self.protocol in ("http", "https") else str(name)
        return self._with(f"{above}/{below}" if above else below)

    def with_name(self, name: str) -> Remote:
        return self.parent / name

    def with_suffix(self, suffix: str) -> Remote:
        return self.parent / (self.stem + suffix)

    def as_posix(self) -> str:
        return str(self)

    def read_bytes(self) -> bytes:
        """Its bytes; FileNotFoundError where there is no such file, StoreError where the store does not give them."""
        return fetch(self)

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return fetch(self).decode(encoding, errors)

    def glob(self, pattern: str) -> list[Remote]:
        """The files in a folder, as in "folder/*.jpg"; asks the store."""
        folder, _, name = pattern.rpartition("/")
        return [file for file in sizes_below(self / folder if folder else self) if fnmatch(file.name, name)]

    def unlink(self) -> None:
        remove(self)

    def is_file(self) -> bool:
        """Whether there is such a file; asks the store."""
        system, path = filesystem(self)
        return bool(tried(lambda: system.isfile(path)))

    def exists(self) -> bool:
        """Whether there is such a file, or a folder with files in it; asks the store."""
        system, path = filesystem(self)
        return bool(tried(lambda: system.exists(path)))


File = Path | Remote


def is_url(path: object) -> bool:
    """Whether `path` is text that names a file in a store, and not a local path."""
    return isinstance(path, str) and SCHEME.match(path) is not None


def place(path: str | Path) -> File:
    """The local path or the file in a store that a user means: ~ becomes the home folder, file:// a local path."""
    if isinstance(path, Remote):
        return path
    if isinstance(path, Path) or not is_url(path):
        return Path(path).expanduser()
    return Path(unquote(path.removeprefix("file://"))) if path.startswith("file://") else Remote(path)


def require_local(path: object, flag: str) -> None:
    """UserError for the URL of a store."""
    if is_url(path) and not str(path).startswith("file://"):
        raise UserError(f"{flag} {path}: lies in a store, and this must be on a disk; give a local path")


def filesystem(file: Remote) -> tuple[Any, str]:
    """fsspec's file system for a file, and its path there. UserError without the package that its protocol needs, and
    for the URL of a file in no archive or bucket."""
    inner = file._inner
    if file.protocol in ARCHIVES and not file.archive:
        raise UserError(f"{file}: names no archive; give {inner or 'PATH'}, or {file.protocol}://::{inner or 'PATH'}")
    if file.protocol in BUCKETS and not inner.strip("/"):
        raise UserError(f"{file}: names no bucket; give {file.protocol}://BUCKET/FOLDER")
    system = _filesystem(file.protocol, "" if file.archive else inner.partition("/")[0], file.archive)
    return system, system._strip_protocol(f"{file.protocol}://{inner}")


@lru_cache(maxsize=64)  # an archive's table of contents is read once
def _filesystem(protocol: str, host: str, archive: str) -> Any:
    """`host`: what follows the protocol, such as a bucket; "" in an archive."""
    url = f"{protocol}://{host}" + (f"::{archive}" if archive else "")
    try:
        from fsspec.core import url_to_fs
        from fsspec.registry import known_implementations

        if "GCSFS_DEBUG" not in os.environ:  # it logs tracebacks of what it goes on to try in another way
            logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
        schemes = {part.partition("://")[0].lower() for part in url.split("::") if "://" in part}
        options = {scheme: patient for scheme in schemes if (patient := patience(scheme))}
        system = tried(lambda: url_to_fs(url, **copy.deepcopy(options))[0])
        if protocol in ("s3", "s3a"):
            system.retries = min(system.retries, S3_TRIES)
        return system
    except ImportError as error:
        wanted = [PACKAGES.get(part.partition("://")[0], "") for part in url.split("::")]
        package = " ".join(filter(None, wanted)) or error.name or "fsspec"
        raise UserError(f"{url}: needs a package that is not installed; pip install {package}") from error
    except FileNotFoundError as error:
        raise UserError(f"{url}: the archive is not there; check its path") from error
    except BadZipFile as error:
        raise UserError(f"{url}: is no zip archive, or damaged; copy it again") from error
    except (OSError, ValueError) as error:
        if protocol in known_implementations:
            if "range requests" in str(error):
                raise UserError(f"{url}: cannot be read in parts from that server; download the archive") from error
            raise UserError(f"{url}: cannot be opened ({reason(error)}); {remedy(url, error)}") from error
        known = ", ".join(sorted(set(known_implementations) & {*PACKAGES, "zip"}))
        raise UserError(f"{url}: {protocol}:// is not known; known are {known}") from error


_recent: OrderedDict[tuple[str, str], tuple[float, bytes]] = OrderedDict()
_recent_lock = threading.Lock()


def _remember(file: Remote, content: bytes) -> None:
    with _recent_lock:
        _recent[str(file), file.stamp] = time.monotonic(), content
        size = sum(len(kept) for _, kept in _recent.values())
        while size > RECENT_BYTES:
            size -= len(_recent.popitem(last=False)[1][1])


def bytes_of(file: Remote) -> int:
    """The size of a file, from the listing, a recent fetch or the store. Errors as of `tried`."""
    with _recent_lock:
        _, content = _recent.get((str(file), file.stamp), (0.0, None))
    if file.size is not None:
        return file.size
    return len(content) if content is not None else looked_up(file).size or 0


def fetch(file: Remote) -> bytes:
    """The bytes of a file, those of a few recent ones without asking again. Errors as of `tried`."""
    with _recent_lock:
        fetched, content = _recent.get((str(file), file.stamp), (0.0, b""))
    if fetched and (file.stamp or time.monotonic() - fetched < RECENT_S):
        return content
    content = tried(lambda: _read(file))
    _remember(file, content)
    return content


def fetched(items: Sequence[tuple[Item, File]]) -> Iterator[tuple[Item, File]]:
    """The items with their files, in order; those in stores are fetched ahead, so that reading them does not wait."""
    if not any(isinstance(file, Remote) for _, file in items):
        yield from items
        return

    def fetch_one(item: tuple[Item, File]) -> tuple[Item, File]:
        with suppress(OSError, ValueError, UserError):  # whoever reads it learns of it
            if isinstance(item[1], Remote) and (item[1].size or 0) <= LARGE_BYTES:
                fetch(item[1])
        return item

    yield from ahead(fetch_one, items, threads=FETCHED, waiting=FETCHED)


def _read(file: Remote, start: int = 0, end: int | None = None) -> bytes:
    """The bytes of a file, or those from `start` to `end`; all of them where the store cannot be asked for less."""
    asked = file.size if end is None else end - start
    if file.offset is not None and file.size is not None:
        archive, first = place(file.archive), file.offset + start
        last = first + (file.size if end is None else end - start)
        if isinstance(archive, Remote):
            system, path = filesystem(archive)
            content = system.cat_file(path, start=first, end=last)
            if len(content) > last - first:  # a server that sends whole files alone
                content = content[first:last]
        else:
            with open(archive, "rb") as opened:
                opened.seek(first)
                content = opened.read(last - first)
    else:
        system, path = filesystem(file)
        content = system.cat_file(path) if end is None else system.cat_file(path, start=start, end=end)
    if asked is not None and len(content) < asked:
        raise OSError(errno.EIO, f"{len(content)} of {asked} bytes came")
    return content


def open_store(file: Remote, *, sparse: bool = False) -> BinaryIO:
    """Open a file for reading from any place in it. Errors as of `tried`, also while it is read.

    sparse: little of it will be read; else one of at most LARGE_BYTES is fetched whole, in an archive more.
    """
    with _recent_lock:
        recent = (str(file), file.stamp) in _recent
    if sparse and not recent and file.size is None:
        file = looked_up(file)
    size, packed = file.size or 0, file.protocol in ARCHIVES and file.offset is None  # of which no ranges are to be had
    if size <= (RECENT_BYTES if packed else SMALL_BYTES if sparse and not recent else LARGE_BYTES):
        return io.BytesIO(fetch(file))
    if packed:
        system, path = filesystem(file)
        return tried(lambda: system.open(path, "rb"))
    block = SPARSE_BLOCK_BYTES if sparse else BLOCK_BYTES
    return io.BufferedReader(Ranges(lambda start, end: tried(lambda: _read(file, start, end)), size, block))


def put(file: Remote, content: bytes | Path) -> None:
    """Write a file whole or not at all, from its bytes or from a file on this disk. WriteError where the store does not
    take it."""
    if file.archive:
        raise WriteError(f"{file}: cannot be written, because it lies in an archive; give a folder outside of it")
    system, path = filesystem(file)

    def send() -> None:
        if isinstance(content, bytes):
            system.pipe_file(path, content)
        else:
            system.put_file(str(content), path)

    def write() -> None:
        try:
            send()
        except FileNotFoundError:  # stores with real folders
            if file.protocol in BUCKETS:
                raise
            system.makedirs(system._parent(path), exist_ok=True)
            send()

    try:
        tried(write)
    except NotImplementedError as error:
        raise WriteError(f"{file}: {file.protocol}:// cannot be written to; give a store that takes files") from error
    except (OSError, ValueError) as error:
        raise WriteError(f"{file}: cannot be written ({reason(error)}); {remedy(file, error)}") from error
    with _recent_lock:
        _recent.pop((str(file), file.stamp), None)
    if isinstance(content, bytes):
        _remember(file, content)


def remove(file: Remote) -> None:
    """Remove a file, if it is there."""
    system, path = filesystem(file)
    try:
        tried(lambda: system.rm_file(path))
    except FileNotFoundError:
        return


def entries(folder: Remote) -> Iterator[tuple[Remote, bool]]:
    """List what lies in a folder: (file or folder, whether it is a folder), in no order.

    FileNotFoundError where there is none such; OSError and ValueError where the store does not list it.
    """
    system, path = filesystem(folder)
    top = path.strip("/")
    tried(lambda: system.invalidate_cache(path))  # asks the hub, for hf://
    web = folder.protocol in ("http", "https")
    for info in tried(lambda: system.ls(f"{top}/" if web else path, detail=True)):
        name = info["name"].strip("/")
        below = name[len(top) :].lstrip("/")
        # a web page links to anything; stores mark folders by an empty file of their name
        if not below or not name.startswith(top) or "/" in below or (re.search("[?#]", below) and web):
            continue
        if info["type"] in ("file", "directory"):
            child = folder / below
            yield Remote(child, info.get("size"), stamp_of(info)), info["type"] == "directory"
    system.invalidate_cache(path)  # a listing of millions is kept once


def sizes_below(folder: Remote) -> dict[Remote, int]:
    """The files anywhere below a folder, and their bytes; none where there is no such folder."""
    system, path = filesystem(folder)
    tried(lambda: system.invalidate_cache(path))
    try:
        infos = tried(lambda: system.find(path, detail=True))
    except FileNotFoundError:
        return {}
    top = path.strip("/")
    return {folder / name.strip("/")[len(top) :].lstrip("/"): info.get("size") or 0 for name, info in infos.items()}


def looked_up(file: Remote) -> Remote:
    """A file with its size and stamp, which takes one request. FileNotFoundError where there is none such."""
    system, path = filesystem(file)
    info = tried(lambda: system.info(path))
    if info["type"] != "file":
        raise FileNotFoundError(errno.ENOENT, "no such file", str(file))
    return Remote(file, info.get("size"), stamp_of(info))


def stamp_of(info: dict[str, Any]) -> str:
    """Text that changes with the bytes of a file, from its entry in a listing."""
    return next((f"{name} {info[name]}" for name in STAMPS if info.get(name)), "")
