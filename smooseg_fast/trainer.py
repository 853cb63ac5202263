"""A run from images to a trained segmenter: features, start, steps, states saved on the way, and the summary."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import smooseg_kernels as sk

from . import evaluation
from .backbones import Backbone, load_backbone
from .board import Board, require_tensorboard
from .checkpoint import TrainingState, optimizer_tensors, restore_optimizer
from .config import TrainConfig, Variant, preset, with_changes
from .datasets import ArrayDataset, Dataset, open_splits
from .errors import UserError
from .extract import open_or_extract
from .health import closeness, health, warning
from .host import keep_freed_memory, make_deterministic
from .loop import Loop
from .metrics import hungarian
from .model import Head, Heads
from .mosaic import Mosaic
from .objective import Schedule, Settings
from .processes import ALONE, Processes
from .runfolder import BOARD, TRAINING, RunFolder
from .segmenter import Segmenter, pick_device
from .signals import Interrupted, StopRequest
from .store import FeatureStore
from .summary import Summary, Validation

GROUPS_WITHOUT_LABELS = 16
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
        images: a folder (any nesting, or the labelled layout), one image file, or a sequence of uint8 [H,W,3] arrays.
        out: folder for checkpoint, figures and pictures; nothing is written without it but the feature cache.
        preset_name: where the other settings start from.
        say: what to do with each line about the run; nothing by default.
        settings: any field of TrainConfig, such as granularity=0.06, prototypes=12, steps=400, backbone="facebook/dino-vits8".

    Raises:
        UserError: in one line, for settings or images that cannot be.
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
    if config.deterministic:
        make_deterministic()
    backbone = load_backbone(config.backbone, device)
    wanted, config = config, resolve(config, backbone, dataset if held_out is None else held_out, say)
    folder = None if out is None else RunFolder(out, wanted)
    if folder is not None and folder.finished():
        say(f"{out}: this run is finished, step {config.steps} of {config.steps}; --out another folder to train again")
        return Segmenter(folder.checkpoint(), backbone)

    every = config.variants()
    many = "" if len(every) == 1 else f", {len(every)} heads at once ({'; '.join(variant.label() for variant in every)})"
    say(f"learning   at most {config.prototypes} groups, {config.init} start, objective by {config.impl} on {device}{many}")
    if processes.size > 1:
        eager = "" if backbone.device.type == "cpu" else "; steps are not replayed from a CUDA graph"
        share = config.batch_size // processes.size
        say(f"processes  {processes.size}, each with {share} squares of every batch; partners are found within those{eager}")
    started = time.perf_counter()
    options = dict(resample=config.resample, cache=config.cache, progress=progress, processes=processes)
    validation = None
    if held_out is not None:  # first, because labels that do not fit should be known before hours are spent
        squares = open_or_extract(held_out, backbone, size=config.eval_size, crops="center", **options)
        labels = evaluation.label_squares(held_out, squares, config.eval_size)
        validation = Validation(held_out, squares, labels, processes)
    store = open_or_extract(dataset, backbone, size=config.size, crops=config.crops, **options)
    if len(store) < 2 * processes.size:
        needed = "pairs of images need 2" if processes.size == 1 else f"{processes.size} processes need 2 each"
        raise UserError(f"--data: {len(store)} square(s) of {config.size} pixels, but {needed}; add images, or --crops slide")
    extracted = time.perf_counter()
    say(
        f"features   {len(store)} squares of {len(dataset) - len(store.skipped)} images, {store.grid[0]}x{store.grid[1]} patches, "
        f"{store.D} channels of {backbone.name}, {store.nbytes / 2**20:.0f} MB"
        + (f"; {len(store.skipped)} images could not be used" if store.skipped else "")
        + f"; {extracted - started:.1f} s"
    )
    found = None if folder is None else folder.state()
    require_same_state(found, out, processes)  # before it nobody has written into the folder, behind it everybody has read
    folder = folder if processes.first else None
    run = Run(config, store, backbone.device, validation, folder, say, progress, processes)
    heads = run.learn(found)
    say(f"learnt     {config.steps} steps in {time.perf_counter() - extracted:.1f} s")
    broken = frozenset(run.broken)
    return Summary(config, dataset, store, validation, backbone, heads, broken, folder, run.records, run.report, say).finish()


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
        whole = max(1, round(size / backbone.patch)) * backbone.patch
        if whole != size:
            say(f"{name}: {size} -> {whole} pixels, a multiple of the {backbone.patch}-pixel patch of {backbone.name}")
            changes[name] = whole
    if config.prototypes is None:
        names = dataset.class_names
        changes["prototypes"] = GROUPS_WITHOUT_LABELS if names is None else len(names)
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
    ):
        self.config, self.store, self.device, self.validation = config, store, device, validation
        self.folder, self.say, self.progress, self.processes = folder, say, progress, processes
        self.variants = config.variants()
        self.records: list[dict[str, Any]] = []
        self.report: dict[str, Any] = {}
        self.board: Board | None = None
        self.broken: list[Variant] = []  # heads whose losses are no numbers any more

    def learn(self, found: TrainingState | None) -> Heads:
        """All steps from the saved state, or from the start, to the end."""
        config, first = self.config, 0 if found is None else found.step
        heads = self.start() if found is None else found.heads.to(self.device)
        self.processes.as_first(list(heads.state_dict().values()))  # machines may differ in the last bits
        loop = self.loop(heads)
        if found is not None:
            restore_optimizer(loop.optimizer, found.optimizer)
            self.say(f"resume     from step {first} of {config.steps}")
        if self.folder is not None:
            self.records = self.folder.resume(first)
            self.board = Board(self.folder.path / BOARD, first) if config.log == "tensorboard" else None
        self.tell_closeness()
        bar = tqdm(total=config.steps, initial=first, desc="train", unit="step", disable=not self.progress, dynamic_ncols=True)
        with bar, StopRequest() as stop:
            for step in range(first, config.steps):
                loss = loop.step(step)
                if step == first and loop.not_captured is not None:
                    self.say(f"warning    steps are not replayed from a CUDA graph, but run one by one: {loop.not_captured}")
                bar.update()
                stopped = self.processes.largest(stop.number or 0)  # by a signal to any of them, and behind the same step
                done, last = step + 1, step + 1 == config.steps
                if done % config.log_every == 0 or last:
                    self.log(done, loop.heads, loss, bar)
                if done % config.checkpoint_every == 0 or last or stopped:
                    self.write(loop, done)
                if stopped and not last:
                    bar.close()
                    self.say_interrupted(done)
                    self.processes.wait()  # the end of one would be the end of another that still writes
                    raise Interrupted(stopped)
        if self.board is not None:
            self.board.close()
        return loop.heads

    def loop(self, heads: Heads) -> Loop:
        config, store = self.config, self.store
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
        """On a GPU all features, where they take at most 60 % of its free memory, in bf16; else rows through the memory map."""
        if self.device.type != "cuda":
            return self.store.rows
        if self.store.nbytes > 0.6 * torch.cuda.mem_get_info(self.device)[0]:
            return functools.partial(self.store.rows, dtype=torch.bfloat16)
        return self.store.load(self.device, torch.bfloat16)

    def tell_closeness(self) -> None:
        """Of the first granularity or pair of thresholds: the closeness itself is common to all."""
        sample = self.store.rows(evaluation.spread(len(self.store), 48))
        within, across = closeness(sample, self.variants[0].thresholds, self.config.relative)
        self.say(f"closeness  within images  {within.line()}")
        self.say(f"           across images  {across.line()}")
        problem = warning(within, across)
        if problem:
            self.say(f"warning    {problem}")
        self.report["closeness"] = {"within": dataclasses.asdict(within), "across": dataclasses.asdict(across)}

    def log(self, step: int, heads: Heads, loss: sk.SmooSegLoss, bar: tqdm) -> None:
        """One line of metrics for each head; heads that have become useless are named."""
        states = health(heads, evaluation.batches(self.store, self.device, WATCHED_ROWS))
        total, energy, data, distance, mean = (value.detach().float().cpu() for value in loss)
        for h, (variant, state) in enumerate(zip(self.variants, states)):
            record = {
                "step": step,
                "head": variant.name,
                "total": float(total[h]),
                "energy_within": float(energy[h, 0]),
                "energy_across": float(energy[h, 1]),
                "data": float(data[h]),
                "distance_within": float(distance[h, 0]),
                "distance_across": float(distance[h, 1]),
                "closeness_within": float(mean[0]),
                "closeness_across": float(mean[1]),
                "perplexity": state.perplexity,
                "labels_per_image": state.labels_per_image,
                "image_information": state.image_information,
                "agreement": state.agreement,
                "largest_share": max(state.shares),
            }
            at_checkpoint = step % self.config.checkpoint_every == 0 or step == self.config.steps
            if self.validation is not None and at_checkpoint:
                scores = hungarian(self.validation.confusion(heads[h]))
                record |= {"accuracy": scores.accuracy, "miou": scores.miou}
            self.records.append(record)
            if self.folder is not None:
                self.folder.metrics.append(record)
            if self.board is not None:
                self.board.add(record)
            self.watch(step, variant, record)
        first, rate = states[0], bar.format_dict["rate"]
        speed = f"{rate * min(self.config.batch_size, len(self.store)):.0f} images/s, " if rate else ""
        bar.set_postfix_str(f"{speed}total {float(total[0]):.3f}, {first.perplexity:.1f} labels in use, agreement {first.agreement:.2f}")

    def watch(self, step: int, variant: Variant, record: dict[str, Any]) -> None:
        """UserError when no head is left: what was saved before stays as it is."""
        if not math.isfinite(record["total"]) and variant not in self.broken:
            self.broken.append(variant)
            self.say(f"warning    step {step}: the losses of {variant.label()} are no numbers any more; it is left out at the end")
        if len(self.broken) == len(self.variants):
            raise UserError(f"--lr: at step {step} the losses of every head are no numbers any more; try a lower --lr and --lr-prototypes")

    def write(self, loop: Loop, step: int) -> None:
        if self.folder is not None:
            state = TrainingState(self.config, step, loop.heads, optimizer_tensors(loop.optimizer))
            state.write(self.folder.path / TRAINING)

    def say_interrupted(self, done: int) -> None:
        if self.folder is None:
            self.say("interrupted; nothing is kept of a run without an output folder")
        else:
            self.say(f"interrupted; step {done} of {self.config.steps} is saved in {self.folder.path}: the same command resumes there")
