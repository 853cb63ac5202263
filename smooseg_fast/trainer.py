"""A run from images to a trained segmenter: features, start, steps, states saved on the way, and the summary."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import smooseg_kernels as sk

from . import evaluation
from .backbones import Backbone, load_backbone
from .board import Board, require_tensorboard
from .checkpoint import TrainingState, optimizer_tensors, restore_optimizer
from .closeness import closeness, similarity, warning
from .config import TrainConfig, preset, with_changes
from .datasets import ArrayDataset, Dataset, open_splits
from .errors import UserError, WriteError
from .features.extract import open_or_extract
from .features.room import Windows, require_room
from .features.store import FeatureStore
from .features.stream import Stream, open_for_training
from .health import health
from .host import deterministic, keep_freed_memory
from .images import whole_patches
from .loop import Loop
from .metrics import hungarian
from .model import Head, Heads
from .monitors import Watch
from .mosaic import Mosaic
from .objective import Schedule, Settings
from .processes import ALONE, Processes
from .progress import Bar
from .runfolder import BOARD, TRAINING, RunFolder
from .segmenter import Segmenter, pick_device
from .signals import Interrupted, StopRequest, with_kept
from .summary import Summary, Validation

GROUPS_WITHOUT_LABELS = 16
SAVE_S = 30.0  # a state is never older, however slow the steps are
WATCHED_ROWS = 16  # squares whose labels are looked at for each line of the log

Say = Callable[[str], None]


def fit(
    images: str | Path | Sequence[np.ndarray],
    *,
    out: str | Path | None = None,
    preset_name: str = "folder",
    progress: bool = True,
    say: Say | None = None,
    **settings: Any,
) -> Segmenter:
    """Learn to segment `images` without labels.

    Args:
        images: a folder (any nesting, the labelled layout, or that of a benchmark's owner), one image file, or a sequence of uint8
            [H,W,3] arrays.
        out: folder for checkpoint, figures and pictures; nothing is written without it but the feature cache.
        preset_name: where the other settings start from.
        say: what to do with each line about the run; nothing by default.
        settings: any field of TrainConfig, such as granularity=0.06, prototypes=12, steps=400, backbone="facebook/dino-vits8".

    Raises:
        UserError: in one line, for settings or images that cannot be; WriteError, one of them, for a disk that is full.
        Interrupted: a KeyboardInterrupt, by Ctrl-C; its text tells what is kept in `out`, where the same call resumes.
    """
    arrays = None if isinstance(images, (str, Path)) else list(images)
    config = with_changes(preset(preset_name), data=str(images) if arrays is None else None, **settings)
    dataset, held_out = open_splits(images) if arrays is None else (ArrayDataset(arrays), None)
    return learn(config, dataset, held_out, out=None if out is None else Path(out), progress=progress, say=say or (lambda line: None))


def demo_datasets() -> tuple[Mosaic, Mosaic]:
    """(train, held out) of the embedded demo."""
    return Mosaic("train", count=128), Mosaic("val", count=48)


def datasets_of(config: TrainConfig) -> tuple[Dataset, Dataset | None]:
    """(training images, labelled images to take figures on or None)."""
    if config.data is None:
        return demo_datasets()
    return open_splits(config.data)


def learn(
    config: TrainConfig,
    dataset: Dataset,
    held_out: Dataset | None,
    *,
    out: Path | None,
    progress: bool,
    say: Say,
    processes: Processes = ALONE,
) -> Segmenter:
    """One run; resumes the unfinished one of the same configuration in `out`. Of several processes the first alone writes."""
    require_shares(config.batch_size, processes)
    device = processes.device(pick_device(config.device))
    keep_freed_memory()
    if config.log == "tensorboard":
        require_tensorboard()
    backbone = load_backbone(config.backbone, device, config.backbone_precision)
    wanted, config = config, resolve(config, backbone, dataset if held_out is None else held_out, say)
    folder = None if out is None else RunFolder(out, wanted)
    if folder is not None and folder.finished():
        checkpoint = folder.checkpoint()
        say(f"{out}: this run is finished, step {checkpoint.step} of {config.steps}; --out another folder to train again")
        return Segmenter(checkpoint, backbone)

    for note in dict.fromkeys((*dataset.notes, *(() if held_out is None else held_out.notes))):
        say(f"data       {note}")
    every = config.variants()
    many = "" if len(every) == 1 else f", {len(every)} heads at once ({'; '.join(variant.label() for variant in every)})"
    how = f"objective by {config.impl}, projection in {config.precision}"
    say(f"learning   at most {config.prototypes} groups, {config.init} start, {how} on {device}{many}")
    if processes.size > 1:
        eager = "" if backbone.device.type == "cpu" else "; steps are not replayed from a CUDA graph"
        share = config.batch_size // processes.size
        say(f"processes  {processes.size}, each with {share} squares of every batch; partners are found within those{eager}")
    started = time.perf_counter()
    found = None if folder is None else folder.state()
    require_same_state(found, out, processes)  # before it nobody has written into the folder, behind it everybody has read
    options = dict(resample=config.resample, cache=config.cache, limit=config.limit, progress=progress, processes=processes)
    validation = None
    if held_out is not None:  # first, because labels that do not fit should be known before hours are spent
        central = dict(size=config.eval_size, crops="center", argument="--eval-size", **options)
        require_room(held_out, backbone, **central)
        squares = open_or_extract(held_out, backbone, **central)
        labels = evaluation.LabelSquares(held_out, squares, config.eval_size, processes, progress)
        validation = Validation(held_out, squares, labels, processes)
    store, stream = open_for_training(
        dataset,
        backbone,
        batch_size=config.batch_size,
        data_seed=config.data_seed,
        in_use=0 if validation is None else validation.store.nbytes,
        resumed=found is not None,
        windows=None if found is None or found.windows is None else Windows(*found.windows),
        say=say,
        size=config.size,
        crops=config.crops,
        **options,
    )
    if len(store) < 2 * processes.size:
        needed = "pairs of images need 2" if processes.size == 1 else f"{processes.size} processes need 2 each"
        raise UserError(f"--data: {len(store)} square(s) of {config.size} pixels, but {needed}; add images, or --crops slide")
    extracted = time.perf_counter()
    say(
        f"{'features' if stream is None else 'sample  '}   {len(store)} squares of {len(set(store.names))} images, "
        f"{store.grid[0]}x{store.grid[1]} patches, {store.D} channels of {backbone.name}, {store.nbytes / 2**20:.0f} MB"
        + (f"; {len(store.skipped)} images could not be used" if store.skipped else "")
        + f"; {extracted - started:.1f} s"
    )
    folder = folder if processes.first else None
    run = Run(config, store, backbone.device, validation, folder, say, progress, processes, stream)
    try:
        with deterministic(config.deterministic):
            heads = run.learn(found)
        say(f"learnt     {run.done} steps in {time.perf_counter() - extracted:.1f} s")
        broken = frozenset(variant for variant in every if variant.name in run.watch.broken)
        summary = Summary(config, dataset, store, validation, backbone, heads, run.done, broken, folder, run.records, run.report, say)
        return summary.finish()
    except KeyboardInterrupt as stop:
        raise with_kept(stop, run.kept()) from None
    except WriteError as error:
        raise WriteError(f"{error}; {run.kept()}") from error


def require_shares(batch_size: int, processes: Processes) -> None:
    """UserError unless every process has the same number of squares of each batch, and a pair of them at least."""
    n = processes.size
    if batch_size % n or batch_size < 2 * n:
        near = " or ".join(str(size) for size in sorted({max(2, batch_size // n) * n, max(2, -(-batch_size // n)) * n}))
        raise UserError(f"--batch-size {batch_size}: must be a multiple of the {n} processes, with 2 squares for each; take {near}")


def require_same_state(found: TrainingState | None, out: Path | None, processes: Processes) -> None:
    """UserError where a process has not found what another has."""
    step = 0 if found is None else found.step
    furthest = processes.largest(step)
    if step != furthest:
        raise UserError(f"--out {out}: process {processes.rank} finds step {step} there, and another step {furthest}; give a shared folder")


def resolve(config: TrainConfig, backbone: Backbone, dataset: Dataset, say: Say) -> TrainConfig:
    """Every choice that depends on the data and the backbone made: number of prototypes, sizes that are whole patches, impl.

    `dataset` is the one that figures are taken on, where there is one: its classes are counted.
    """
    changes: dict[str, Any] = {}
    for name in ("size", "eval_size"):
        size = getattr(config, name)
        whole = whole_patches(size, backbone.patch)
        if whole != size:
            say(f"{name}: {size} -> {whole} pixels, a multiple of the {backbone.patch}-pixel patch of {backbone.name}")
            changes[name] = whole
    if config.prototypes is None:
        names = dataset.class_names
        changes["prototypes"] = GROUPS_WITHOUT_LABELS if names is None else len(names)
    if config.precision == "auto":
        changes["precision"] = "bfloat16" if backbone.device.type == "cuda" else "float32"
    changes["impl"] = usable_impl(config.impl, changes.get("prototypes", config.prototypes), config.code_dim, backbone.device)
    return dataclasses.replace(config, **changes)


def usable_impl(impl: str, K: int, Z: int, device: torch.device) -> str:
    """What `impl` stands for on this device. UserError when an explicit choice cannot run: before features are taken, not after."""
    features, codes, prototypes = (torch.ones(shape, device=device) for shape in ((1, 1, 2), (1, 1, Z), (K, Z)))
    try:
        sk.smooseg_loss(features, codes, prototypes, prototypes, ["self"], torch.zeros(1, device=device), impl=impl)
    except (RuntimeError, ImportError, ValueError, TypeError) as error:
        raise UserError(f"--impl {impl}: cannot run on {device}: {error}") from error
    return sk.resolve_impl(impl, (K, Z), features, codes, prototypes)


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
        self.watch = Watch(self.variants)
        self.drift_stops = False  # whether --on-drift asks for an end here
        self.done = 0  # steps
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
            if found is not None and found.losses and self.log_is_due() and not any(r["step"] == first for r in self.records):
                self.log(loop.heads, found.losses, bar)
            while self.done < config.steps and not self.drift_stops:
                losses = loop.step(self.done)._asdict()
                self.done += 1
                if self.done == first + 1 and loop.not_captured is not None:
                    self.say(f"warning    steps are not replayed from a CUDA graph, but run one by one: {loop.not_captured}")
                bar.update()
                if self.log_is_due() and not (self.alone and stop.number):
                    # what a signal cuts short here is made again from the saved losses; several processes exchange counts and end it
                    with stop.at_once() if self.alone else nullcontext():
                        self.log(loop.heads, losses, bar)
                stopped = self.processes.largest(stop.number or 0)  # by a signal to any of them, and behind the same step
                late = time.monotonic() - self.written > SAVE_S or not loop.schedule.ready(self.done)  # before hours in a backbone
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
            schedule = Schedule(len(store), config.batch_size, config.data_seed, self.processes.size, self.processes.rank)
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
            rows = evaluation.sample_patches(self.store, seed).to(self.device)
            if len(rows) < config.prototypes:
                raise UserError(f"--prototypes: {config.prototypes} groups cannot start from {len(rows)} patches; ask for fewer")
            head.start_from_features(rows, seed)
        return head

    def features(self) -> Tensor | Callable[[Tensor], Tensor]:
        """On a GPU all features, where they take at most 60 % of its free memory; else rows through the memory map."""
        dtype, rows = getattr(torch, self.config.precision), self.store.rows if self.stream is None else self.stream.features
        nbytes = len(self.store) * self.store.P * self.store.D * dtype.itemsize
        if self.device.type != "cuda" or self.stream is not None or nbytes > 0.6 * torch.cuda.mem_get_info(self.device)[0]:
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
        states = health(heads, evaluation.batches(self.store, self.device, WATCHED_ROWS))
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
            for h, record in enumerate(records):
                scores = hungarian(self.validation.confusion(heads[h]))
                record |= {"accuracy": scores.accuracy, "miou": scores.miou}
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
            state = TrainingState(self.config, self.done, loop.heads, optimizer_tensors(loop.optimizer), losses, windows)
            state.write(self.folder.path / TRAINING)
            self.saved, self.written = self.done, time.monotonic()


def live(record: dict[str, Any], rate: float | None, squares: int) -> str:
    """The first head's figures for the progress line, which has to fit in 100 columns; E is energy within / across / data term.

    rate: steps a second. squares: of a step.
    """
    speed = f"{rate * squares:.0f} img/s, " if rate else ""
    within, across = (f"{record[name]:.3f}".replace("-0.", "-.") for name in ("energy_within", "energy_across"))
    return f"{speed}E {within}/{across}/{record['data']:.2f}, {record['perplexity']:.1f} labels"
