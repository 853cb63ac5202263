"""A run from images to a trained segmenter: features, start, steps, checkpoints, figures and pictures."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

import smooseg_kernels as sk

from . import evaluation, pictures
from .backbones import Backbone, load_backbone
from .backbones.base import reason
from .checkpoint import Checkpoint, optimizer_tensors, read_checkpoint, restore_optimizer
from .config import TrainConfig, preset, with_changes
from .datasets import ArrayDataset, Dataset, open_splits
from .errors import UserError
from .extract import open_or_extract
from .files import write_json
from .health import closeness, health, warning
from .images import ImageError
from .kmeans import spherical_kmeans
from .metrics import Scores, hungarian, majority, percent
from .model import Head
from .mosaic import Mosaic
from .objective import Schedule, Settings, make_optimizer, train_step
from .outfolder import Journal, OutFolder
from .segmenter import Segmenter, pick_device
from .sheet import NAMED, groups_sheet
from .signals import Interrupted, StopRequest
from .store import FeatureStore

CHECKPOINT, METRICS, RUN, REPORT = "checkpoint.safetensors", "metrics.jsonl", "run.json", "report.json"
GROUPS, CURVES = "groups.png", "curves.png"
GROUPS_WITHOUT_LABELS = 16
WATCHED_ROWS = 16  # squares whose labels are looked at for each line of the log

Say = Callable[[str], None]


@dataclass
class Validation:
    """Labelled images that figures are taken on; never seen by training unless the dataset has no split."""

    dataset: Dataset
    store: FeatureStore
    labels: np.ndarray  # uint8 [N,S,S]

    def confusion(self, head: Head) -> np.ndarray:
        return self._count(evaluation.head_codes(head, self.store), head.teacher)

    def kmeans(self, centres: Tensor) -> Scores:
        """Plain k-means centres [K,D] on the same features: what any learning has to beat."""
        return hungarian(self._count(self.store.rows, centres))

    def _count(self, codes: Callable[[Tensor], Tensor], prototypes: Tensor) -> np.ndarray:
        classes = len(self.dataset.class_names)
        return evaluation.confusion_of(codes, len(self.store), prototypes, self.store.grid, self.labels, classes)


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


def learn(config: TrainConfig, dataset: Dataset, held_out: Dataset | None, *, out: Path | None, progress: bool, say: Say) -> Segmenter:
    """One run; resumes the unfinished one of the same configuration in `out`."""
    device = pick_device(config.device)
    backbone = load_backbone(config.backbone, device)
    wanted, config = config, resolve(config, backbone, dataset if held_out is None else held_out, say)
    folder = None if out is None else RunFolder(out, wanted)
    found = None if folder is None else folder.checkpoint()
    if found is not None and folder.finished():
        say(f"{out}: this run is finished, step {found.step} of {config.steps}; --out another folder to train again")
        return Segmenter(found, backbone)

    say(f"learning   at most {config.prototypes} groups, {config.init} start, objective by {config.impl} on {device}")
    started = time.perf_counter()
    options = dict(resample=config.resample, cache=config.cache, progress=progress)
    validation = None
    if held_out is not None:  # first, because labels that do not fit should be known before hours are spent
        squares = open_or_extract(held_out, backbone, size=config.eval_size, crops="center", **options)
        labels = evaluation.label_squares(held_out, squares, config.eval_size)
        validation = Validation(held_out, squares, labels)
    store = open_or_extract(dataset, backbone, size=config.size, crops=config.crops, **options)
    if len(store) < 2:
        raise UserError(f"--data: {len(store)} square of {config.size} pixels, but pairs of images need 2; add images, or --crops slide")
    extracted = time.perf_counter()
    say(
        f"features   {len(store)} squares of {len(dataset) - len(store.skipped)} images, {store.grid[0]}x{store.grid[1]} patches, "
        f"{store.D} channels of {backbone.name}, {store.nbytes / 2**20:.0f} MB"
        + (f"; {len(store.skipped)} images could not be used" if store.skipped else "")
        + f"; {extracted - started:.1f} s"
    )
    run = Run(config, store, backbone, validation, folder, say, progress)
    segmenter = run.learn(found)
    say(f"learnt     {config.steps} steps in {time.perf_counter() - extracted:.1f} s")
    run.finish(segmenter, dataset)
    return segmenter


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


class RunFolder(OutFolder):
    """The folder of one run: its settings, checkpoint and metrics. UserError when it holds another run."""

    def __init__(self, path: Path, config: TrainConfig):
        super().__init__(path, config.learning(), record=RUN, made=CHECKPOINT)
        self.metrics = Journal(path / METRICS)

    def checkpoint(self) -> Checkpoint | None:
        return read_checkpoint(self.path / CHECKPOINT) if (self.path / CHECKPOINT).exists() else None

    def finished(self) -> bool:
        """Whether all that a run leaves is there; pictures that failed, or were taken away, are drawn by running again."""
        return all((self.path / name).exists() for name in (REPORT, GROUPS, CURVES))

    def resume(self, step: int) -> list[dict[str, Any]]:
        """The metrics up to `step`; the folder is this run's from here on, and what a run before wrote beyond that step goes."""
        self.claim()
        records = [record for record in self.metrics.read() if record.get("step", 0) <= step]
        self.metrics.rewrite(records)
        return records


class Run:
    """The steps of one run and what is told about them."""

    def __init__(
        self,
        config: TrainConfig,
        store: FeatureStore,
        backbone: Backbone,
        validation: Validation | None,
        folder: RunFolder | None,
        say: Say,
        progress: bool,
    ):
        self.config, self.store, self.backbone, self.validation = config, store, backbone, validation
        self.folder, self.say, self.progress = folder, say, progress
        self.device = backbone.device
        self.settings = Settings(
            thresholds=config.thresholds,
            relative=config.relative,
            temperature=config.temperature,
            teacher_decay=config.teacher_decay,
            dropout=config.dropout,
            patches=config.patches,
            impl=config.impl,
        )
        self.records: list[dict[str, Any]] = []
        self.report: dict[str, Any] = {}

    def learn(self, found: Checkpoint | None) -> Segmenter:
        config, store = self.config, self.store
        head = self.start() if found is None else found.head.to(self.device)
        optimizer = make_optimizer(head, config.lr, config.lr_prototypes)
        first = 0
        if found is not None:
            restore_optimizer(optimizer, found.optimizer)
            first = found.step
            self.say(f"resume     from step {first} of {config.steps}")
        if self.folder is not None:
            self.records = self.folder.resume(first)
        self.tell_closeness()

        schedule = Schedule(len(store), config.batch_size, config.data_seed)
        if schedule.batch_size < config.batch_size:
            self.say(f"batch      {schedule.batch_size} squares, as many as there are")
        resident = self.resident_features()
        thresholds = torch.tensor(config.thresholds, device=self.device)
        bar = tqdm(total=config.steps, initial=first, desc="train", unit="step", disable=not self.progress, dynamic_ncols=True)
        with bar, StopRequest() as stop:
            for step in range(first, config.steps):
                draws = schedule.draws(step, store.P, store.D, self.settings, self.device)
                features = store.rows(draws.rows).to(self.device) if resident is None else resident[draws.rows.to(self.device)].float()
                loss = train_step(head, optimizer, features, draws, thresholds, self.settings)
                bar.update()
                done, last = step + 1, step + 1 == config.steps
                if done % config.log_every == 0 or last:
                    self.log(done, head, loss, bar)
                if done % config.checkpoint_every == 0 or last or stop.number is not None:
                    self.write(head, optimizer, done)
                if stop.number is not None and not last:
                    bar.close()
                    self.say_interrupted(done)
                    raise Interrupted(stop.number)
        return Segmenter(self.checkpoint(head, optimizer, config.steps), self.backbone)

    def start(self) -> Head:
        config = self.config
        head = Head(self.store.D, config.prototypes, config.code_dim, config.seed).to(self.device)
        if config.init == "pca-kmeans":
            rows = evaluation.sample_patches(self.store, config.seed).to(self.device)
            if len(rows) < config.prototypes:
                raise UserError(f"--prototypes: {config.prototypes} groups cannot start from {len(rows)} patches; ask for fewer")
            head.start_from_features(rows, config.seed)
        return head

    def resident_features(self) -> Tensor | None:
        """All features on a GPU where they take at most 60 % of its free memory; a CPU reads them through the memory map."""
        if self.device.type != "cuda" or self.store.nbytes > 0.6 * torch.cuda.mem_get_info(self.device)[0]:
            return None
        return self.store.load(self.device)

    def tell_closeness(self) -> None:
        sample = self.store.rows(evaluation.spread(len(self.store), 48))
        within, across = closeness(sample, self.config.thresholds, self.config.relative)
        self.say(f"closeness  within images  {within.line()}")
        self.say(f"           across images  {across.line()}")
        problem = warning(within, across)
        if problem:
            self.say(f"warning    {problem}")
        self.report["closeness"] = {"within": dataclasses.asdict(within), "across": dataclasses.asdict(across)}

    def log(self, step: int, head: Head, loss, bar: tqdm) -> None:
        state = health(head, evaluation.batches(self.store, self.device, WATCHED_ROWS))
        record = {
            "step": step,
            "total": float(loss.total),
            "energy_within": float(loss.energy[0]),
            "energy_across": float(loss.energy[1]),
            "data": float(loss.data),
            "distance_within": float(loss.distance[0]),
            "distance_across": float(loss.distance[1]),
            "closeness_within": float(loss.mean[0]),
            "closeness_across": float(loss.mean[1]),
            "perplexity": state.perplexity,
            "labels_per_image": state.labels_per_image,
            "image_information": state.image_information,
            "agreement": state.agreement,
            "largest_share": max(state.shares),
        }
        at_checkpoint = step % self.config.checkpoint_every == 0 or step == self.config.steps
        if self.validation is not None and at_checkpoint:
            scores = hungarian(self.validation.confusion(head))
            record |= {"accuracy": scores.accuracy, "miou": scores.miou}
        self.records.append(record)
        if self.folder is not None:
            self.folder.metrics.append(record)
        bar.set_postfix_str(f"total {record['total']:.3f}, {state.perplexity:.1f} labels in use, agreement {state.agreement:.2f}")

    def checkpoint(self, head: Head, optimizer: torch.optim.Adam, step: int) -> Checkpoint:
        return Checkpoint(
            config=self.config,
            head=head,
            step=step,
            backbone_name=self.backbone.name,
            backbone_digest=self.backbone.digest,
            class_names=None if self.validation is None else self.validation.dataset.class_names,
            report=self.report,
            optimizer=optimizer_tensors(optimizer),
        )

    def write(self, head: Head, optimizer: torch.optim.Adam, step: int) -> None:
        if self.folder is not None:
            self.checkpoint(head, optimizer, step).write(self.folder.path / CHECKPOINT)

    def say_interrupted(self, done: int) -> None:
        if self.folder is None:
            self.say("interrupted; nothing is kept of a run without an output folder")
        else:
            self.say(f"interrupted; step {done} of {self.config.steps} is saved in {self.folder.path}: the same command resumes there")

    # what is told at the end

    def finish(self, segmenter: Segmenter, dataset: Dataset) -> None:
        """Figures, pictures and the report of a run on `dataset` whose steps are done."""
        head = segmenter.head
        state = health(head, evaluation.batches(self.store, self.device))
        self.report |= {
            "health": dataclasses.asdict(state),
            "images": len(dataset) - len(self.store.skipped),
            "skipped": self.store.skipped,
        }
        self.say(
            f"groups     {in_use(state.shares)} of {head.teacher.shape[0]} in use (each over 0.5 % of the patches), perplexity "
            f"{state.perplexity:.1f}; {state.labels_per_image:.1f} in an image; I(image;label)/H(label) {state.image_information:.2f}; "
            f"teacher and student agree on {100 * state.agreement:.1f} %"
        )
        if self.validation is not None:
            self.tell_scores(head)
        segmenter.checkpoint.report = self.report
        if self.folder is None:
            return
        out = self.folder.path
        segmenter.save(out / CHECKPOINT)
        drawn = self.draw(segmenter, dataset)
        write_json(out / REPORT, self.report)  # last: with it the run is finished
        self.say(f"saved      {out / CHECKPOINT}")
        self.say(f"figures    {out / REPORT}, {out / METRICS}")
        if drawn:
            self.say("pictures   " + ", ".join(map(str, drawn)))

    def tell_scores(self, head: Head) -> None:
        """With labels: figures chosen by labels (Hungarian matching, as in the field), beside k-means on the same features."""
        validation, counts = self.validation, self.validation.confusion(head)
        scores, names, held_out = hungarian(counts), validation.dataset.class_names, validation.dataset.held_out
        rows = evaluation.sample_patches(self.store, seed=0).to(self.device)
        baseline = validation.kmeans(spherical_kmeans(rows, len(head.teacher), starts=10).centres)
        where = "held out" if held_out else "the training images"
        self.say(f"scores     on {where} ({len(validation.store)} images), clusters matched to classes by their labels (Hungarian):")
        self.say(f"           smooseg   accuracy {percent(scores.accuracy)} %  mIoU {percent(scores.miou)} %")
        self.say(f"           k-means   accuracy {percent(baseline.accuracy)} %  mIoU {percent(baseline.miou)} %  (same features)")
        self.report["scores"] = {
            "held_out": held_out,
            "mirror": False,
            "hungarian": scores.as_dict(names),
            "majority": majority(counts).as_dict(names),
            "kmeans": baseline.as_dict(names),
        }

    def draw(self, segmenter: Segmenter, dataset: Dataset) -> list[Path]:
        """The pictures, of held-out images where there are some; -> those that were drawn. A failure is said, and ends nothing."""
        shown, store = (dataset, self.store) if self.validation is None else (self.validation.dataset, self.validation.store)
        makers = {GROUPS: lambda: self.groups_picture(segmenter, shown, store), CURVES: self.curves_picture}
        drawn = []
        for name, make in makers.items():
            try:
                drawn.append(pictures.save(self.folder.path / name, make()))
            except Exception as error:  # whatever it is, a run that is learnt must not be lost to a picture of it
                self.say(f"warning    {name} could not be drawn ({reason(error)}); the same command tries again")
        return drawn

    def groups_picture(self, segmenter: Segmenter, dataset: Dataset, store: FeatureStore) -> Image:
        """Eight images of `dataset`, evenly spaced over those in its `store`: the others could not be used."""
        usable = list(dict.fromkeys(store.names))
        chosen = {usable[place] for place in evaluation.spread(len(usable), 8).tolist()}

        def shown() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
            for index, name in enumerate(dataset.names):
                if name not in chosen:
                    continue
                try:
                    image = dataset.image(index)
                except ImageError:  # gone since its features were taken
                    continue
                yield name, image, segmenter.predict(image).astype(np.uint8)

        shares = self.report["health"]["shares"]
        title = f"{in_use(shares)} of {segmenter.groups} groups in use, found without labels"
        return groups_sheet(shown(), pictures.palette(segmenter.groups), dict(enumerate(shares)), title)

    def curves_picture(self) -> Image:
        panels = {
            "energy": ("energy_within", "energy_across"),
            "label distance": ("distance_within", "distance_across"),
            "data term": ("data",),
            "labels in use": ("perplexity", "labels_per_image"),
            "shares": ("agreement", "image_information", "largest_share"),
            "with labels": ("accuracy", "miou"),
        }
        return pictures.curves_picture(self.records, panels, str(self.folder.path))


def in_use(shares: Sequence[float]) -> int:
    """Groups that a legend names."""
    return sum(share >= NAMED for share in shares)
