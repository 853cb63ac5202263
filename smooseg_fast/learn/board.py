"""A run's curves for TensorBoard, where that is installed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UserError, WriteError

FLUSH_S = 10  # what is shown lags behind by as much


def require_tensorboard() -> None:
    """UserError where it is missing: known before hours are spent."""
    try:
        import torch.utils.tensorboard  # noqa: F401 - it imports the package and raises without it
    except ImportError as error:
        raise UserError(
            '--log tensorboard: the package is not installed; pip install "smooseg_fast[tensorboard]", or leave the flag out'
        ) from error


class Board:
    """Event files in `folder`: one series for every figure and head.

    records: those that a resumed run has kept. They are written again, and what an earlier process wrote is no longer shown: it may have
    gone beyond them, or have been killed before the last of them was on the disk.
    """

    def __init__(self, folder: Path, records: Iterable[dict[str, Any]]):
        from torch.utils.tensorboard import SummaryWriter

        with said(folder):
            self.writer = SummaryWriter(str(folder), purge_step=0, flush_secs=FLUSH_S)
        self.add(records)

    def add(self, records: Iterable[dict[str, Any]]) -> None:
        with said(self.writer.log_dir):
            for record in records:
                for name, value in record.items():
                    if isinstance(value, float):
                        self.writer.add_scalar(f"{name}/{record['head']}", value, record["step"])

    def close(self) -> None:
        with said(self.writer.log_dir):
            self.writer.close()


@contextmanager
def said(folder: str | Path) -> Iterator[None]:
    """A full disk as a WriteError: the writer's thread meets it, and the next call raises it."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"{folder}: cannot be written ({error.strerror or error}); free some space") from error
