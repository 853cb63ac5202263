"""The folder of a run: its files, and the run it belongs to."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..backbones.base import digest_of
from ..config import AUTO, TrainConfig, Variant
from ..errors import UserError
from ..segment.checkpoint import Checkpoint, TrainingState, read_checkpoint, read_training_state
from ..show.report import PAGE
from ..show.report_tiles import TILES
from ..system.outfolder import HoldsAnotherRun, Journal, OutFolder

CHECKPOINT, TRAINING, HEADS = "checkpoint.safetensors", "training.safetensors", "heads"
METRICS, RUN, REPORT = "metrics.jsonl", "run.json", "report.json"
GROUPS, CURVES, TREE, SAMPLES = "groups.png", "curves.png", "tree.png", "samples"
CURVES_STEPS = 100  # of a run whose curves are drawn: those of fewer say little, and take a second of some ten
GROUPS_TILES = "groups.jsonl"  # what groups.png is drawn from
FOLLOWED = ("total", "perplexity", "image_information")  # figures by which `monitors.Watch` knows trouble
CHOSEN = "backbone_chosen"  # in run.json: whether --backbone auto chose the backbone that is recorded


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
            path,
            settings,
            record=RUN,
            outputs=(CHECKPOINT, GROUPS, GROUPS_TILES, CURVES, TREE, SAMPLES, PAGE, TILES),
            below=(HEADS, SAMPLES),
        )
        name, chosen = self.recorded.get("backbone"), self.recorded.get(CHOSEN) is True
        if auto and self.recorded and not (chosen and isinstance(name, str)):
            raise HoldsAnotherRun(path, "backbone", name, AUTO)
        self.begun_with: str | None = name if auto else None  # the backbone of an unfinished or finished run
        self.settings[CHOSEN] = auto or chosen
        self.metrics = Journal(path / METRICS)
        self._heads = {variant.name for variant in config.variants()}

    def settle(self, backbone: str) -> None:
        """Record the backbone that auto chose."""
        self.settings["backbone"] = backbone

    def state(self, config: TrainConfig) -> TrainingState | None:
        """Read the last state that an earlier process of this run saved; None without one.

        config: that of the run, with every choice made. UserError for a damaged state and for another run's.
        """
        path = self.path / TRAINING
        if not path.exists():
            return None
        state = read_training_state(path)
        saved, asked = state.config.learning(), config.learning()
        for name in (name for name in asked if saved[name] != asked[name]):
            why = f"belongs to another run ({name} is {saved[name]!r} there and {asked[name]!r} here)"
            raise UserError(f"{path}: {why}; remove it to train from the first step, or give another --out")
        return state

    def checkpoint(self) -> Checkpoint:
        """Read the head that predicts by default."""
        return read_checkpoint(self.path / CHECKPOINT, advice="remove it, and the same command writes it again")

    def with_choices(self, checkpoint: Checkpoint) -> Checkpoint:
        """A checkpoint with the number of groups, the least share and the names that were given to it in this folder,
        where the same head lies there already."""
        with suppress(UserError):
            earlier, weights = self.checkpoint(), checkpoint.head.state_dict()
            if digest_of(earlier.head.state_dict()) == digest_of(weights):
                choices = {name: getattr(earlier, name) for name in ("groups", "share", "naming")}
                return dataclasses.replace(checkpoint, **choices)
        return checkpoint

    def finished(self, config: TrainConfig) -> bool:
        """Return whether the output is complete; running again draws pictures that failed or were removed.

        config: that of the run, with every choice made.
        """
        return all((self.path / name).exists() for name in (REPORT, CHECKPOINT, *pictures_of(config)))

    def resume(self, step: int) -> list[dict[str, Any]]:
        """Claim the folder and return the metrics up to `step`; removes all other lines. Those of `step` stay only if
        every head has one: the run writes them again."""
        self.claim()
        ours = [record for record in self.metrics.read(is_figures) if record["head"] in self._heads]
        complete = sum(record["step"] == step for record in ours) == len(self._heads)
        records = [record for record in ours if record["step"] < step + complete]
        self.metrics.rewrite(records)
        return records


def pictures_of(config: TrainConfig) -> tuple[str, ...]:
    """Name the pictures of a run; `config` has every choice made."""
    return (GROUPS, *[CURVES] * ((config.steps or 0) >= CURVES_STEPS), *[TREE] * config.tree, PAGE)


def is_figures(record: dict[str, Any]) -> bool:
    """Whether a line of metrics is one: a head, a step, and numbers. None stands for a NaN, of a head that diverged."""
    figures = {name: value for name, value in record.items() if name not in ("head", "step")}
    numbers = all(value is None or type(value) in (int, float) for value in figures.values())
    known = figures.get("total", 0) is None or not any(figures.get(name) is None for name in FOLLOWED)
    return isinstance(record.get("head"), str) and type(record.get("step")) is int and numbers and known


def head_file(folder: Path, variant: Variant) -> Path:
    """Return the checkpoint of one head in the folder of a run with several."""
    return folder / HEADS / f"{variant.name}.safetensors"
