"""A run from images to a trained segmenter: its checks, its features, its steps and its end."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

import smooseg_kernels as sk

from ..backbones import Backbone, load_backbone
from ..backbones.auto import candidates, explained, look
from ..backbones.catalogue import BUILT_IN
from ..config import AUTO, FINE, FIT, TUNING, Crops, TrainConfig, preset, with_changes
from ..datasets import ArrayDataset, Dataset
from ..datasets.copies import copies_notes
from ..datasets.demo import datasets_of
from ..datasets.images import whole_patches
from ..datasets.inspection import is_grey, label_lines
from ..errors import UserError, WriteError
from ..features.extract import open_or_extract
from ..features.job import FeatureOptions, Job
from ..features.room import Windows, require_room
from ..features.store import FeatureStore
from ..measure.confusion import LabelSquares
from ..segment.checkpoint import TrainingState
from ..segment.segmenter import Segmenter, pick_device
from ..system.host import deterministic, keep_freed_memory, plain_torch
from ..system.processes import ALONE, Processes
from ..system.signals import with_kept
from ..system.stores import require_local
from .board import require_board
from .callbacks import Callback, checked
from .run import Run
from .runfolder import RunFolder
from .setting import Say, Setting
from .shares import Shares
from .stream import Stream, open_for_training
from .summary import finish

GROUPS_WITHOUT_LABELS = 16


def fit(
    images: str | Path | Sequence[np.ndarray],
    *,
    out: str | Path | None = None,
    preset_name: str = "folder",
    progress: bool = True,
    say: Say | None = None,
    callbacks: Sequence[Callback] = (),
    **settings: Any,
) -> Segmenter:
    """Learns to segment `images` without labels.

    Args:
        images: a folder (any nesting, the labelled layout, or that of a benchmark's owner), one image file, the URL of
            either in a store, tar files (shard-{000..010}.tar), or a sequence of uint8 [H,W,3] arrays.
        out: folder for checkpoint, figures and pictures; without it, nothing is written except the feature cache.
        preset_name: the preset that the other settings start from.
        say: takes each line of text about the run; the default drops them.
        callbacks: functions that take a `callbacks.Progress` after every step, or objects with on_step or on_epoch. A
            run without steps, which a tree alone makes, calls none.
        settings: any field of TrainConfig, such as groups=6, granularity=0.06, steps=400,
            backbone="facebook/dino-vits8".

    Raises:
        UserError: in one line, for impossible settings or images; WriteError, one of them, for a full disk.
        Interrupted: a KeyboardInterrupt, after Ctrl-C; its text tells what is kept in `out`, where the same call
            resumes.
    """
    require_local(out, "out")
    listeners = checked(callbacks)
    data = str(images) if isinstance(images, (str, Path)) else None
    config = with_changes(preset(preset_name), data=data, **settings)
    dataset: Dataset
    held_out: Dataset | None = None
    if isinstance(images, (str, Path)):
        dataset, held_out = datasets_of(config)
    else:
        dataset = ArrayDataset(list(images))
    out, say = None if out is None else Path(out).expanduser(), say or (lambda line: None)
    return learn(config, dataset, held_out, out=out, progress=progress, say=say, callbacks=listeners)


@plain_torch()
def learn(
    config: TrainConfig,
    dataset: Dataset,
    held_out: Dataset | None,
    *,
    out: Path | None,
    progress: bool,
    say: Say,
    processes: Processes = ALONE,
    callbacks: tuple[Callback, ...] = (),
    started: float | None = None,
) -> Segmenter:
    """Learns one run; resumes the unfinished one of the same configuration in `out`. The first process alone writes.

    held_out: labelled images to measure on; None for no figures with labels. out: None to write nothing.
    started: `time.perf_counter()` at the beginning of the command; None for now.
    """
    started = time.perf_counter() if started is None else started
    device = processes.device(pick_device(config.device))
    keep_freed_memory()
    require_board(config.log)
    folder = None if out is None else RunFolder(out, config)
    config = choose_backbone(config, dataset, folder, say, processes)
    backbone = load_backbone(config.backbone, device, config.backbone_precision)
    asked, config = config, resolve(config, backbone, dataset if held_out is None else held_out, say)
    if config.steps is None:
        helps = processes.decide(processes.first and backbone.name != BUILT_IN and not is_grey(dataset))
        config = dataclasses.replace(config, steps=TUNING if helps else 0)
    if folder is not None and folder.finished(config):
        checkpoint = folder.checkpoint()
        say(f"{out}: this run is finished, step {checkpoint.step} of {config.steps}; give another --out to train again")
        return Segmenter(checkpoint, backbone)

    for note in dict.fromkeys(note for part in (dataset, held_out) if part is not None for note in part.notes):
        say(f"data       {note}")
    for note in copies_notes(dataset, held_out):
        say(f"data       {note}")
    for title, line in [] if held_out is None else label_lines(held_out):
        say(f"{title:11}{line}")
    say_plan(config, device, say, processes)
    with folder.held() if folder is not None and processes.first else nullcontext():
        state = None if folder is None else folder.state(config)
        # before this check nobody has written into the folder, and after it everybody has read it
        require_same_state(state, out, processes)
        options = FeatureOptions(
            size=config.sides[0],
            crops=config.crops,
            resample=config.resample,
            scale=config.scale,
            margin=config.margin,
            cache=config.cache,
            limit=config.limit,
            progress=progress,
            processes=processes,
        )
        # first, so that labels that do not fit are known early
        validation = None if held_out is None else open_validation(config, held_out, backbone, options)
        in_use = 0 if validation is None else validation.store.nbytes
        store, stream = open_features(config, dataset, backbone, options, state=state, in_use=in_use, say=say)
        if asked.prototypes is None and config.tree:  # the tree of a few small images is as fine as they are
            patches = max(2, len(store) * store.P)
            config = dataclasses.replace(config, prototypes=min(config.prototypes or patches, patches))
        setting = Setting(
            config=config,
            dataset=dataset,
            store=store,
            stream=stream,
            validation=validation,
            backbone=backbone,
            folder=folder,
            say=say,
            progress=progress,
            processes=processes,
            callbacks=callbacks,
            started=started,
        )
        return learn_from(setting, state)


def learn_from(setting: Setting, state: TrainingState | None) -> Segmenter:
    """Takes the steps of a run and ends it. A stop or a full disk tells what is kept."""
    run, started = Run(setting, state), time.perf_counter()
    try:
        with deterministic(setting.config.deterministic):
            run.learn()
        if run.done:
            setting.say(f"learnt     {run.done} steps in {time.perf_counter() - started:.1f} s")
        return finish(run)
    except KeyboardInterrupt as stop:
        raise with_kept(stop, run.kept()) from None
    except WriteError as error:
        raise WriteError(f"{error}; {run.kept()}") from error


def say_plan(config: TrainConfig, device: str, say: Say, processes: Processes) -> None:
    """Tells what is about to be learnt, how and where."""
    heads = f", {config.heads} seeds" if config.heads > 1 else ""
    if config.granularity is not None and len(config.granularity) > 1:
        first, *others = (f"{value:g}" for value in config.granularity)
        heads = f", at {len(others) + 1} granularities at once: {first} (predicts), {', '.join(others)}{heads}"
    groups = (
        f"groups by a tree of {config.prototypes} fine ones" if config.tree else f"at most {config.prototypes} groups"
    )
    steps = f", then {config.steps} steps of training" if config.tree and config.steps else ""
    say(f"learning   {groups}{steps} on {device}{heads}")
    if config.verbose:
        say(f"           {config.init} start, objective by {config.impl}, projection in {config.precision}")
    if processes.size > 1:
        lengths = ", ".join(map(str, Shares(len(config.variants()), processes).lengths))
        say(f"processes  {processes.size}: all share features and evaluation; heads learnt by each: {lengths}")


def open_validation(
    config: TrainConfig, held_out: Dataset, backbone: Backbone, options: FeatureOptions
) -> LabelSquares:
    """Features and labels of the images to measure on, in central squares of --eval-size; in tiles of that side at
    another scale than fit."""
    size = config.sides[1]
    crops: Crops = "center" if config.scale == (FIT,) else "tiles"
    options = dataclasses.replace(options, size=size, crops=crops, argument="--eval-size")
    require_room(held_out, backbone, options)
    store = open_or_extract(held_out, backbone, options)
    cutting = Job(held_out, backbone, options).cutting
    return LabelSquares(held_out, store, cutting, options.processes, options.progress)


def open_features(
    config: TrainConfig,
    dataset: Dataset,
    backbone: Backbone,
    options: FeatureOptions,
    *,
    state: TrainingState | None,
    in_use: int,
    say: Say,
) -> tuple[FeatureStore, Stream | None]:
    """Features of all squares and None; or those of a sample, and the stream that brings the batches."""
    started = time.perf_counter()
    store, stream = open_for_training(
        dataset,
        backbone,
        options,
        batch_size=config.batch_size,
        data_seed=config.data_seed,
        in_use=in_use,
        resumed=state is not None,
        windows=None if state is None or state.windows is None else Windows(*state.windows),
        say=say,
    )
    if len(store) < 2:
        more = "add images" if config.crops == "slide" else "add images, or --crops slide"
        raise UserError(f"--data: {len(store)} square(s) of {config.size} pixels, but pairs of images need 2; {more}")
    skipped = f"; {len(store.skipped)} images could not be used" if store.skipped else ""
    say(
        f"{'features' if stream is None else 'sample  '}   {len(store)} squares of {len(set(store.names))} images, "
        f"{store.grid[0]}x{store.grid[1]} patches, {store.D} channels of {backbone.name}, "
        f"{store.nbytes / 2**20:.0f} MB{skipped}; {time.perf_counter() - started:.1f} s"
    )
    return store, stream


def require_same_state(state: TrainingState | None, out: Path | None, processes: Processes) -> None:
    """UserError where a process does not find the state that another finds."""
    steps = processes.all(0 if state is None else state.step)
    if len(set(steps)) > 1:
        raise UserError(f"--out {out}: the processes find the steps {steps} there; give a shared folder")


def choose_backbone(
    config: TrainConfig, dataset: Dataset, folder: RunFolder | None, say: Say, processes: Processes
) -> TrainConfig:
    """`config` with the backbone that "auto" stands for: the one that the run in `folder` began with, else the best
    that is here for these images. The first process chooses for all."""
    if config.backbone != AUTO:
        return config
    here = look()
    best = candidates(here, grey=processes.first and is_grey(dataset))[0]
    best, begun_with = processes.all((best, None if folder is None else folder.begun_with))[0]
    name = begun_with or best.name
    lines = explained(best, here)
    if name != best.name:
        if ":" in name:
            why = f"the run in --out began with {name}, and a folder never imports code by itself"
            raise UserError(f"--backbone: missing; {why}: add --backbone {name}")
        lines = [f"backbone   {name}, as this run began; with another --out, auto takes {best.name} ({best.reason})"]
    for line in lines:
        say(line)
    if folder is not None:
        folder.settle(name)
    return dataclasses.replace(config, backbone=name)


def resolve(config: TrainConfig, backbone: Backbone, dataset: Dataset, say: Say) -> TrainConfig:
    """Makes every choice that depends on data and backbone: prototypes, sizes in whole patches, impl, precision.

    dataset: the images to measure on, or else those to learn from; its classes are counted.
    """
    patch, K = backbone.patch, config.prototypes
    changes: dict[str, Any] = {}
    for name, suits in zip(("size", "eval_size"), backbone.sizes):
        asked = getattr(config, name) or suits
        changes[name] = whole_patches(asked, patch)
        if changes[name] != asked:
            multiple = f"a multiple of the {patch}-pixel patch of {backbone.name}"
            say(f"{name}: {asked} -> {changes[name]} pixels, {multiple}")
    if config.grid_crops != config.crops:
        changes["crops"] = config.grid_crops
        say(f"crops      slide -> tiles, at --scale {' '.join(config.scale)}")
    if config.margin % patch:
        changes["margin"] = whole_patches(config.margin, patch)
        multiple = f"a multiple of the {patch}-pixel patch of {backbone.name}"
        say(f"margin: {config.margin} -> {changes['margin']} pixels, {multiple}")
    if K is None and config.tree:
        K = FINE
    elif K is None:
        K = GROUPS_WITHOUT_LABELS if dataset.class_names is None else max(2, len(dataset.class_names))
    precision = config.precision
    if precision == "auto":
        precision = "bfloat16" if backbone.device.type == "cuda" else "float32"
    changes["impl"] = usable_impl(config.impl, K, config.code_dim, backbone.device)
    return dataclasses.replace(config, prototypes=K, precision=precision, **changes)


def usable_impl(impl: str, K: int, Z: int, device: torch.device) -> str:
    """The implementation that `impl` stands for on this device. UserError when an explicit choice cannot run."""
    features, codes, prototypes = (torch.ones(shape, device=device) for shape in ((1, 1, 2), (1, 1, Z), (K, Z)))
    try:
        sk.smooseg_loss(features, codes, prototypes, prototypes, ["self"], torch.zeros(1, device=device), impl=impl)
    except (RuntimeError, ImportError, ValueError, TypeError) as error:
        raise UserError(f"--impl {impl}: cannot run on {device}: {error}") from error
    return sk.resolve_impl(impl, (K, Z), features, codes, prototypes)
