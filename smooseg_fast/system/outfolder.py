"""Output folders that a stopped command goes on in: what they belong to, and what in them is done."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import UserError, WriteError
from .files import finite, sweep, write_atomic, write_json
from .locks import Lock

LOCK = ".lock"


class HoldsAnotherRun(UserError):
    """The folder `path` belongs to a run in which the setting `name` is `there`, and not `here`."""

    def __init__(self, path: Path, name: str, there: Any, here: Any):
        self.path, self.name, self.there, self.here = path, name, there, here
        super().__init__(
            f"--out {path}: holds another run ({name} is {there!r} there and {here!r} here); "
            "give another folder, or the same settings to resume"
        )


class OutFolder:
    """A folder that belongs to one set of settings, kept in a JSON file of it: the same go on there, others are refused.

    Args:
        path: of --out; need not exist.
        settings: what decides the content, ready for JSON.
        record: name of the file that holds them.
        made: names of files and folders in it that are another's when one stands there without the record.
        below: names of the folders in it that are written into.

    Raises:
        UserError: when the folder is another's.
    """

    def __init__(
        self, path: Path, settings: dict[str, Any], *, record: str, made: Sequence[str], below: Sequence[str] = ()
    ):
        self.path, self.settings, self._record, self._below = path, finite(settings), record, below
        try:
            (path / record).exists()
        except OSError as error:  # a folder on the way that this user may not enter
            raise UserError(f"--out {path}: cannot be read ({error.strerror}); give another folder") from error
        if path.exists() and not path.is_dir():
            raise UserError(f"--out {path}: is a file; give a folder")
        if (path / record).exists():
            there = self._read_settings()
            for name, value in self.settings.items():
                if there.get(name) != value:
                    raise HoldsAnotherRun(path, name, there.get(name), value)
        elif there := [name for name in made if (path / name).exists()]:
            raise UserError(f"--out {path}: holds {there[0]} but no {record}; give another folder")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within it no other process has the folder. UserError where one has it already, or where nothing can be written into it.

        Makes the folder; behind it, it is gone again if nothing was left in it.
        """
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        lock = Lock(self.path / LOCK)
        try:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=self.path).close()
            except OSError as error:
                raise UserError(
                    f"--out {self.path}: cannot be written ({error.strerror}); give another folder"
                ) from error
            if not lock.take():
                raise UserError(
                    f"--out {self.path}: {lock.signature()} is at work there; wait until it ends, or give another folder"
                )
            lock.sign()
            yield
        finally:
            lock.release(remove=True)
            for folder in made:
                with suppress(OSError):
                    folder.rmdir()

    def claim(self) -> None:
        """From here on the folder is this run's. Called late: a run that fails before it makes anything leaves nothing behind.

        Half written files of a process that was killed go.
        """
        sweep(self.path)
        for name in self._below:
            sweep(self.path / name, below=True)
        write_json(self.path / self._record, self.settings)

    def _read_settings(self) -> dict[str, Any]:
        try:
            there = json.loads((self.path / self._record).read_text(encoding="utf-8"))
            if not isinstance(there, dict):
                raise ValueError("not a JSON object")
        except (OSError, ValueError) as error:
            raise UserError(
                f"--out {self.path}: its {self._record} cannot be read ({error}); give another folder"
            ) from error
        return there


class Journal:
    """A file with a JSON object a line, appended to as things get done, so that a stop at any time loses at most the last."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """The records, without what a stop or a full disk left half written."""
        records = []
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be read ({error.strerror}); change its permissions, or take it away"
            ) from error
        for line in text.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                records.append(record)
        return records

    def rewrite(self, records: Iterable[dict[str, Any]]) -> None:
        """Before the first `append` of a process: a half line at the end would swallow it."""
        write_atomic(self.path, "".join(self._line(record) for record in records))

    def append(self, *records: dict[str, Any]) -> None:
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(self._line(record) for record in records))
        except OSError as error:
            raise WriteError(f"{self.path}: cannot be written ({error.strerror or error}); free some space") from error

    @staticmethod
    def _line(record: dict[str, Any]) -> str:
        return json.dumps(finite(record)) + "\n"
