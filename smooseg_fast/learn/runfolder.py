"""The folder of a run: its files, and the run it belongs to."""

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
    """The settings, heads, state and metrics of one run. UserError when the folder holds another run."""

    def __init__(self, path: Path, config: TrainConfig):
        super().__init__(
            path, config.learning(), record=RUN, outputs=(CHECKPOINT, GROUPS, CURVES, LADDER, SAMPLES), below=(HEADS,)
        )
        self.metrics = Journal(path / METRICS)
        self._heads = {variant.name for variant in config.variants()}
        self.pictures = (GROUPS, CURVES, LADDER) if len(config.thresholds()) > 1 else (GROUPS, CURVES)

    def state(self) -> TrainingState | None:
        """Read the last state that an earlier process of this run saved; None without one."""
        return read_training_state(self.path / TRAINING) if (self.path / TRAINING).exists() else None

    def checkpoint(self) -> Checkpoint:
        """Read the head that predicts by default."""
        return read_checkpoint(self.path / CHECKPOINT)

    def finished(self) -> bool:
        """Return whether the output is complete; running again draws pictures that failed or were removed."""
        return all((self.path / name).exists() for name in (REPORT, CHECKPOINT, *self.pictures))

    def resume(self, step: int) -> list[dict[str, Any]]:
        """Claim the folder and return the metrics up to `step`; removes all other lines. Those of `step` stay only if
        every head has one: the run writes them again."""
        self.claim()
        ours = [r for r in self.metrics.read() if r.get("head") in self._heads and type(r.get("step")) is int]
        complete = sum(record["step"] == step for record in ours) == len(self._heads)
        records = [record for record in ours if record["step"] < step + complete]
        self.metrics.rewrite(records)
        return records


def head_file(folder: Path, variant: Variant) -> Path:
    """Return the checkpoint of one head in the folder of a run with several."""
    return folder / HEADS / f"{variant.name}.safetensors"
