"""The steps of one run: where its heads start, what is measured on the way, and what is saved so that it can resume."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

import smooseg_kernels as sk

from ..config import Variant
from ..errors import UserError
from ..features.sample import batches, sample_patches
from ..measure.closeness import closeness, similarity, warning
from ..measure.health import health
from ..measure.scores import hungarian
from ..segment.checkpoint import Fine, TrainingState, optimizer_tensors, restore_optimizer
from ..segment.grouping import Grouping
from ..segment.model import Head, Heads, basis_of
from ..system.progress import Bar
from ..system.signals import Interrupted, StopRequest, stop_request
from .board import Board, open_board
from .callbacks import Callbacks
from .grow import Grown, grow
from .loop import Loop
from .monitors import Watch
from .runfolder import TRAINING
from .schedule import Marks, Schedule, Settings
from .setting import Setting
from .shares import Shares

SAVE_S = 30.0  # a saved state is never older, however slow the steps are
WATCHED_ROWS = 16  # squares whose labels are looked at for each line of the log


class Run:
    """The steps of one run, from `state` or from the start.

    After `learn`, `done` is the number of steps taken, `records` are the lines of metrics.jsonl, `report` holds the
    figures so far, `counts` the confusion counts of the heads as they are now, if they were taken, and `fine` the tree
    that the heads of each seed started from.
    """

    def __init__(self, setting: Setting, state: TrainingState | None):
        self.setting, self.config, self.state = setting, setting.config, state
        self.say, self.processes, self.alone = setting.say, setting.processes, setting.processes.size == 1
        self.shares = Shares(len(setting.variants), setting.processes)
        self.variants = setting.variants[self.shares.part]  # those that this process learns
        self.schedule = setting.stream or Schedule(len(setting.store), self.config.batch_size, self.config.data_seed)
        self.callbacks = Callbacks(setting.callbacks, self.schedule.steps_per_epoch)
        self.watch = Watch(setting.variants)
        self.drift_stops = False  # whether --on-drift asks for an end here
        self.loop: Loop | None = None  # stays None in a process without a head, and without steps
        self.untrained: Heads | None = None  # this process's heads where no step is to be taken
        self.losses: dict[str, Tensor] = {}  # this process's heads, last step
        self.records: list[dict[str, Any]] = []  # all heads
        self.report: dict[str, Any] = {}
        self.board: Board | None = None
        self.done = self.saved = 0 if state is None else state.step  # steps taken, and those in the folder's state
        self.saved_at = time.monotonic()
        self.counts: dict[Variant, np.ndarray] = {}
        self.fine: dict[int, Fine] = {} if state is None else dict(state.fine)  # by seed, those of this process

    def learn(self) -> None:
        """Takes all steps, or fewer with --on-drift stop. Interrupted after a signal, with the state saved."""
        self.prepare()
        steps, first = self.setting.steps, self.done
        bar = Bar(total=steps, initial=first, desc="train", unit="step", disable=not self.setting.progress or not steps)
        with closing(self), bar, stop_request() as stop:
            logged = any(record["step"] == self.done for record in self.records)
            if self.state is not None and self.state.losses and self.log_is_due() and not logged:
                self.log(bar)  # a stop cut this line short
            while self.done < steps and not self.drift_stops:
                self.step()
                if self.done == first + 1 and self.loop is not None and self.loop.not_captured is not None:
                    self.say(f"warning    steps run one by one, without a CUDA graph: {self.loop.not_captured}")
                bar.update()
                if self.log_is_due() and not (self.alone and stop.number):
                    # resuming rewrites a line that a signal cut short from saved losses; several processes finish it
                    with stop.at_once() if self.alone else nullcontext():
                        self.log(bar)
                latest = self.records[-len(self.setting.variants) :]
                at_step = latest if latest and latest[-1]["step"] == self.done else []
                self.callbacks.tell(self.done, steps, at_step)
                number, late = self.agree(stop)
                # a window of a stream takes the backbone minutes, so the state is saved before it
                if self.checkpoint_is_due() or late or self.drift_stops or number or not self.schedule.ready(self.done):
                    self.save()
                if number:
                    self.processes.wait()  # the end of one would end another that still writes
                    raise Interrupted(number)
        if self.done < steps:
            self.say(f"stop       at step {self.done} of {steps}, as --on-drift stop asks: every head drifts")

    def prepare(self) -> None:
        """Claims the folder, and starts or resumes this process's heads."""
        setting, state = self.setting, self.state
        heads = self.start() if state is None else Heads.from_state(self.shares.of(state.heads))
        if heads is not None and self.setting.steps:
            self.loop = self.make_loop(heads)
        elif heads is not None:
            self.untrained = heads.to(setting.device)
        if state is not None:
            self.losses = self.shares.of(state.losses)
            if state.reasons is not None:
                self.report["tree"] = state.reasons
            if self.loop is not None:
                self.restore(self.loop.optimizer, state)
            self.say(f"resume     from step {state.step} of {self.setting.steps}")
        if setting.written is not None:
            self.records = setting.written.resume(self.done)
            self.board = open_board(self.config, setting.written.path, self.records)
        self.records = self.processes.all(self.records)[0]
        if setting.stream is not None:
            self.report["streamed"] = dataclasses.asdict(setting.stream.windows)
        if self.processes.first and self.setting.steps:  # what training moves by
            self.report["closeness"] = self.closeness()
        self.see(self.records)

    def restore(self, optimizer: torch.optim.Adam, state: TrainingState) -> None:
        """Gives this process's part of Adam's state back. UserError where it, or the losses, do not fit."""
        try:
            restore_optimizer(optimizer, self.shares.of(state.optimizer))
            if state.losses.keys() not in ({}.keys(), set(sk.SmooSegLoss._fields)):
                raise ValueError("its losses have other names")
        except (ValueError, LookupError) as error:
            place = TRAINING if self.setting.folder is None else self.setting.folder.path / TRAINING
            advice = "remove it to train from the first step, or give another --out"
            raise UserError(f"{place}: damaged ({error}); {advice}") from error

    def make_loop(self, heads: Heads) -> Loop:
        config, store = self.config, self.setting.store
        pairs = [variant.thresholds for variant in self.variants]
        settings = Settings(
            relative=pairs[0].relative,
            temperature=config.temperature,
            teacher_decay=config.teacher_decay,
            dropout=config.dropout,
            patches=config.patches,
            impl=config.impl,
        )
        features = self.features()
        return Loop(
            heads.to(self.setting.device),
            features,
            (store.P, store.D),
            self.schedule,
            torch.tensor([[pair.within, pair.across] for pair in pairs]),
            settings,
            lr=config.lr,
            lr_prototypes=config.lr_prototypes,
            valid=self.valid(features),
        )

    def start(self) -> Heads | None:
        """Heads of one seed start alike; their thresholds tell them apart later. None for a process without a head."""
        seeds = [variant.seed for variant in self.variants]
        starts = {seed: self.start_of(seed) for seed in dict.fromkeys(seeds)}
        if self.config.tree:
            grown = {seed: grow(start, self.setting.store) for seed, start in starts.items()}
            groups = self.number(grown)
            fine = {seed: part.fine.tensors() for seed, part in grown.items()}
            self.fine = {s: Fine.of(tensors) for part in self.processes.all(fine) for s, tensors in part.items()}
            starts = {seed: part.head(groups) for seed, part in grown.items()}
        return Heads([starts[seed] for seed in seeds]) if seeds else None

    def number(self, grown: Mapping[int, Grown]) -> int:
        """The number of groups of all heads: the one that was asked for, or that the first seed's tree suggests."""
        asked = self.config.groups
        known = [(asked or part.number.groups, part) for part in grown.values()]
        groups = self.processes.all(known[0][0] if known else 0)[0]
        most = min(
            most for most in self.processes.all(min((part.fine.most for part in grown.values()), default=groups))
        )
        if most < groups and asked:
            self.say(f"warning    --groups {asked}: the features have {most} different groups, no more")
        groups = min(groups, most)
        if known and self.processes.first:
            first = known[0][1]
            self.say(f"groups     {groups} of {len(first.fine.tree)} fine ones, {first.why(asked)}")
            self.report["tree"] = first.reasons(groups, asked)
        return groups

    def start_of(self, seed: int) -> Head:
        store, device, groups = self.setting.store, self.setting.device, self.setting.prototypes
        channels, basis = self.config.channels, None
        if channels is not None and channels < store.D:  # of all heads alike
            basis = basis_of(sample_patches(store, seed=0).to(device), channels)
        head = Head(store.D, groups, self.config.code_dim, seed, basis=basis).to(device)
        if self.config.init != "random":
            rows = sample_patches(store, seed).to(device)
            if len(rows) < groups:
                raise UserError(f"--prototypes {groups}: cannot start from {len(rows)} patches; ask for fewer")
            fine = "fine" if self.config.tree else "first"
            self.say(f"start      {len(rows):,} patches sorted into {groups} {fine} groups, seed {seed}")
            head.start_from_features(rows, seed)
        return head

    def features(self) -> Tensor | Callable[[Tensor], Tensor]:
        """All features on a GPU, where they take at most 60 % of its free memory; else rows through the memory map."""
        store, stream, device = self.setting.store, self.setting.stream, self.setting.device
        dtype = getattr(torch, self.config.precision)
        if stream is not None:
            return functools.partial(stream.features, dtype=dtype)
        nbytes = len(store) * store.P * store.D * dtype.itemsize
        if device.type == "cuda" and nbytes <= 0.6 * torch.cuda.mem_get_info(device)[0]:
            return store.load(device, dtype)
        return functools.partial(store.rows, dtype=dtype)

    def valid(self, features: Tensor | Callable[[Tensor], Tensor]) -> Marks:
        """Which patches of all rows show data: next to the `features`, or a function like theirs. None where all do."""
        store, stream = self.setting.store, self.setting.stream
        if stream is not None:
            return stream.valid
        if isinstance(features, Tensor):
            valid = store.valid(range(len(store)))
            return None if valid is None else valid.to(features.device)
        return store.valid if store.masked else None

    def closeness(self) -> dict[str, Any]:
        """Figures on how alike patches are, for the report; warns of thresholds that pull in opposite directions."""
        setting = self.setting
        measured = similarity(setting.store, setting.device, impl=self.config.impl, progress=setting.progress)
        within, across = closeness(measured, setting.variants[0].thresholds)
        setting.detail(f"closeness  within images  {within.line()}")
        setting.detail(f"           across images  {across.line()}")
        setting.detail(f"           {measured.line()}")
        if problem := warning(within, across):
            self.say(f"warning    {problem}")
        return {
            "within": dataclasses.asdict(within) | {"pairs": measured.within.pairs},
            "across": dataclasses.asdict(across) | {"pairs": measured.across.pairs},
            "squares": measured.squares,
            "squares_counted": measured.counted,
        }

    # steps

    def step(self) -> None:
        """Takes a step with this process's heads. A process without a head still enters the windows of a stream.

        UserError where the device's memory cannot hold a step.
        """
        if self.loop is None:
            self.schedule.rows_of(self.done)
        else:
            try:
                self.losses = self.loop.step(self.done)._asdict()
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"--batch-size {self.config.batch_size}: {self.setting.device} ran out of memory in a training "
                    f"step; give fewer, or train on a part of each square with --patches"
                ) from error
        self.done, self.counts = self.done + 1, {}

    def agree(self, stop: StopRequest) -> tuple[int, bool]:
        """(signal to any process, or 0; whether the saved state is too old): equal on all, after the same step."""
        answers = self.processes.all((stop.number or 0, time.monotonic() - self.saved_at > SAVE_S))
        return max(number for number, _ in answers), answers[0][1]

    def log_is_due(self) -> bool:
        return self.done % self.config.log_every == 0 or self.done == self.setting.steps

    def checkpoint_is_due(self) -> bool:
        return self.done % self.config.checkpoint_every == 0 or self.done == self.setting.steps

    # log and state

    def heads(self) -> Heads:
        """All heads of the run, on every process."""
        mine = self.untrained if self.loop is None else self.loop.heads
        if mine is not None and self.alone:
            return mine
        state = {} if mine is None else mine.state_dict()
        return Heads.from_state(self.shares.everywhere(state)).to(self.setting.device)

    def log(self, bar: Bar) -> None:
        """Writes a line of metrics for each head and names heads in trouble. UserError when all are broken."""
        setting = self.setting
        measured = [] if self.loop is None else self.measure(self.loop.heads)
        records = [record for part in self.processes.all(measured) for record in part]
        if setting.validation is not None and self.checkpoint_is_due():
            heads = self.heads()
            for h, (variant, record) in enumerate(zip(setting.variants, records)):
                self.counts[variant] = setting.validation.of_head(Grouping(heads[h]))
                scores = hungarian(self.counts[variant])
                record |= {"accuracy": scores.accuracy, "miou": scores.miou}
        if setting.written is not None:
            setting.written.metrics.append(*records)
        self.records += records
        if self.board is not None:
            self.board.add(records)
        bar.set_postfix_str(live(records[0], self.config.verbose), refresh=False)
        self.see(records)
        if self.watch.all_broken:
            raise UserError(
                f"--lr: at step {self.done} the losses of every head are NaN or infinite; "
                "try a lower --lr and --lr-prototypes"
            )

    def measure(self, heads: Heads) -> list[dict[str, Any]]:
        """The records of this process's heads at this step."""
        states = health(heads, batches(self.setting.store, self.setting.device, WATCHED_ROWS))
        losses = sk.SmooSegLoss(**{name: value.detach().float().cpu() for name, value in self.losses.items()})
        columns = {
            "total": losses.total,
            "energy_within": losses.energy[:, 0],
            "energy_across": losses.energy[:, 1],
            "data": losses.data,
            "distance_within": losses.distance[:, 0],
            "distance_across": losses.distance[:, 1],
            "closeness_within": losses.mean[0].expand(len(heads)),
            "closeness_across": losses.mean[1].expand(len(heads)),
        }
        return [
            {"step": self.done, "head": variant.name}
            | {name: float(values[h]) for name, values in columns.items()}
            | state.figures()
            for h, (variant, state) in enumerate(zip(self.variants, states))
        ]

    def see(self, records: Iterable[dict[str, Any]]) -> None:
        """Names troubles in records that are new, or that a resumed run has kept."""
        for trouble in filter(None, map(self.watch.see, records)):
            self.say(f"warning    {trouble}")
        self.drift_stops = self.config.on_drift == "stop" and self.watch.all_drifted

    def save(self) -> None:
        """Saves the state after this step, with all heads."""
        if self.setting.folder is None:
            return
        loop = self.loop
        states: tuple[dict[str, Tensor], ...] = ({}, {}, {})
        if loop is not None:
            states = loop.heads.state_dict(), optimizer_tensors(loop.optimizer), self.losses
        heads, optimizer, losses = map(self.shares.everywhere, states)
        if self.setting.written is not None:
            stream = self.setting.stream
            windows = None if stream is None else dataclasses.astuple(stream.windows)
            state = TrainingState(
                config=self.config,
                step=self.done,
                heads=heads,
                optimizer=optimizer,
                losses=losses,
                fine=self.fine,
                reasons=self.report.get("tree"),
                windows=windows,
            )
            state.write(self.setting.written.path / TRAINING)
        self.saved, self.saved_at = self.done, time.monotonic()

    def kept(self) -> str:
        """Say what a stop at this moment leaves."""
        if not self.processes.first:
            return "what was saved is kept"
        if self.setting.folder is None:
            return "nothing is kept of a run without an output folder"
        if not self.saved:
            return "no step is saved yet; features are"
        return f"step {self.saved} of {self.setting.steps} is saved, whole, in {self.setting.folder.path}"

    def close(self) -> None:
        if self.board is not None:
            self.board.close()
        if self.setting.stream is not None:
            self.setting.stream.close(remove=self.done == self.setting.steps or self.drift_stops)


def live(record: dict[str, Any], verbose: bool) -> str:
    """The first head's figures for the progress line; `verbose` adds the terms E within / across / data."""
    terms = "E {energy_within:.3f}/{energy_across:.3f}/{data:.2f}, ".format(**record) if verbose else ""
    return f"{terms}{record['perplexity']:.1f} groups"
