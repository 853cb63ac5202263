"""The pictures of a run: images under their groups, curves, and the same images at every granularity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image
from scipy.optimize import linear_sum_assignment

from ..backbones.base import reason
from ..config import Variant, scale_factor
from ..datasets.images import ImageError
from ..errors import WriteError
from ..features.sample import evenly_spaced
from ..segment.segmenter import Segmenter
from ..show import charts, pictures
from ..show.sheet import NAMED, groups_sheet, thumbnails
from ..system.progress import SILENT_S, Bar
from .runfolder import CURVES, GROUPS, LADDER, RunFolder
from .setting import Setting

GROUPS_IMAGES, LADDER_IMAGES = 8, 6
LARGEST = 1024  # pixels of an image's side, at the scale of the run, that are shown
PANELS = {
    "energy": ("energy_within", "energy_across"),
    "label distance": ("distance_within", "distance_across"),
    "data term": ("data",),
    "labels in use": ("perplexity", "labels_per_image"),
    "shares": ("agreement", "image_information", "largest_share"),
    "structure": ("modularity", "explained_variance", "modularity_x_explained"),
    "with labels": ("accuracy", "miou"),
}


@dataclass(frozen=True)
class Shown:
    """The contents of a run's pictures: heads, the default one first, lines of metrics, and the report so far."""

    setting: Setting
    folder: RunFolder
    segmenters: Mapping[Variant, Segmenter]
    records: Sequence[dict[str, Any]]
    report: Mapping[str, Any]

    @property
    def default(self) -> Variant:
        return next(iter(self.segmenters))

    def images(self, name: str, count: int) -> Iterator[tuple[str, np.ndarray]]:
        """Names and pixels of at most `count` images, evenly spaced over those (held-out ones first) with features.

        A bar called `name` shows once they take long.
        """
        setting = self.setting if self.setting.validation is None else self.setting.validation
        usable = list(dict.fromkeys(setting.store.names))
        chosen = {usable[place] for place in evenly_spaced(len(usable), count).tolist()}
        indices = [index for index, image in enumerate(setting.dataset.names) if image in chosen]
        for index in Bar(
            iterable=indices, desc=name, unit="image", delay=SILENT_S, leave=False, disable=not self.setting.progress
        ):
            with suppress(ImageError):  # gone since its features were taken
                image, name = setting.dataset.image(index), setting.dataset.names[index]
                middle = self.middle(image)
                yield (name if middle.shape == image.shape else f"{name} (middle)"), middle

    def middle(self, image: np.ndarray) -> np.ndarray:
        """The middle of an image, LARGEST pixels a side at the scale of the run; a scale that fits shows all of it."""
        factor = scale_factor(self.setting.config.scale[0])
        if factor is None:
            return image
        sides = [min(side, max(self.setting.backbone.patch, round(LARGEST / factor))) for side in image.shape[:2]]
        top, left = ((there - side) // 2 for there, side in zip(image.shape, sides))
        return image[top : top + sides[0], left : left + sides[1]]

    def labels(self, image: np.ndarray, variants: Sequence[Variant]) -> dict[Variant, np.ndarray]:
        """uint8 [H,W] groups of an image by each head; the backbone sees it once."""
        views = self.segmenters[self.default].views(image)
        return {variant: np.concatenate([*self.segmenters[variant].bands(image, views=views)]) for variant in variants}


def draw(shown: Shown) -> list[Path]:
    """Draws the pictures of the folder; -> those that succeeded. Reports a failure and continues."""
    makers, paths = {GROUPS: groups_picture, CURVES: curves_picture, LADDER: ladder_picture}, []
    for name in shown.folder.pictures:
        try:
            paths.append(pictures.save(shown.folder.path / name, makers[name](shown)))
        except WriteError:  # the disk is full: the report would not fit either
            raise
        except Exception as error:  # whatever it is, a picture must not lose a run that is learnt
            problem = f"{name} could not be drawn ({reason(error)})"
            shown.setting.say(f"warning    {problem}; the same command tries again")
    return paths


def groups_picture(shown: Shown) -> Image:
    """Images of the default head: as they are, under their groups, and the groups alone."""
    groups, shares = shown.segmenters[shown.default].groups, shown.report["health"]["shares"]
    title = f"{in_use(shares)} of {groups} groups in use, found without labels"
    cells = (
        (name, image, shown.labels(image, [shown.default])[shown.default])
        for name, image in shown.images(GROUPS, GROUPS_IMAGES)
    )
    return groups_sheet(cells, pictures.palette(groups), dict(enumerate(shares)), title)


def curves_picture(shown: Shown) -> Image:
    """The default head's figures over the steps."""
    records = [record for record in shown.records if record["head"] == shown.default.name]
    return charts.curves_picture(records, PANELS, str(shown.folder.path))


def ladder_picture(shown: Shown) -> Image:
    """The same images at every granularity, coarse to fine, one seed.

    A group has the colour of the default head's group that shares most pixels with it.
    """
    default, K = shown.default, shown.segmenters[shown.default].groups
    rungs = sorted((v for v in shown.segmenters if v.seed == default.seed), key=lambda v: v.thresholds.within)
    names, images, labels = [], [], []
    for name, image in shown.images(LADDER, LADDER_IMAGES):
        names.append(name)
        images.append(image)
        labels.append(shown.labels(image, rungs))
    colours = {v: pictures.palette(K)[matching([(of[v], of[default]) for of in labels], K)] for v in rungs}
    rows = []
    for image, of in zip(images, labels):
        row = [thumbnails(image, of[variant], colours[variant]) for variant in rungs]
        rows.append([row[0][0], *(groups for *_, groups in row)])
    titles = ["image"]
    for variant in rungs:
        used = in_use(shown.report["heads"][variant.name]["health"]["shares"])
        titles.append(f"{variant.granularity:g}: {used} groups" + (" (default)" if variant == default else ""))
    return pictures.contact_sheet(rows, titles, names, (), "granularity, and the groups it leaves in use")


def in_use(shares: Sequence[float]) -> int:
    """Number of groups that a legend names."""
    return sum(share >= NAMED for share in shares)


def matching(labels: Sequence[tuple[np.ndarray, np.ndarray]], K: int) -> np.ndarray:
    """int [K]: for each group of the first labels of each pair one of the second, one to one, so that the most pixels
    agree."""
    counts = np.zeros((K, K), np.int64)
    for ours, theirs in labels:
        counts += np.bincount(ours.ravel().astype(np.int64) * K + theirs.ravel(), minlength=K * K).reshape(K, K)
    return linear_sum_assignment(counts, maximize=True)[1]
