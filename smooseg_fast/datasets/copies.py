"""Image files of the same bytes."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from .base import Dataset, Files

MOST = 20_000  # files of equal sizes that are compared
BLOCK_BYTES = 4096  # at the start, the middle and the end, which nearly always differ
READ_BYTES = 2**31  # that are read to be sure, altogether


def copies_notes(train: Dataset, val: Dataset | None) -> list[str]:
    """Say how many images are there more than once, and how many of those held out are learnt from."""
    if not isinstance(train, Files):
        return []
    held_out = set(_local(val)) if isinstance(val, Files) and val.held_out else set()
    learnt = set(_local(train))
    repeated, leaked = [], []
    for group in same_bytes(sorted(learnt | held_out, key=lambda path: (len(path.name), path))):
        ours = [path for path in group if path in learnt]
        repeated += [(path, ours[0]) for path in ours[1:]]
        leaked += [(path, ours[0]) for path in group if ours and path in held_out - learnt]
    notes = []
    if repeated:
        (first, original), *_ = repeated
        notes.append(
            f"{len(repeated)} of {len(learnt)} images are copies of others (the same bytes), first {first.name} of "
            f"{original.name}: each is learnt from"
        )
    if leaked:
        (first, original), *_ = leaked
        notes.append(
            f"{len(leaked)} held-out images are copies of training images, first {first.name} of {original.name}: "
            "figures come out too good; take the copies out"
        )
    return notes


def _local(files: Files) -> list[Path]:
    """The images on this machine; those in a store would have to be fetched."""
    return [path for path in files.images if isinstance(path, Path)]


def same_bytes(paths: Sequence[Path]) -> list[list[Path]]:
    """Group the files that hold the same bytes, two or more, in their order; reads the whole of likely copies alone."""
    likely = [group for equal in _groups(paths, _size) for group in _groups(equal[:MOST], _ends)]
    groups: list[list[Path]] = []
    budget = READ_BYTES
    for group in likely:
        budget -= sum(_size(path) or 0 for path in group)
        if budget < 0:
            break
        groups += _groups(group, _digest)
    return groups


def _groups(paths: Iterable[Path], key: Callable[[Path], Hashable]) -> Iterator[list[Path]]:
    """Group files by a key, two or more; leaves out those that have none or cannot be read."""
    groups: dict[Hashable, list[Path]] = defaultdict(list)
    for path in paths:
        with suppress(OSError):
            if (value := key(path)) is not None:
                groups[value].append(path)
    return (group for group in groups.values() if len(group) > 1)


def _size(path: Path) -> int | None:
    return path.stat().st_size or None


def _ends(path: Path) -> bytes:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        blocks = []
        for place in (0, size // 2, max(0, size - BLOCK_BYTES)):
            file.seek(place)
            blocks.append(file.read(BLOCK_BYTES))
    return b"".join(blocks)


def _digest(path: Path) -> bytes:
    digest = hashlib.blake2b()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.digest()
