"""Output folders: which settings a folder belongs to, what in it smooseg wrote, and which work in it is done."""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from ..errors import UserError, WriteError
from .ahead import ahead
from .files import ABANDONED_S, HOST, finite, read_text, sweep, write_atomic, write_json
from .locks import Lock
from .progress import say
from .stores import File, Remote, fetch, remove, sizes_below

FLUSH_S = 10.0  # between objects of a journal in a store: what a killed process may have to compute again
THREADS = 16  # that read these objects
LOCK = ".lock"
MARKER = ".smooseg"
MARKER_TEXT = "smooseg wrote the files and folders named below, and ignores them when it looks for images."


class HoldsAnotherRun(UserError):
    """The folder `path` belongs to a run in which the setting `name` is `recorded`, and not `asked`."""

    def __init__(self, path: File, name: str, recorded: Any, asked: Any):
        self.name, self.recorded, self.asked = name, recorded, asked
        there, here = ("not set" if value is None else repr(value) for value in (recorded, asked))
        super().__init__(
            f"--out {path}: holds another run ({name} is {there} there and {here} here); "
            "give another folder, or the same settings to resume"
        )


class OutFolder:
    """A folder that belongs to one set of settings and records them as JSON: the same resume there, others are refused.

    It may lie in a store. Every file appears there whole or not at all, because a store shows an object once all its
    bytes are there. A store has no locks, so two commands must not write into one folder at the same time.

    Args:
        path: the folder given as --out; need not exist.
        settings: everything that decides the content, ready for JSON.
        record: name of the JSON file.
        outputs: names of the files and folders that the command writes into it. One of them without the record
            belongs to somebody else. Once the folder is claimed, nothing by these names counts as an image to read.
        below: names of the folders in it that are written into.

    Raises:
        UserError: when the folder belongs to other settings or holds somebody else's files.
    """

    def __init__(
        self, path: File, settings: dict[str, Any], *, record: str, outputs: Sequence[str], below: Sequence[str] = ()
    ):
        self.path = cast(Path, path)  # a Remote has the same attributes
        self.settings = finite(settings)
        self.recorded: dict[str, Any] = {}  # in the folder, before `claim`
        self._record, self._outputs, self._below = record, outputs, below
        self._require_ours()

    def _require_ours(self) -> None:
        """UserError where the folder belongs to other settings or holds somebody else's files."""
        path, record = self.path, self._record
        try:
            self.recorded = {**json.loads(read_text(path / record))}
        except FileNotFoundError:
            if foreign := [name for name in self._outputs if (path / name).exists()]:
                raise UserError(f"--out {path}: holds {foreign[0]} but no {record}; give another folder") from None
            return
        except (OSError, TypeError, ValueError, RecursionError) as error:
            why = f"{record}: {getattr(error, 'strerror', None) or error}"
            raise UserError(f"--out {path}: cannot be read ({why}); give another folder") from error
        for name, value in self.settings.items():
            if self.recorded.get(name) != value:
                raise HoldsAnotherRun(path, name, self.recorded.get(name), value)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes out of the folder, see `held`. UserError when one of them made it another run's."""
        with held(self.path):
            self._require_ours()
            yield

    def claim(self) -> None:
        """Record the settings, mark what will be written, and remove half-written files of a killed process.

        Call it as late as possible, so that a run that fails early leaves nothing behind.
        """
        sweep(self.path)
        for name in self._below:
            sweep(self.path / name, below=True)
        write_json(self.path / self._record, self.settings)
        mark_as_ours(self.path, *self._outputs)


@contextmanager
def held(path: File, flag: str = "--out") -> Iterator[None]:
    """Keep other processes out of the folder at `path`, which is made, and removed again at the end if it is empty.

    UserError, naming the `flag`, when another process is at work there, or when the folder cannot be written. In a
    store it does nothing.
    """
    if isinstance(path, Remote):
        yield
        return
    new_folders = [folder for folder in (path, *path.parents) if not folder.exists()]
    lock = Lock(path / LOCK)
    try:
        try:
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
        except OSError as error:
            raise UserError(f"{flag} {path}: cannot be written ({error.strerror}); give another folder") from error
        if not lock.take():
            why = f"{lock.signature()} is at work there; wait until it ends, or give another folder"
            raise UserError(f"{flag} {path}: {why}")
        lock.sign()
        yield
    finally:
        lock.release(remove=True)
        for folder in new_folders:
            with suppress(OSError):
                folder.rmdir()


def mark_as_ours(folder: File, *names: str) -> None:
    """Add `names` to the MARKER of `folder`, so that smooseg never takes its own pictures there for images to segment.

    The marker names files instead of standing for the whole folder: photos in the same folder are still read. Makes the
    folder, and removes temporary files of killed processes in it; WriteError when it cannot be written.
    """
    sweep(folder, older=ABANDONED_S)
    known = written_by_us(folder)
    if not known.issuperset(names):
        write_atomic(folder / MARKER, "\n".join([MARKER_TEXT, *sorted(known.union(names))]) + "\n")


def written_by_us(folder: File) -> set[str]:
    """Names that the MARKER of `folder` lists; none without a marker that can be read."""
    lines = []
    with suppress(OSError):
        lines = read_text(folder / MARKER, "replace").splitlines()
    return set(lines[1:]) if lines[:1] == [MARKER_TEXT] else set()


def contents(folder: File) -> set[Path]:
    """The files and folders in a local folder."""
    return set() if isinstance(folder, Remote) else set(folder.glob("*"))


class Journal:
    """A file with one JSON object a line, appended to as things get done: a stop loses at most the last line."""

    def __init__(self, path: str | Path):
        self.path = cast(Path, path)

    @classmethod
    def at(cls, path: str | Path) -> Journal:
        """The journal of this name, on a disk or in a store."""
        return StoreJournal(path) if isinstance(path, Remote) else cls(path)

    def read(self, legal: Callable[[dict[str, Any]], bool] = bool) -> list[dict[str, Any]]:
        """Return the records that are `legal`. Leaves out a last line that a stop or a full disk cut short.

        Lines in front of it are damaged where they are no such record; says how many, because their work is lost.
        UserError when the file cannot be read.
        """
        try:
            texts = self._texts()
        except OSError as error:
            why = f"cannot be read ({error.strerror or error}); change its permissions, or remove it"
            raise UserError(f"{self.path}: {why}") from error
        records, damaged = [], 0
        for lines in (text.split("\n") for text in texts):
            for number, line in enumerate(lines, 1):
                record = None
                with suppress(ValueError, RecursionError):
                    record = json.loads(line)
                if isinstance(record, dict) and legal(record):
                    records.append(record)
                else:
                    damaged += bool(line.strip()) and number < len(lines)
        if damaged:
            say(f"damaged: {self.path}: {damaged} of its lines are not as they were written, and are left out")
        return records

    def _texts(self) -> list[str]:
        try:
            return [read_text(self.path, "replace")]
        except FileNotFoundError:
            return []

    def rewrite(self, records: Iterable[dict[str, Any]]) -> None:
        """Replace the file. Call it before the first `append`, whose record would glue to a line that was cut short."""
        write_atomic(self.path, self._lines(records))

    def append(self, *records: dict[str, Any]) -> None:
        """Add `records` at the end. WriteError when the disk is full."""
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(self._lines(records))
        except OSError as error:
            raise WriteError(f"{self.path}: cannot be written ({error.strerror or error}); free some space") from error

    def flush(self) -> None:
        """Make all records visible to others."""

    @staticmethod
    def _lines(records: Iterable[dict[str, Any]]) -> str:
        return "".join(json.dumps(finite(record)) + "\n" for record in records)


class StoreJournal(Journal):
    """A journal in a store, where nothing can be appended to: an object with the records of every FLUSH_S, in a folder
    next to `path`. A process that is killed loses the records since the last one. Threads may append at once."""

    def __init__(self, path: Remote):
        super().__init__(path)
        self._parts = path.parent / path.stem
        self._lock, self._waiting, self._flushed = threading.Lock(), "", time.monotonic()

    def _texts(self) -> list[str]:
        parts = sorted(sizes_below(self._parts))  # by time
        with closing(ahead(fetch, parts, threads=THREADS, waiting=2 * THREADS)) as contents:
            return [*super()._texts(), *(content.decode("utf-8", "replace") for content in contents)]

    def rewrite(self, records: Iterable[dict[str, Any]]) -> None:
        parts = sizes_below(self._parts)
        super().rewrite(records)
        for part in parts:
            remove(part)

    def append(self, *records: dict[str, Any]) -> None:
        with self._lock:
            self._waiting += self._lines(records)
            if time.monotonic() - self._flushed >= FLUSH_S:
                self._write()

    def flush(self) -> None:
        with self._lock:
            self._write()

    def _write(self) -> None:
        if self._waiting:
            write_atomic(self._parts / f"{time.time_ns():020}-{HOST}-{os.getpid()}.jsonl", self._waiting)
        self._waiting, self._flushed = "", time.monotonic()
