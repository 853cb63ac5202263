"""The steps of one run: its start or its saved state, what each line of metrics says, and what is saved on the way."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable
from contextlib import closing, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

import smooseg_kernels as sk

from ..config import TrainConfig, Variant
from ..errors import UserError
from ..features.sample import batches, sample_patches
from ..features.store import FeatureStore
from ..measure.closeness import closeness, similarity, warning
from ..measure.health import health
from ..measure.scores import hungarian
from ..measure.validation import Validation
from ..segment.checkpoint import TrainingState, optimizer_tensors, restore_optimizer
from ..segment.model import Head, Heads
from ..system.processes import ALONE, Processes
from ..system.progress import Bar
from ..system.signals import Interrupted, StopRequest
from .board import Board
from .loop import Loop
from .monitors import Watch
from .runfolder import BOARD, TRAINING, RunFolder
from .schedule import Schedule, Settings
from .stream import Stream

SAVE_S = 30.0  # a state is never older, however slow the steps are
WATCHED_ROWS = 16  # squares whose labels are looked at for each line of the log

Say = Callable[[str], None]


class Run:
    """The steps of one run and what is told about them."""

    def __init__(
        self,
        config: TrainConfig,
        store: FeatureStore,
        device: torch.device,
        validation: Validation | None,
        folder: RunFolder | None,
        say: Say,
        progress: bool,
        processes: Processes = ALONE,
        stream: Stream | None = None,
    ):
        self.stream = stream  # where batches come from, if `store` is only a sample
        self.config, self.store, self.device, self.validation = config, store, device, validation
        self.folder, self.say, self.progress, self.processes = folder, say, progress, processes
        self.variants = config.variants()
        self.records: list[dict[str, Any]] = []
        self.report: dict[str, Any] = {} if stream is None else {"streamed": dataclasses.asdict(stream.windows)}
        self.board: Board | None = None
        self.alone = processes.size == 1
        self.watch = Watch(self.variants, config.prototypes)
        self.drift_stops = False  # whether --on-drift asks for an end here
        self.done = 0  # steps
        self.counted = 0  # step whose confusion counts are in `counts`
        self.counts: dict[Variant, np.ndarray] = {}
        self.saved = 0  # steps that the folder's state has; 0: there is none
        self.written = time.monotonic()  # when that was

    def learn(self, found: TrainingState | None) -> Heads:
        """All steps from the saved state, or from the start, to the end; fewer where every head drifts and that shall stop the run."""
        config, first = self.config, 0 if found is None else found.step
        self.done = self.saved = first
        heads = self.start() if found is None else found.heads.to(self.device)
        self.processes.as_first(list(heads.state_dict().values()))  # machines may differ in the last bits
        loop = self.loop(heads)
        if found is not None:
            restore_optimizer(loop.optimizer, found.optimizer)
            self.say(f"resume     from step {first} of {config.steps}")
        if self.folder is not None:
            self.records = self.folder.resume(first)
            if config.log == "tensorboard":
                self.board = Board(self.folder.path / BOARD, self.records)
        self.records = self.processes.all(self.records)[0]
        self.tell_closeness()
        self.tell_troubles(self.records)
        bar = Bar(total=config.steps, initial=first, desc="train", unit="step", disable=not self.progress)
        with closing(self), bar, StopRequest() as stop:
            if (
                found is not None
                and found.losses
                and self.log_is_due()
                and not any(r["step"] == first for r in self.records)
            ):
                self.log(loop.heads, found.losses, bar)
            while self.done < config.steps and not self.drift_stops:
                losses = loop.step(self.done)._asdict()
                self.done += 1
                if self.done == first + 1 and loop.not_captured is not None:
                    self.say(
                        f"warning    steps are not replayed from a CUDA graph, but run one by one: {loop.not_captured}"
                    )
                bar.update()
                if self.log_is_due() and not (self.alone and stop.number):
                    # what a signal cuts short here is made again from the saved losses; several processes exchange counts and end it
                    with stop.at_once() if self.alone else nullcontext():
                        self.log(loop.heads, losses, bar)
                stopped = self.processes.largest(
                    stop.number or 0
                )  # by a signal to any of them, and behind the same step
                late = time.monotonic() - self.written > SAVE_S or not loop.schedule.ready(
                    self.done
                )  # before hours in a backbone
                if self.checkpoint_is_due() or late or self.drift_stops or stopped:
                    self.write(loop, losses)
                if stopped:
                    self.processes.wait()  # the end of one would be the end of another that still writes
                    raise Interrupted(stopped)
        if self.done < config.steps:
            self.say(f"stop       at step {self.done} of {config.steps}, as --on-drift stop asks: every head drifts")
        return loop.heads

    def log_is_due(self) -> bool:
        return self.done % self.config.log_every == 0 or self.done == self.config.steps

    def checkpoint_is_due(self) -> bool:
        return self.done % self.config.checkpoint_every == 0 or self.done == self.config.steps

    def kept(self) -> str:
        """What a stop at this moment leaves, in words."""
        if not self.processes.first:
            return "what was saved is kept"
        if self.folder is None:
            return "nothing is kept of a run without an output folder"
        if not self.saved:
            return "no step is saved yet; features are"
        return f"step {self.saved} of {self.config.steps} is saved, whole, in {self.folder.path}"

    def close(self) -> None:
        if self.board is not None:
            self.board.close()
        if self.stream is not None:
            self.stream.close(remove=self.done == self.config.steps or self.drift_stops)

    def loop(self, heads: Heads) -> Loop:
        config, store = self.config, self.store
        schedule = self.stream
        if schedule is None:
            schedule = Schedule(
                len(store), config.batch_size, config.data_seed, self.processes.size, self.processes.rank
            )
        if schedule.batch_size < config.batch_size:
            self.say(f"batch      {schedule.batch_size} squares, as many as there are")
        settings = Settings(
            relative=config.relative,
            temperature=config.temperature,
            teacher_decay=config.teacher_decay,
            dropout=config.dropout,
            patches=config.patches,
            impl=config.impl,
        )
        thresholds = torch.tensor([variant.thresholds for variant in self.variants])
        sizes, rates = (store.P, store.D), (config.lr, config.lr_prototypes)
        return Loop(heads, self.features(), sizes, schedule, thresholds, settings, *rates, processes=self.processes)

    def start(self) -> Heads:
        """Heads of one seed start alike: their thresholds part them."""
        starts = {seed: self.start_of(seed) for seed in dict.fromkeys(variant.seed for variant in self.variants)}
        return Heads([starts[variant.seed] for variant in self.variants])

    def start_of(self, seed: int) -> Head:
        config = self.config
        head = Head(self.store.D, config.prototypes, config.code_dim, seed).to(self.device)
        if config.init == "pca-kmeans":
            rows = sample_patches(self.store, seed).to(self.device)
            if len(rows) < config.prototypes:
                raise UserError(
                    f"--prototypes: {config.prototypes} groups cannot start from {len(rows)} patches; ask for fewer"
                )
            head.start_from_features(rows, seed)
        return head

    def features(self) -> Tensor | Callable[[Tensor], Tensor]:
        """On a GPU all features, where they take at most 60 % of its free memory; else rows through the memory map."""
        dtype, rows = (
            getattr(torch, self.config.precision),
            self.store.rows if self.stream is None else self.stream.features,
        )
        nbytes = len(self.store) * self.store.P * self.store.D * dtype.itemsize
        if (
            self.device.type != "cuda"
            or self.stream is not None
            or nbytes > 0.6 * torch.cuda.mem_get_info(self.device)[0]
        ):
            return functools.partial(rows, dtype=dtype)
        return self.store.load(self.device, dtype)

    def tell_closeness(self) -> None:
        """Of the first granularity or pair of thresholds: the closeness itself is common to all."""
        if not self.processes.first:
            return
        found = similarity(self.store, self.device, impl=self.config.impl, progress=self.progress)
        within, across = closeness(found, self.variants[0].thresholds, self.config.relative)
        self.say(f"closeness  within images  {within.line()}")
        self.say(f"           across images  {across.line()}")
        self.say(f"           {found.line()}")
        problem = warning(within, across)
        if problem:
            self.say(f"warning    {problem}")
        self.report["closeness"] = {
            "within": dataclasses.asdict(within) | {"pairs": found.within.pairs},
            "across": dataclasses.asdict(across) | {"pairs": found.across.pairs},
            "squares": found.squares,
            "squares_counted": found.counted,
        }

    def log(self, heads: Heads, losses: dict[str, Tensor], bar: Bar) -> None:
        """One line of metrics for each head, written together; heads in trouble are named. UserError when none is left."""
        states = health(heads, batches(self.store, self.device, WATCHED_ROWS))
        total, energy, data, distance, mean = (losses[name].detach().float().cpu() for name in sk.SmooSegLoss._fields)
        records = [
            {
                "step": self.done,
                "head": variant.name,
                "total": float(total[h]),
                "energy_within": float(energy[h, 0]),
                "energy_across": float(energy[h, 1]),
                "data": float(data[h]),
                "distance_within": float(distance[h, 0]),
                "distance_across": float(distance[h, 1]),
                "closeness_within": float(mean[0]),
                "closeness_across": float(mean[1]),
                **state.figures(),
            }
            for h, (variant, state) in enumerate(zip(self.variants, states))
        ]
        if self.validation is not None and self.checkpoint_is_due():
            counts = {variant: self.validation.confusion(heads[h]) for h, variant in enumerate(self.variants)}
            for variant, record in zip(self.variants, records):
                scores = hungarian(counts[variant])
                record |= {"accuracy": scores.accuracy, "miou": scores.miou}
            self.counts, self.counted = counts, self.done
        if self.folder is not None:
            self.folder.metrics.append(*records)
        self.records += records
        if self.board is not None:
            self.board.add(records)
        bar.tell(live(records[0], bar.pace, min(self.config.batch_size, len(self.store))))
        self.tell_troubles(records)
        if self.watch.all_broken:
            raise UserError(
                f"--lr: at step {self.done} the losses of every head are no numbers any more; try a lower --lr and --lr-prototypes"
            )

    def tell_troubles(self, records: Iterable[dict[str, Any]]) -> None:
        """Of records that are new, or that a resumed run has kept."""
        for trouble in filter(None, map(self.watch.see, records)):
            self.say(f"warning    {trouble}")
        self.drift_stops = self.config.on_drift == "stop" and self.processes.decide(self.watch.all_drifted)

    def write(self, loop: Loop, losses: dict[str, Tensor]) -> None:
        if self.folder is not None:
            windows = None if self.stream is None else dataclasses.astuple(self.stream.windows)
            state = TrainingState(
                self.config, self.done, loop.heads, optimizer_tensors(loop.optimizer), losses, windows
            )
            state.write(self.folder.path / TRAINING)
            self.saved, self.written = self.done, time.monotonic()


def live(record: dict[str, Any], rate: float | None, squares: int) -> str:
    """The first head's figures for the progress line, which has to fit in 100 columns; E is energy within / across / data term.

    rate: steps a second. squares: of a step.
    """
    speed = f"{rate * squares:.0f} img/s, " if rate else ""
    within, across = (f"{record[name]:.3f}".replace("-0.", "-.") for name in ("energy_within", "energy_across"))
    return f"{speed}E {within}/{across}/{record['data']:.2f}, {record['perplexity']:.1f} labels"
