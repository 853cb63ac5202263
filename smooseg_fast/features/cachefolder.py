"""Manage the folder of all feature stores: list them, note who uses which, remove some when there is no room.

A store is a folder named by the hash of everything that decides its features. It holds the shards, `meta.json` for
people, the file `used`, whose time says when the store was last opened and on which every reader has a shared lock,
and, while shards are made, the file `writing`, locked by the one process that makes them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import UserError, WriteError
from ..system.files import LEFTOVER, default_cache, regular
from ..system.locks import Lock
from ..system.progress import say
from ..system.sizes import readable
from .store import FORMAT, SHARDS

KEY = re.compile(r"[0-9a-f]{32}")
META, USED, WRITING = "meta.json", "used", "writing"
REMOVAL_S = 0.02  # between looks at a store that is being removed


@dataclass(frozen=True)
class StoreFolder:
    """One store, whether or not it is on disk yet."""

    path: Path

    @property
    def key(self) -> str:
        return self.path.name

    def shards(self) -> list[Path]:
        """The files in the order of their numbers; some may be missing."""
        return sorted(self.path.glob(SHARDS))

    def kept(self, total: int) -> int:
        """How many of `total` shards are on disk, whether sound or damaged."""
        numbers = [path.stem.removeprefix("shard-") for path in self.shards()]
        return sum(number.isdecimal() and int(number) < total for number in numbers)

    @property
    def nbytes(self) -> int:
        """Size of all its files; those that cannot be seen count nothing."""
        total = 0
        for path in self.path.glob("*"):
            with contextlib.suppress(OSError):  # removed meanwhile
                total += path.stat().st_size
        return total

    @property
    def last_used(self) -> float:
        """Seconds since 1970; 0 if unknown."""
        for name in (USED, "."):
            with contextlib.suppress(OSError):
                return (self.path / name).stat().st_mtime
        return 0.0

    @cached_property
    def meta(self) -> dict[str, Any]:
        """The content of meta.json; empty if it cannot be read."""
        try:
            meta = json.loads(regular(self.path / META).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return meta if isinstance(meta, dict) else {}

    @property
    def readable(self) -> bool:
        """True when this version of the format wrote it, as far as meta.json tells."""
        return self.meta.get("format", FORMAT) == FORMAT

    @property
    def label(self) -> str:
        """Its name in messages."""
        return f"{self.meta.get('dataset', 'an unknown dataset')}, {self.key[:8]}"

    # who uses it

    def use(self) -> Lock:
        """Mark it as used now, and make the folder. Nobody removes it while the lock is held."""
        lock = Lock(self.path / USED)
        while not lock.take(shared=True):
            time.sleep(REMOVAL_S)  # somebody is removing it
        with contextlib.suppress(OSError):  # another user's file
            os.utime(lock.path)
        return lock

    @property
    def in_use(self) -> bool:
        lock = Lock(self.path / USED)
        if not lock.path.exists():
            return False
        free = lock.take()
        lock.release()
        return not free

    def remove(self) -> int | None:
        """Remove it -> the bytes freed, or None when it is in use.

        Other files in its folder stay. WriteError when it cannot.
        """
        lock = Lock(self.path / USED)
        if not lock.take():
            return None
        try:
            before = self.nbytes
            for path in list(self.path.iterdir()):
                if path.match(SHARDS) or path.name in (META, WRITING) or LEFTOVER.fullmatch(path.name):
                    path.unlink(missing_ok=True)
            lock.path.unlink(missing_ok=True)  # last: while it is there, nobody opens the store
            freed = before - self.nbytes
        except OSError as error:
            raise WriteError(
                f"{self.path}: cannot be removed ({error.strerror or error}); remove it as the user who owns it"
            ) from error
        finally:
            lock.release()
        with contextlib.suppress(OSError):  # it holds other files, or somebody has just opened it
            self.path.rmdir()
        return freed


class CacheFolder:
    """All stores in `path`, by default $XDG_CACHE_HOME/smooseg_fast or ~/.cache/smooseg_fast."""

    def __init__(self, path: Path | str | None = None):
        self.path = default_cache() if path is None else Path(path).expanduser()

    def stores(self) -> list[StoreFolder]:
        """All stores, the most recently used first. UserError where the folder cannot be read."""
        try:
            stores = [StoreFolder(path) for path in self.path.iterdir() if KEY.fullmatch(path.name) and path.is_dir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(
                f"--cache {self.path}: cannot be read ({error.strerror or error}); give a folder of features"
            ) from error
        return sorted(stores, key=lambda store: (-store.last_used, store.key))

    def make_room(self, nbytes: int, limit: int, keep: StoreFolder) -> int:
        """Remove other stores until `nbytes` more can be written into `keep` below the `limit` of all.

        The least recently used go first, and none that is in use. -> bytes by which all will exceed the limit.
        """
        excess = sum(store.nbytes for store in self.stores()) + nbytes - limit
        for store in reversed(self.stores()):
            if excess <= 0:
                break
            label, freed = store.label, None
            with contextlib.suppress(WriteError):  # another user's store
                freed = None if store == keep else store.remove()
            if freed is not None:
                excess -= freed
                say(
                    f"removed: features of {label} ({readable(freed)}), the least recently used, "
                    f"to stay below --cache-limit {readable(limit)}"
                )
        return max(0, excess)
