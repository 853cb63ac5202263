"""A run's curves for TensorBoard, where that is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import UserError


def require_tensorboard() -> None:
    """UserError where it is missing: known before hours are spent."""
    try:
        import torch.utils.tensorboard  # noqa: F401 - it imports the package and raises without it
    except ImportError as error:
        raise UserError("--log tensorboard: the package is not installed; pip install tensorboard, or leave the flag out") from error


class Board:
    """Event files in `folder`: one series for every figure and head.

    first: the step a resumed run goes on from; what an earlier process wrote beyond it is no longer shown.
    """

    def __init__(self, folder: Path, first: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=first + 1 if first else None)

    def add(self, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if isinstance(value, float):
                self.writer.add_scalar(f"{name}/{record['head']}", value, record["step"])

    def close(self) -> None:
        self.writer.close()
