"""The folder of a run: its files, and the run it belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config import AUTO, TrainConfig, Variant
from ..segment.checkpoint import Checkpoint, TrainingState, read_checkpoint, read_training_state
from ..system.outfolder import HoldsAnotherRun, Journal, OutFolder

CHECKPOINT, TRAINING, HEADS = "checkpoint.safetensors", "training.safetensors", "heads"
METRICS, BOARD, RUN, REPORT = "metrics.jsonl", "tensorboard", "run.json", "report.json"
GROUPS, CURVES, TREE, SAMPLES = "groups.png", "curves.png", "tree.png", "samples"
CHOSEN = "backbone_chosen"  # in RUN: whether --backbone auto chose the backbone that is recorded


class RunFolder(OutFolder):
    """The settings, heads, state and metrics of one run. UserError when the folder holds another run.

    With --backbone auto, it holds this run if auto chose its backbone, whatever it would choose today; `settle` before
    `claim`.
    """

    def __init__(self, path: Path, config: TrainConfig):
        settings, auto = config.learning(), config.backbone == AUTO
        if auto:
            del settings["backbone"]
        super().__init__(
            path, settings, record=RUN, outputs=(CHECKPOINT, GROUPS, CURVES, TREE, SAMPLES), below=(HEADS,)
        )
        name, chosen = self.recorded.get("backbone"), self.recorded.get(CHOSEN) is True
        if auto and self.recorded and not (chosen and isinstance(name, str)):
            raise HoldsAnotherRun(path, "backbone", name, AUTO)
        self.begun_with: str | None = name if auto else None  # the backbone of an unfinished or finished run
        self.settings[CHOSEN] = auto or chosen
        self.metrics = Journal(path / METRICS)
        self._heads = {variant.name for variant in config.variants()}
        self.pictures = (GROUPS, *[CURVES] * (config.steps > 0), *[TREE] * config.tree)

    def settle(self, backbone: str) -> None:
        """Record the backbone that auto chose."""
        self.settings["backbone"] = backbone

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
