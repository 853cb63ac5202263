"""A run from images to a trained segmenter: what has to be true before it, its features, its steps and its summary."""

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
from ..config import TrainConfig, preset, with_changes
from ..datasets import ArrayDataset, Dataset, open_splits
from ..datasets.images import whole_patches
from ..errors import UserError, WriteError
from ..features.extract import open_or_extract
from ..features.job import FeatureOptions
from ..features.room import Windows, require_room
from ..features.store import FeatureStore
from ..measure.confusion import LabelSquares
from ..measure.validation import Validation
from ..segment.checkpoint import TrainingState
from ..segment.segmenter import Segmenter, pick_device
from ..system.host import deterministic, keep_freed_memory
from ..system.processes import ALONE, Processes
from ..system.signals import with_kept
from .board import require_tensorboard
from .run import Run, Say
from .runfolder import RunFolder
from .stream import Stream, open_for_training
from .summary import Summary

GROUPS_WITHOUT_LABELS = 16


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
    return learn(
        config,
        dataset,
        held_out,
        out=None if out is None else Path(out).expanduser(),
        progress=progress,
        say=say or (lambda line: None),
    )


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
        say(
            f"{out}: this run is finished, step {checkpoint.step} of {config.steps}; --out another folder to train again"
        )
        return Segmenter(checkpoint, backbone)

    for note in dict.fromkeys((*dataset.notes, *(() if held_out is None else held_out.notes))):
        say(f"data       {note}")
    tell_plan(config, backbone, device, say, processes)
    with nullcontext() if folder is None or not processes.first else folder.held():
        found = None if folder is None else folder.state()
        require_same_state(
            found, out, processes
        )  # before it nobody has written into the folder, behind it everybody has read
        store, stream, validation = open_features(config, dataset, held_out, backbone, found, progress, say, processes)
        extracted = time.perf_counter()
        run = Run(
            config,
            store,
            backbone.device,
            validation,
            folder if processes.first else None,
            say,
            progress,
            processes,
            stream,
        )
        try:
            with deterministic(config.deterministic):
                heads = run.learn(found)
            say(f"learnt     {run.done} steps in {time.perf_counter() - extracted:.1f} s")
            return Summary(
                config,
                dataset,
                store,
                validation,
                backbone,
                heads,
                run.done,
                frozenset(variant for variant in config.variants() if variant.name in run.watch.broken),
                run.folder,
                run.records,
                run.counts if run.counted == run.done else {},
                run.report,
                say,
            ).finish()
        except KeyboardInterrupt as stop:
            raise with_kept(stop, run.kept()) from None
        except WriteError as error:
            raise WriteError(f"{error}; {run.kept()}") from error


def tell_plan(config: TrainConfig, backbone: Backbone, device: str, say: Say, processes: Processes) -> None:
    every = config.variants()
    many = (
        "" if len(every) == 1 else f", {len(every)} heads at once ({'; '.join(variant.label() for variant in every)})"
    )
    how = f"objective by {config.impl}, projection in {config.precision}"
    groups = "1 group" if config.prototypes == 1 else f"{config.prototypes} groups"
    say(f"learning   at most {groups}, {config.init} start, {how} on {device}{many}")
    if config.prototypes == 1:
        say("warning    every pixel will be of the one group; ask for more with --prototypes")
    if processes.size > 1:
        eager = "" if backbone.device.type == "cpu" else "; steps are not replayed from a CUDA graph"
        share = config.batch_size // processes.size
        say(
            f"processes  {processes.size}, each with {share} squares of every batch; partners are found within those{eager}"
        )


def open_features(
    config: TrainConfig,
    dataset: Dataset,
    held_out: Dataset | None,
    backbone: Backbone,
    found: TrainingState | None,
    progress: bool,
    say: Say,
    processes: Processes,
) -> tuple[FeatureStore, Stream | None, Validation | None]:
    """(what to learn from, where its batches come from if it is only a sample, what to take figures on if there are labels)."""
    started = time.perf_counter()
    options = FeatureOptions(
        size=config.size,
        crops=config.crops,
        resample=config.resample,
        cache=config.cache,
        limit=config.limit,
        progress=progress,
        processes=processes,
    )
    validation = None
    if held_out is not None:  # first, because labels that do not fit should be known before hours are spent
        central = dataclasses.replace(options, size=config.eval_size, crops="center", argument="--eval-size")
        require_room(held_out, backbone, central)
        squares = open_or_extract(held_out, backbone, central)
        labels = LabelSquares(held_out, squares, config.eval_size, processes, progress)
        validation = Validation(held_out, squares, labels, processes)
    store, stream = open_for_training(
        dataset,
        backbone,
        options,
        batch_size=config.batch_size,
        data_seed=config.data_seed,
        in_use=0 if validation is None else validation.store.nbytes,
        resumed=found is not None,
        windows=None if found is None or found.windows is None else Windows(*found.windows),
        say=say,
    )
    if len(store) < 2 * processes.size:
        needed = "pairs of images need 2" if processes.size == 1 else f"{processes.size} processes need 2 each"
        more = "add images" if config.crops == "slide" else "add images, or --crops slide"
        raise UserError(f"--data: {len(store)} square(s) of {config.size} pixels, but {needed}; {more}")
    say(
        f"{'features' if stream is None else 'sample  '}   {len(store)} squares of {len(set(store.names))} images, "
        f"{store.grid[0]}x{store.grid[1]} patches, {store.D} channels of {backbone.name}, {store.nbytes / 2**20:.0f} MB"
        + (f"; {len(store.skipped)} images could not be used" if store.skipped else "")
        + f"; {time.perf_counter() - started:.1f} s"
    )
    return store, stream, validation


def require_shares(batch_size: int, processes: Processes) -> None:
    """UserError unless every process has the same number of squares of each batch, and a pair of them at least."""
    n = processes.size
    if batch_size % n or batch_size < 2 * n:
        near = " or ".join(str(size) for size in sorted({max(2, batch_size // n) * n, max(2, -(-batch_size // n)) * n}))
        raise UserError(
            f"--batch-size {batch_size}: must be a multiple of the {n} processes, with 2 squares for each; take {near}"
        )


def require_same_state(found: TrainingState | None, out: Path | None, processes: Processes) -> None:
    """UserError where a process has not found what another has."""
    step = 0 if found is None else found.step
    furthest = processes.largest(step)
    if step != furthest:
        raise UserError(
            f"--out {out}: process {processes.rank} finds step {step} there, and another step {furthest}; give a shared folder"
        )


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
    changes["impl"] = usable_impl(
        config.impl, changes.get("prototypes", config.prototypes), config.code_dim, backbone.device
    )
    return dataclasses.replace(config, **changes)


def usable_impl(impl: str, K: int, Z: int, device: torch.device) -> str:
    """What `impl` stands for on this device. UserError when an explicit choice cannot run: before features are taken, not after."""
    features, codes, prototypes = (torch.ones(shape, device=device) for shape in ((1, 1, 2), (1, 1, Z), (K, Z)))
    try:
        sk.smooseg_loss(features, codes, prototypes, prototypes, ["self"], torch.zeros(1, device=device), impl=impl)
    except (RuntimeError, ImportError, ValueError, TypeError) as error:
        raise UserError(f"--impl {impl}: cannot run on {device}: {error}") from error
    return sk.resolve_impl(impl, (K, Z), features, codes, prototypes)
