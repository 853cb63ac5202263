"""The folder of a run: what is in it, and which run it belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config import TrainConfig, Variant
from ..segment.checkpoint import Checkpoint, TrainingState, read_checkpoint, read_training_state
from ..system.outfolder import Journal, OutFolder

CHECKPOINT, TRAINING, HEADS = "checkpoint.safetensors", "training.safetensors", "heads"
METRICS, BOARD, RUN, REPORT = "metrics.jsonl", "tensorboard", "run.json", "report.json"
GROUPS, CURVES, LADDER, SAMPLES = "groups.png", "curves.png", "ladder.png", "samples"


class RunFolder(OutFolder):
    """The folder of one run: its settings, heads, state and metrics. UserError when it holds another run."""

    def __init__(self, path: Path, config: TrainConfig):
        super().__init__(path, config.learning(), record=RUN, made=(CHECKPOINT, GROUPS, CURVES, LADDER, SAMPLES), below=(HEADS,))
        self.metrics = Journal(path / METRICS)
        self._heads = {variant.name for variant in config.variants()}
        self.pictures = (
            (GROUPS, CURVES, LADDER)
            if config.granularity is not None and len(config.granularity) > 1
            else (GROUPS, CURVES)
        )

    def state(self) -> TrainingState | None:
        """What an earlier process of this run saved last."""
        return read_training_state(self.path / TRAINING) if (self.path / TRAINING).exists() else None

    def checkpoint(self) -> Checkpoint:
        """The head that predicts by default."""
        return read_checkpoint(self.path / CHECKPOINT)

    def finished(self) -> bool:
        """Whether all that a run leaves is there; pictures that failed, or were taken away, are drawn by running again."""
        return all((self.path / name).exists() for name in (REPORT, CHECKPOINT, *self.pictures))

    def resume(self, step: int) -> list[dict[str, Any]]:
        """The metrics up to `step`; the folder is this run's from here on, and what a run before wrote beyond that step goes.

        So do the lines of `step` itself unless every head has its own: they can be made again.
        """
        self.claim()
        found = [
            record
            for record in self.metrics.read()
            if record.get("head") in self._heads and type(record.get("step")) is int
        ]
        whole = sum(record["step"] == step for record in found) == len(self._heads)
        records = [record for record in found if record["step"] < step + whole]
        self.metrics.rewrite(records)
        return records


def head_file(folder: Path, variant: Variant) -> Path:
    return folder / HEADS / f"{variant.name}.safetensors"
