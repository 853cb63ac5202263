"""What a run ends with: figures without labels and with them, every head as a checkpoint, the report and the pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image
from scipy.optimize import linear_sum_assignment

from ..backbones import Backbone
from ..backbones.base import reason
from ..config import TrainConfig, Variant
from ..datasets import Dataset
from ..datasets.images import ImageError
from ..errors import WriteError
from ..features.sample import batches, sample_patches, spread
from ..features.store import FeatureStore
from ..measure.health import Health, health
from ..measure.scores import Scores, hungarian, majority, percent
from ..measure.validation import Validation
from ..segment.checkpoint import Checkpoint
from ..segment.kmeans import spherical_kmeans
from ..segment.model import Heads
from ..segment.segmenter import Segmenter
from ..show import charts, pictures
from ..show.sheet import NAMED, groups_sheet, thumbnails
from ..system.files import write_json
from .monitors import COLLAPSED, collapse
from .runfolder import CHECKPOINT, CURVES, GROUPS, LADDER, METRICS, REPORT, RunFolder, head_file

LADDER_IMAGES = 6
PANELS = {
    "energy": ("energy_within", "energy_across"),
    "label distance": ("distance_within", "distance_across"),
    "data term": ("data",),
    "labels in use": ("perplexity", "labels_per_image"),
    "shares": ("agreement", "image_information", "largest_share"),
    "structure": ("modularity", "explained_variance", "modularity_x_explained"),
    "with labels": ("accuracy", "miou"),
}

Say = Callable[[str], None]


@dataclass
class Summary:
    """The end of a run on `dataset`, whose features are in `store`.

    step: how many were taken. broken: variants whose figures stopped being numbers; they are named and left out. counts: confusion counts
    of heads that have been taken already, as they are now. report: what is known of the run so far.
    """

    config: TrainConfig
    dataset: Dataset
    store: FeatureStore
    validation: Validation | None
    backbone: Backbone
    heads: Heads
    step: int
    broken: frozenset[Variant]
    folder: RunFolder | None
    records: Sequence[dict[str, Any]]
    counts: Mapping[Variant, np.ndarray]
    report: dict[str, Any]
    say: Say

    def finish(self) -> Segmenter:
        """Everything that a run leaves; the report comes last, since with it the run is finished. -> the default head's segmenter."""
        every = self.config.variants()
        states = dict(zip(every, health(self.heads, batches(self.store, self.heads.student.device))))
        self.whole = {variant: place for place, variant in enumerate(every) if variant not in self.broken}
        self.default = next(iter(self.whole))
        self.report |= {
            "images": len(self.dataset) - len(self.store.skipped),
            "skipped": self.store.skipped,
            "default": self.default.name,
            "broken": sorted(variant.name for variant in self.broken),
            "heads": {variant.name: {"health": dataclasses.asdict(states[variant])} for variant in self.whole},
        }
        self.tell_health(states)
        if self.validation is not None:
            self.tell_scores()
        self.report |= self.report["heads"][self.default.name]
        segmenters = {variant: Segmenter(self.checkpoint(variant), self.backbone) for variant in self.whole}
        if self.folder is not None:
            self.leave(segmenters)
        return segmenters[self.default]

    def checkpoint(self, variant: Variant) -> Checkpoint:
        common = {name: self.report[name] for name in ("closeness", "images", "skipped") if name in self.report}
        return Checkpoint(
            config=self.config.alone(variant),
            head=self.heads[self.whole[variant]],
            step=self.step,
            backbone_name=self.backbone.name,
            backbone_digest=self.backbone.digest,
            class_names=None if self.validation is None else self.validation.dataset.class_names,
            report=common | self.report["heads"][variant.name],
        )

    def leave(self, segmenters: dict[Variant, Segmenter]) -> None:
        out = self.folder.path
        if len(segmenters) > 1:
            for variant, segmenter in segmenters.items():
                segmenter.save(head_file(out, variant))
        segmenters[self.default].save(out / CHECKPOINT)
        drawn = self.draw(segmenters)
        write_json(out / REPORT, self.report)
        self.say(
            f"saved      {out / CHECKPOINT}"
            + (f", and all {len(segmenters)} heads in {out / 'heads'}" if len(segmenters) > 1 else "")
        )
        self.say(f"figures    {out / REPORT}, {out / METRICS}")
        if drawn:
            self.say("pictures   " + ", ".join(map(str, drawn)))

    # figures

    def tell_health(self, states: dict[Variant, Health]) -> None:
        K = self.heads.student.shape[1]
        for variant in self.whole:
            state = states[variant]
            mark = (
                "" if len(self.whole) == 1 else f"{variant.label()}{' (default)' if variant == self.default else ''}: "
            )
            self.say(
                f"groups     {mark}{in_use(state.shares)} of {K} in use (each over {100 * NAMED:g} % of the patches), perplexity "
                f"{state.perplexity:.1f}; {state.labels_per_image:.1f} in an image; I(image;label)/H(label) {state.image_information:.2f}; "
                f"teacher and student agree on {100 * state.agreement:.1f} %; modularity {state.modularity:.3f} x explained variance "
                f"{state.explained_variance:.3f} = {state.modularity_x_explained:.4f}"
            )
        for variant in self.whole:
            if states[variant].perplexity < COLLAPSED and K > 1:
                self.say(f"warning    {variant.label()} has collapsed, {collapse(states[variant].perplexity)}")

    def tell_scores(self) -> None:
        """With labels: figures chosen by labels (Hungarian matching, as in the field), beside k-means on the same features."""
        validation, names = self.validation, self.validation.dataset.class_names
        where = "held out" if validation.dataset.held_out else "the training images"
        self.say(
            f"scores     on {where} ({len(validation.store)} images), clusters matched to classes by their labels (Hungarian):"
        )
        rows = sample_patches(self.store, seed=0).to(self.heads.student.device)
        baseline = validation.kmeans(spherical_kmeans(rows, self.heads.student.shape[1], starts=10).centres)
        scores: dict[float | None, list[Scores]] = {}
        for variant, place in self.whole.items():
            counts = self.counts[variant] if variant in self.counts else validation.confusion(self.heads[place])
            scores.setdefault(variant.granularity, []).append(hungarian(counts))
            self.report["heads"][variant.name]["scores"] = {
                "held_out": validation.dataset.held_out,
                "mirror": False,
                "hungarian": scores[variant.granularity][-1].as_dict(names),
                "majority": majority(counts).as_dict(names),
                "kmeans": baseline.as_dict(names),
            }
        for granularity, of_seeds in scores.items():
            which = "smooseg" if len(scores) == 1 else f"granularity {granularity:g}"
            accuracy, miou = (mean_and_std([getattr(each, name) for each in of_seeds]) for name in ("accuracy", "miou"))
            seeds = "" if len(of_seeds) == 1 else f"  ({len(of_seeds)} seeds)"
            self.say(f"           {which:16s}  accuracy {accuracy} %  mIoU {miou} %{seeds}")
        self.say(
            f"           {'k-means':16s}  accuracy {percent(baseline.accuracy)} %  mIoU {percent(baseline.miou)} %  (same features)"
        )

    # pictures

    def draw(self, segmenters: dict[Variant, Segmenter]) -> list[Path]:
        """The pictures, of held-out images where there are some; -> those that were drawn. A failure is said, and ends nothing."""
        makers = {
            GROUPS: lambda: self.groups_picture(segmenters[self.default]),
            CURVES: self.curves_picture,
            LADDER: lambda: self.ladder_picture(segmenters),
        }
        drawn = []
        for name in self.folder.pictures:
            try:
                drawn.append(pictures.save(self.folder.path / name, makers[name]()))
            except WriteError:  # the disk is full: the report would not fit either
                raise
            except Exception as error:  # whatever it is, a run that is learnt must not be lost to a picture of it
                self.say(f"warning    {name} could not be drawn ({reason(error)}); the same command tries again")
        return drawn

    def curves_picture(self) -> Image:
        """Of the default head."""
        records = [record for record in self.records if record["head"] == self.default.name]
        return charts.curves_picture(records, PANELS, str(self.folder.path))

    def shown(self, count: int) -> Iterator[tuple[str, np.ndarray]]:
        """Names and pixels of images evenly spaced over those whose features could be taken."""
        dataset, store = (
            (self.dataset, self.store) if self.validation is None else (self.validation.dataset, self.validation.store)
        )
        usable = list(dict.fromkeys(store.names))
        chosen = {usable[place] for place in spread(len(usable), count).tolist()}
        for index, name in enumerate(dataset.names):
            if name not in chosen:
                continue
            try:
                yield name, dataset.image(index)
            except ImageError:  # gone since its features were taken
                continue

    def groups_picture(self, segmenter: Segmenter) -> Image:
        shares = self.report["health"]["shares"]
        title = f"{in_use(shares)} of {segmenter.groups} groups in use, found without labels"
        found = ((name, image, segmenter.predict(image).astype(np.uint8)) for name, image in self.shown(8))
        return groups_sheet(found, pictures.palette(segmenter.groups), dict(enumerate(shares)), title)

    def ladder_picture(self, segmenters: dict[Variant, Segmenter]) -> Image:
        """The same images at every granularity, coarse to fine, one seed; a group has the colour of the default's that it meets most."""
        rungs = sorted((v for v in segmenters if v.seed == self.default.seed), key=lambda variant: variant.granularity)
        images, labels = [], {variant: [] for variant in rungs}
        for name, image in self.shown(LADDER_IMAGES):
            images.append((name, image))
            for variant in rungs:
                labels[variant].append(segmenters[variant].predict(image).astype(np.uint8))
        K = segmenters[self.default].groups
        colours = pictures.palette(K)
        rows = [[thumbnails(image, labels[rungs[0]][place], colours)[0]] for place, (_, image) in enumerate(images)]
        for variant in rungs:
            own = colours[matching(labels[variant], labels[self.default], K)]
            for place, (_, image) in enumerate(images):
                rows[place].append(thumbnails(image, labels[variant][place], own)[2])
        used = {variant: in_use(self.report["heads"][variant.name]["health"]["shares"]) for variant in rungs}
        titles = [
            "image",
            *(f"{v.granularity:g}: {used[v]} groups{' (default)' if v == self.default else ''}" for v in rungs),
        ]
        return pictures.contact_sheet(
            rows, titles, [name for name, _ in images], (), "granularity, and the groups it leaves in use"
        )


def in_use(shares: Sequence[float]) -> int:
    """Groups that a legend names."""
    return sum(share >= NAMED for share in shares)


def mean_and_std(values: Sequence[float]) -> str:
    """Percent: the value, or mean and sample standard deviation."""
    if len(values) == 1:
        return percent(values[0])
    return f"{percent(float(np.mean(values)))} ± {percent(float(np.std(values, ddof=1)))}"


def matching(labels: Sequence[np.ndarray], onto: Sequence[np.ndarray], K: int) -> np.ndarray:
    """int [K]: for each group of `labels` one of `onto`, one to one, so that the most pixels agree."""
    counts = np.zeros((K, K), np.int64)
    for ours, theirs in zip(labels, onto):
        counts += np.bincount(ours.ravel().astype(np.int64) * K + theirs.ravel(), minlength=K * K).reshape(K, K)
    return linear_sum_assignment(counts, maximize=True)[1]
