"""A run's curves for TensorBoard or Weights & Biases, if they are installed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from ..config import TrainConfig
from ..errors import UserError, WriteError

FLUSH_S = 10  # lag of TensorBoard's page behind the run
# it imports the package and raises without it
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
PROJECT = "smooseg_fast"

Record = dict[str, Any]  # a line of metrics.jsonl


class Board(Protocol):
    """A tool that shows curves: one series for every figure and head."""

    def add(self, records: Iterable[Record]) -> None: ...

    def close(self) -> None: ...


def require_board(log: str | None) -> None:
    """Raise UserError if the package of a board is missing, before the run starts."""
    if log is None:
        return
    try:
        import_module(MODULES[log])
    except ImportError as error:
        raise UserError(
            f'--log {log}: the package is not installed; pip install "smooseg_fast[{log}]", or leave the flag out'
        ) from error


def open_board(config: TrainConfig, out: Path, records: Iterable[Record]) -> Board | None:
    """The board that --log asks for, below `out`. It shows the `records` that a resumed run kept."""
    if config.log is None:
        return None
    return TensorBoard(out / "tensorboard", records) if config.log == "tensorboard" else WandB(config, out, records)


class TensorBoard:
    """Event files in `folder`.

    Writes the `records` that a resumed run kept again, and hides those of an earlier process: it may have gone beyond
    them, or have been killed before the last of them was on disk.
    """

    def __init__(self, folder: Path, records: Iterable[Record]):
        from torch.utils.tensorboard import SummaryWriter

        with disk_errors(folder):
            self.writer = SummaryWriter(str(folder), purge_step=0, flush_secs=FLUSH_S)
        self.add(records)

    def add(self, records: Iterable[Record]) -> None:
        with disk_errors(self.writer.log_dir):
            for record in records:
                for name, value in curves(record).items():
                    self.writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        with disk_errors(self.writer.log_dir):
            self.writer.close()


class WandB:
    """A run of Weights & Biases, with its files in wandb/ below `out`.

    A resumed run continues the same one, because its id is a hash of the folder and of what is learnt. Steps that it
    shows already are left out: it cannot change them. WANDB_MODE, WANDB_PROJECT and the others mean what they do there.

    Raises:
        UserError: where it does not begin, as without a login.
    """

    def __init__(self, config: TrainConfig, out: Path, records: Iterable[Record]):
        import wandb

        learnt = config.learning()
        number = hashlib.sha256(f"{out.absolute()} {sorted(learnt.items())}".encode(errors="replace")).hexdigest()[:16]
        with disk_errors(out):
            try:
                self.run: Any = wandb.init(
                    project=PROJECT, name=out.name, id=number, resume="allow", dir=str(out), config=learnt
                )
            except OSError:
                raise
            except Exception as error:  # it has many kinds
                lines = str(error).strip().splitlines() or [type(error).__name__]
                advice = "run `wandb login`, set WANDB_MODE=offline, or leave the flag out"
                raise UserError(f"--log wandb: cannot begin ({lines[0]}); {advice}") from error
        self._next = int(self.run.step or 0)
        self.add(records)

    def add(self, records: Iterable[Record]) -> None:
        for step, at_step in groupby(records, key=lambda record: record["step"]):
            values = {name: value for record in at_step for name, value in curves(record).items()}
            if step >= self._next:
                self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


def curves(record: Record) -> dict[str, float]:
    """The figures of a record by the names of their curves."""
    return {f"{name}/{record['head']}": value for name, value in record.items() if isinstance(value, float)}


@contextmanager
def disk_errors(folder: str | Path) -> Iterator[None]:
    """Turn a full disk into a WriteError; the writer's thread meets it, and the next call raises it."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"{folder}: cannot be written ({error.strerror or error}); free some space") from error
