"""The pictures of a run: images under their groups, curves, and the tree of groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from ..backbones.base import reason
from ..config import Variant, scale_factor
from ..datasets.images import ImageError
from ..datasets.reading import Picture
from ..errors import WriteError
from ..features.sample import evenly_spaced
from ..segment.segmenter import Segmenter
from ..show import charts, pictures
from ..show.sheet import NAMED, groups_sheet
from ..show.tree import tree_picture
from ..system.progress import SILENT_S, Bar
from .runfolder import CURVES, GROUPS, TREE, RunFolder, pictures_of
from .setting import Setting

GROUPS_IMAGES = 8
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

    def images(self, name: str, count: int) -> Iterator[tuple[str, Picture]]:
        """Names and pictures of at most `count` images, evenly spaced over those (held-out ones first) with features.

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
                picture, name = setting.dataset.picture(index), setting.dataset.names[index]
                valid = None if picture.valid is None else self.middle(picture.valid)
                middle = Picture(self.middle(picture.pixels), valid)
                yield (name if middle.pixels.shape == picture.pixels.shape else f"{name} (middle)"), middle

    def middle(self, image: np.ndarray) -> np.ndarray:
        """The middle of an image, LARGEST pixels a side at the scale of the run; a scale that fits shows all of it."""
        factor = scale_factor(self.setting.config.scale[0])
        if factor is None:
            return image
        sides = [min(side, max(self.setting.backbone.patch, round(LARGEST / factor))) for side in image.shape[:2]]
        top, left = ((there - side) // 2 for there, side in zip(image.shape, sides))
        return image[top : top + sides[0], left : left + sides[1]]


def draw(shown: Shown) -> list[Path]:
    """Draws the pictures of the folder; -> those that succeeded. Reports a failure and continues."""
    makers, paths = {GROUPS: groups_picture, CURVES: curves_picture, TREE: tree_of_groups}, []
    for name in pictures_of(shown.setting.config):
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
    segmenter, shares = shown.segmenters[shown.default], shown.report["health"]["shares"]
    groups = segmenter.groups
    title = f"{in_use(shares)} of {groups} groups in use, found without labels"
    cells = (
        (name, picture.pixels, np.concatenate([*segmenter.bands(picture)]))
        for name, picture in shown.images(GROUPS, GROUPS_IMAGES)
    )
    return groups_sheet(cells, pictures.palette(groups), dict(enumerate(shares)), title)


def curves_picture(shown: Shown) -> Image:
    """The default head's figures over the steps."""
    records = [record for record in shown.records if record["head"] == shown.default.name]
    return charts.curves_picture(records, PANELS, str(shown.folder.path))


def tree_of_groups(shown: Shown) -> Image:
    """The default head's tree, where it is cut."""
    return tree_picture(shown.segmenters[shown.default].checkpoint, str(shown.folder.path))


def in_use(shares: Sequence[float]) -> int:
    """Number of groups that a legend names."""
    return sum(share >= NAMED for share in shares)
