"""A run's curves for TensorBoard, if it is installed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UserError, WriteError

FLUSH_S = 10  # lag of the page behind the run


def require_tensorboard() -> None:
    """Raise UserError if TensorBoard is missing, before the run starts."""
    try:
        import torch.utils.tensorboard  # noqa: F401 - it imports the package and raises without it
    except ImportError as error:
        raise UserError(
            "--log tensorboard: the package is not installed; "
            'pip install "smooseg_fast[tensorboard]", or leave the flag out'
        ) from error


class Board:
    """Event files in `folder`, one series for every figure and head.

    Writes the `records` that a resumed run kept again, and hides those of an earlier process: it may have gone beyond
    them, or have been killed before the last of them was on disk.
    """

    def __init__(self, folder: Path, records: Iterable[dict[str, Any]]):
        from torch.utils.tensorboard import SummaryWriter

        with disk_errors(folder):
            self.writer = SummaryWriter(str(folder), purge_step=0, flush_secs=FLUSH_S)
        self.add(records)

    def add(self, records: Iterable[dict[str, Any]]) -> None:
        with disk_errors(self.writer.log_dir):
            for record in records:
                for name in (name for name, value in record.items() if isinstance(value, float)):
                    self.writer.add_scalar(f"{name}/{record['head']}", record[name], record["step"])

    def close(self) -> None:
        with disk_errors(self.writer.log_dir):
            self.writer.close()


@contextmanager
def disk_errors(folder: str | Path) -> Iterator[None]:
    """Turn a full disk into a WriteError; the writer's thread meets it, and the next call raises it."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"{folder}: cannot be written ({error.strerror or error}); free some space") from error
