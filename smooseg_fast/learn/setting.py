"""The frozen surroundings of a run: settings, features, labels, folder, processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from ..backbones import Backbone
from ..config import TrainConfig, Variant
from ..datasets import Dataset
from ..features.store import FeatureStore
from ..measure.confusion import LabelSquares
from ..system.processes import Processes
from .callbacks import Callback
from .runfolder import RunFolder
from .stream import Stream

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Everything that a run needs and does not change. Every process of a run has an equal one."""

    config: TrainConfig  # with every choice resolved (number of prototypes, sizes, impl, precision)
    dataset: Dataset  # the training images
    store: FeatureStore  # features of all training squares, or of a sample of them where `stream` brings the batches
    stream: Stream | None
    validation: LabelSquares | None  # labelled images to measure on
    backbone: Backbone
    folder: RunFolder | None  # where the first process writes; None to write nothing
    say: Say  # takes each line of text about the run
    progress: bool
    processes: Processes
    callbacks: tuple[Callback, ...]  # told after every step
    started: float  # `time.perf_counter()` at the beginning of the whole run

    @cached_property
    def variants(self) -> tuple[Variant, ...]:
        return self.config.variants()

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def prototypes(self) -> int:
        """K, once `trainer.resolve` has chosen it. ValueError before."""
        if self.config.prototypes is None:
            raise ValueError("the number of prototypes is not resolved")
        return self.config.prototypes

    @property
    def steps(self) -> int:
        """The optimiser steps, once `trainer.resolve` has chosen them. ValueError before."""
        if self.config.steps is None:
            raise ValueError("the number of steps is not resolved")
        return self.config.steps

    @property
    def written(self) -> RunFolder | None:
        """The folder, for the one process that writes into it."""
        return self.folder if self.processes.first else None

    def detail(self, line: str) -> None:
        """Says a line for experts, under --verbose alone."""
        if self.config.verbose:
            self.say(line)
