"""The folder of all feature stores: what is in it, who uses what, what goes when there is no room.

Every store is a folder named by the hash of what it depends on. In it are the shards, `meta.json` for people, the file `used`, whose time
tells when the store was opened last and on which everybody who reads it has a shared lock, and, while shards are made, `writing`, locked
by the one process that makes them.
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
from ..system.files import LEFTOVER, write_json
from ..system.locks import Lock
from .store import FORMAT, SHARDS, DamagedShard, read_shard, shard_path

KEY = re.compile(r"[0-9a-f]{32}")
META, USED, WRITING = "meta.json", "used", "writing"


@dataclass(frozen=True)
class StoreFolder:
    """One store on disk, whether or not it is there yet."""

    path: Path

    @property
    def key(self) -> str:
        return self.path.name

    def shards(self) -> list[Path]:
        """In the order of their numbers, of which some may be missing."""
        return sorted(self.path.glob(SHARDS), key=lambda path: (len(path.name), path.name))

    @property
    def nbytes(self) -> int:
        """Of all that is in it."""
        total = 0
        with contextlib.suppress(OSError), os.scandir(self.path) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    total += entry.stat().st_size
        return total

    @property
    def last_used(self) -> float:
        """Seconds since 1970; 0 where nobody knows."""
        for name in (USED, META, "."):
            with contextlib.suppress(OSError):
                return (self.path / name).stat().st_mtime
        return 0.0

    @cached_property
    def meta(self) -> dict[str, Any]:
        """What `describe` wrote, for people; empty where it cannot be read."""
        try:
            found = json.loads((self.path / META).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def readable(self) -> bool:
        """Whether this version wrote it, as far as one can tell."""
        return self.meta.get("format", FORMAT) == FORMAT

    @property
    def label(self) -> str:
        """For lines about it."""
        return f"{self.meta.get('dataset', 'an unknown dataset')}, {self.key[:8]}"

    def describe(self, meta: dict[str, Any]) -> None:
        write_json(self.path / META, meta)

    def images(self) -> int:
        """Whose features are there: up to the end of the last shard, if none before it is missing."""
        found = self.shards()
        if not found or found != [shard_path(self.path, number) for number in range(len(found))]:
            return 0
        try:
            last = read_shard(found[-1])
        except DamagedShard:
            return 0
        return 0 if last is None else last.contents.end[0]

    # who uses it

    def use(self) -> Lock:
        """Marks it as used now; nobody removes it while the lock is held. Makes the folder."""
        lock = Lock(self.path / USED)
        while not lock.take(shared=True):
            time.sleep(0.02)  # somebody is removing it
        with contextlib.suppress(OSError):  # another user's
            os.utime(lock.path)
        return lock

    def writer(self) -> Lock:
        """Not taken yet."""
        return Lock(self.path / WRITING)

    @property
    def in_use(self) -> bool:
        lock = Lock(self.path / USED)
        if not lock.path.exists():
            return False
        free = lock.take()
        lock.release()
        return not free

    def remove(self) -> int | None:
        """-> the bytes freed; None when it is in use. What is not of a store stays. WriteError when it cannot be removed."""
        lock = Lock(self.path / USED)
        if not lock.take():
            return None
        try:
            before = self.nbytes
            for path in list(self.path.iterdir()):
                if path.match(SHARDS) or path.name in (META, WRITING) or LEFTOVER.fullmatch(path.name):
                    path.unlink(missing_ok=True)
            (self.path / USED).unlink(missing_ok=True)  # last: until then nobody comes in
            freed = before - self.nbytes
        except OSError as error:
            raise WriteError(
                f"{self.path}: cannot be removed ({error.strerror or error}); remove it as the user who owns it"
            ) from error
        finally:
            lock.release()
        with contextlib.suppress(OSError):  # something else is in it, or somebody has just come
            self.path.rmdir()
        return freed


class CacheFolder:
    """All stores in `path`, by default $XDG_CACHE_HOME/smooseg_fast or ~/.cache/smooseg_fast; `limit` in bytes, None for none."""

    def __init__(self, path: Path | str | None = None, limit: int | None = None):
        self.path, self.limit = default_cache() if path is None else Path(path).expanduser(), limit
        self._passed = False

    def store(self, key: str) -> StoreFolder:
        return StoreFolder(self.path / key)

    def stores(self) -> list[StoreFolder]:
        """The last used first. UserError where the folder cannot be read."""
        try:
            found = [StoreFolder(path) for path in self.path.iterdir() if KEY.fullmatch(path.name) and path.is_dir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(
                f"--cache {self.path}: cannot be read ({error.strerror or error}); give a folder of features"
            ) from error
        return sorted(found, key=lambda store: (-store.last_used, store.key))

    def make_room(self, nbytes: int, keep: StoreFolder) -> tuple[list[tuple[str, int]], int]:
        """Before `nbytes` more are written into `keep`: removes other stores, the longest unused first, none that is in use.

        -> what was removed, with the bytes it freed; and by how many bytes the limit is passed all the same, the first time that it is.
        """
        if self.limit is None:
            return [], 0
        removed, excess = [], sum(store.nbytes for store in self.stores()) + nbytes - self.limit
        if excess > 0:
            for store in reversed([store for store in self.stores() if store != keep]):
                label, freed = store.label, None
                with contextlib.suppress(WriteError):  # another user's
                    freed = store.remove()
                if freed is not None:
                    removed.append((label, freed))
                    excess -= freed
                if excess <= 0:
                    break
        if excess <= 0 or self._passed:
            return removed, 0
        self._passed = True
        return removed, excess


def default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "smooseg_fast"
