"""Output folders: which settings a folder belongs to, what in it smooseg wrote, and which work in it is done."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import UserError, WriteError
from .files import ABANDONED_S, finite, regular, sweep, write_atomic, write_json
from .locks import Lock
from .progress import say

LOCK = ".lock"
MARKER = ".smooseg"
MARKER_TEXT = "smooseg wrote the files and folders named below, and ignores them when it looks for images."


class HoldsAnotherRun(UserError):
    """The folder `path` belongs to a run in which the setting `name` is `recorded`, and not `asked`."""

    def __init__(self, path: Path, name: str, recorded: Any, asked: Any):
        self.name, self.recorded, self.asked = name, recorded, asked
        super().__init__(
            f"--out {path}: holds another run ({name} is {recorded!r} there and {asked!r} here); "
            "give another folder, or the same settings to resume"
        )


class OutFolder:
    """A folder that belongs to one set of settings and records them as JSON: the same resume there, others are refused.

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
        self, path: Path, settings: dict[str, Any], *, record: str, outputs: Sequence[str], below: Sequence[str] = ()
    ):
        self.path, self.settings = path, finite(settings)
        self.recorded: dict[str, Any] = {}  # in the folder, before `claim`
        self._record, self._outputs, self._below = record, outputs, below
        self._require_ours()

    def _require_ours(self) -> None:
        """UserError where the folder belongs to other settings or holds somebody else's files."""
        path, record = self.path, self._record
        try:
            self.recorded = {**json.loads(regular(path / record).read_text(encoding="utf-8"))}
        except FileNotFoundError:
            if foreign := [name for name in self._outputs if (path / name).exists()]:
                raise UserError(f"--out {path}: holds {foreign[0]} but no {record}; give another folder") from None
            return
        except (OSError, TypeError, ValueError, RecursionError) as error:
            why = f"{record}: {getattr(error, 'strerror', error)}"
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
def held(path: Path, flag: str = "--out") -> Iterator[None]:
    """Keep other processes out of the folder at `path`, which is made, and removed again at the end if it is empty.

    UserError, naming the `flag`, when another process is at work there, or when the folder cannot be written.
    """
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


def mark_as_ours(folder: Path, *names: str) -> None:
    """Add `names` to the MARKER of `folder`, so that smooseg never takes its own pictures there for images to segment.

    The marker names files instead of standing for the whole folder: photos in the same folder are still read. Makes the
    folder, and removes temporary files of killed processes in it; WriteError when it cannot be written.
    """
    sweep(folder, older=ABANDONED_S)
    known = written_by_us(folder)
    if not known.issuperset(names):
        write_atomic(folder / MARKER, "\n".join([MARKER_TEXT, *sorted(known.union(names))]) + "\n")


def written_by_us(folder: Path | str) -> set[str]:
    """Names that the MARKER of `folder` lists; none without a marker that can be read."""
    lines = []
    with suppress(OSError):
        lines = regular(Path(folder, MARKER)).read_text(encoding="utf-8", errors="replace").splitlines()
    return set(lines[1:]) if lines[:1] == [MARKER_TEXT] else set()


class Journal:
    """A file with one JSON object a line, appended to as things get done: a stop loses at most the last line."""

    def __init__(self, path: Path):
        self.path = path

    def read(self, legal: Callable[[dict[str, Any]], bool] = bool) -> list[dict[str, Any]]:
        """Return the records that are `legal`. Leaves out a last line that a stop or a full disk cut short.

        Lines in front of it are damaged where they are no such record; says how many, because their work is lost.
        UserError when the file cannot be read.
        """
        try:
            lines = regular(self.path).read_text(encoding="utf-8", errors="replace").split("\n")
        except FileNotFoundError:
            return []
        except OSError as error:
            why = f"cannot be read ({error.strerror}); change its permissions, or remove it"
            raise UserError(f"{self.path}: {why}") from error
        records, damaged = [], 0
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

    def rewrite(self, records: Iterable[dict[str, Any]]) -> None:
        """Replace the file. Call it before the first `append`, whose record would glue to a line that was cut short."""
        write_atomic(self.path, "".join(self._line(record) for record in records))

    def append(self, *records: dict[str, Any]) -> None:
        """Add `records` at the end. WriteError when the disk is full."""
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(self._line(record) for record in records))
        except OSError as error:
            raise WriteError(f"{self.path}: cannot be written ({error.strerror or error}); free some space") from error

    @staticmethod
    def _line(record: dict[str, Any]) -> str:
        return json.dumps(finite(record)) + "\n"
