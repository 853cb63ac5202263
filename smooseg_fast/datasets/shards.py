"""Tar files as WebDataset packs them (shard-{000..010}.tar): samples are files whose names begin alike.

An index of offsets, kept in the cache, makes every image one read at a known place, in any order. Compressed tar files
have no such places.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ..errors import UserError
from ..system.ahead import ahead
from ..system.files import default_cache, regular, write_atomic
from ..system.patience import reason, remedy, tried
from ..system.stores import File, Remote, filesystem, looked_up, place
from . import formats
from .imageerror import reason as decoding_reason

FORMAT = 1  # of an index
MOST = 100_000  # tar files of a set
THREADS = 8  # that index them
BLOCK_BYTES = 2**23  # that are read ahead while a remote tar file is indexed
BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{},]*(?:,[^{},]*)+))\}")
ROLES = {"seg", "mask", "label", "labels", "labelmap", "segmentation", "gt", "annotation"}  # as in KEY.seg.png

Entry = tuple[str, int, int]  # name, offset of the bytes, their number


def expanded(pattern: str) -> Iterator[str]:
    """The names that a pattern with braces stands for: {000..010} counts, {a,b} lists."""
    match = BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    if match[3] is None:
        numbers = range(int(match[1]), int(match[2]) + 1)
        words: Iterable[str] = (f"{number:0{len(match[1])}}" for number in numbers)
    else:
        words = match[3].split(",")
    for word in words:
        yield from expanded(pattern[: match.start()] + word + pattern[match.end() :])


def archives_of(path: File) -> list[File]:
    """The tar files that a path, URL or pattern with braces names; none where it names something else."""
    if not path.suffix.lower().endswith(".tar") or (isinstance(path, Path) and path.is_dir()):
        return []
    archives: list[File] = []
    for name in expanded(str(path)):
        archives.append(place(name))
        if len(archives) > MOST:
            raise UserError(f"{path}: names more than {MOST:,} tar files; give fewer")
    return archives


def members(archives: Sequence[File], argument: str) -> dict[str, Remote]:
    """The files in tar files by name, sorted. Of samples with labels, images/ and labels/ hold image and mask.

    UserError for a tar file that is missing, damaged or compressed.
    """
    samples: dict[str, dict[str, Remote]] = defaultdict(dict)  # by key, then by what follows it
    with closing(ahead(lambda archive: index(archive, argument), archives, threads=THREADS, waiting=THREADS)) as found:
        for archive, (stamp, entries) in zip(archives, found):
            stem = f"{archive.stem}/" if len(archives) > 1 else ""
            for name, offset, size in entries:
                path = PurePosixPath(name)
                if not path.name.startswith("."):
                    key, dot, ending = path.name.partition(".")
                    file = Remote(f"tar://{name}::{archive}", size, f"{stamp} {offset}", offset)
                    samples[stem + path.with_name(key).as_posix()][dot + ending] = file
    pairs = {key: pair for key, files in samples.items() if (pair := pair_of(files))}
    named = {}
    for key, files in samples.items():
        for ending, file in files.items():
            folder, suffix = "images/" if pairs else "", ending
            if ending in pairs.get(key, ()):  # image and mask must have one stem
                folder, suffix = ("images/", "labels/")[pairs[key].index(ending)], last_of(ending)
            named[folder + key + suffix] = file
    return dict(sorted(named.items()))


def pair_of(files: Iterable[str]) -> tuple[str, str] | None:
    """The endings of photo and label mask among those of a sample: .jpg and .seg.png, or .jpg and .png."""
    images = [ending for ending in files if last_of(ending).lower() in formats.photo_suffixes()]
    masks = [ending for ending in images if ROLES & set(ending.lower().split("."))]
    masks = masks or [ending for ending in images if ending.lower() == ".png"]
    photos = [ending for ending in images if ending not in masks]
    return (photos[0], masks[0]) if photos and masks else None


def last_of(ending: str) -> str:
    """The suffix of a file in its ending: .png in .seg.png."""
    return f".{ending.rpartition('.')[2]}"


def index(archive: File, argument: str) -> tuple[str, list[Entry]]:
    """(text that changes with a tar file, the regular files in it); from the cache where it was indexed before."""
    try:
        if isinstance(archive, Remote):
            archive = looked_up(archive)
            stamp = f"{archive.size} {archive.stamp}"
        else:
            status = archive.stat()
            stamp = f"{status.st_size} {status.st_mtime_ns}"
        state = f"{archive if isinstance(archive, Remote) else archive.absolute()} {stamp}"
        known = default_cache() / f"tar-{hashlib.sha256(state.encode(errors='surrogateescape')).hexdigest()[:32]}.json"
        with suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads(known.read_text(encoding="utf-8"))
            if content["format"] == FORMAT and content["tar"] == state:
                return stamp, [(str(name), int(offset), int(size)) for name, offset, size in content["files"]]
        if isinstance(archive, Remote):
            system, path = filesystem(archive)
            options = {"block_size": BLOCK_BYTES, "cache_type": "readahead"}
            entries = tried(lambda: _entries(lambda: system.open(path, "rb", **options)))
        else:
            entries = _entries(lambda: regular(archive).open("rb"))
    except FileNotFoundError as error:
        what = "no such file, or the server does not give it" if str(archive).startswith("http") else "no such file"
        raise UserError(f"{argument} {archive}: {what}; give tar files that are there") from error
    except tarfile.TarError as error:
        advice = "copy it again, and unpack .gz: only plain tar files have images at known places"
        raise UserError(f"{argument} {archive}: is no whole tar file ({decoding_reason(error)}); {advice}") from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{argument} {archive}: cannot be read ({reason(error)}); {remedy(str(archive), error)}"
        ) from error
    with suppress(UserError):  # a cache that cannot be written
        write_atomic(known, json.dumps({"format": FORMAT, "tar": state, "files": entries}))
    return stamp, entries


def _entries(opened: Callable[[], BinaryIO]) -> list[Entry]:
    with opened() as file, tarfile.open(fileobj=file, mode="r:") as tar:
        return [(entry.name, entry.offset_data, entry.size) for entry in tar if entry.isreg() and not entry.issparse()]
