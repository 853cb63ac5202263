"""The pictures of a run: images under their groups, curves, the tree of groups, and the page."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch.nn.functional import adaptive_avg_pool2d

from smooseg_kernels.rows import unit_rows

from ..backbones.base import reason
from ..config import FIT, Variant, scale_factor
from ..datasets.images import ImageError
from ..datasets.reading import Picture
from ..errors import WriteError
from ..features.sample import evenly_spaced
from ..features.store import FeatureStore
from ..segment.segmenter import Segmenter
from ..show import charts, pictures
from ..show.report import PAGE
from ..show.report_tiles import Atlas, Watched, tile_of
from ..show.tree import tree_picture
from ..system.ahead import ahead, behind
from ..system.progress import SILENT_S, Bar
from .groupspicture import MOST_BYTES, picture_of, with_truth, write_tiles
from .runfolder import CURVES, GROUPS, TREE, RunFolder, pictures_of
from .runpage import THREADS, write_run_page
from .setting import Setting
from .tiler import Tiler, cropped, cutting_of

GROUPS_IMAGES, CANDIDATES = 8, 32  # images that are shown, and those that they are chosen among
LARGEST = 512  # pixels of an image's side, at the scale of the run, that are shown
PANELS = {
    "energy": ("energy_within", "energy_across"),
    "label distance": ("distance_within", "distance_across"),
    "data term": ("data",),
    "labels in use": ("perplexity", "labels_per_image"),
    "shares": ("agreement", "image_information", "largest_share"),
    "structure": ("modularity", "explained_variance", "modularity_x_explained"),
    "with labels": ("accuracy", "miou"),
}

Example = tuple[str, Picture, np.ndarray | None]  # an image by its name, and its ground truth, if any


@dataclass(frozen=True)
class Shown:
    """The contents of a run's pictures: heads, the default one first, lines of metrics, and the report so far.

    started: `time.perf_counter()` when the pictures began. made: tiles of training images, by their names.
    """

    setting: Setting
    folder: RunFolder
    segmenters: Mapping[Variant, Segmenter]
    records: Sequence[dict[str, Any]]
    report: Mapping[str, Any]
    started: float = field(default_factory=time.perf_counter)
    made: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def default(self) -> Variant:
        return next(iter(self.segmenters))

    @property
    def segmenter(self) -> Segmenter:
        return self.segmenters[self.default]

    def images(self, name: str, count: int) -> Iterator[Example]:
        """Names, pictures and ground truth, if any, of at most `count` images that differ, among those with features
        (held-out ones first).

        A bar called `name` shows once they take long.
        """
        setting = self.setting if self.setting.validation is None else self.setting.validation
        chosen = different(setting.store, count)
        indices = [index for index, image in enumerate(setting.dataset.names) if image in chosen]
        for index in Bar(
            iterable=indices, desc=name, unit="image", delay=SILENT_S, leave=False, disable=not self.setting.progress
        ):
            with suppress(ImageError):  # gone since its features were taken
                picture, name = setting.dataset.picture(index), setting.dataset.names[index]
                truth = None if self.setting.validation is None else setting.dataset.label(index)
                yield name, picture, truth

    def tiles(self) -> Iterator[dict[str, Any]]:
        """Tiles of the images that differ, with the ground truth: labelled by their features, or, at another scale than
        fit, whose squares may lie far apart, their middle by the backbone."""
        validation, segmenter = self.setting.validation, self.segmenter
        if validation is None:
            tiler = Tiler(self.setting.store, cutting_of(self.setting), segmenter)
        else:
            tiler = Tiler(validation.store, validation.cutting, segmenter)
        watched = Watched(segmenter, [segmenter.grouping])

        def by_features(example: Example) -> dict[str, Any]:
            name, picture, truth = example
            image = tiler.prepared(name, picture, MOST_BYTES)
            tile = tiler.tile(image, MOST_BYTES)
            self.made.update({name: tile} if validation is None else {})
            truth = None if truth is None else cropped(Picture(truth), image.cells.box)[0].pixels
            return with_truth(tile if image.whole else as_middle(tile), truth)

        def by_backbone(example: Example) -> dict[str, Any]:
            name, picture, truth = example
            valid = None if picture.valid is None else self.middle(picture.valid)
            middle = Picture(self.middle(picture.pixels), valid)
            labels = np.concatenate([*watched.bands(middle, mirror=False)])
            look = watched.look(len(segmenter.grouping))
            tile = tile_of(name, middle.pixels, labels, look, tiler.atlas, MOST_BYTES)
            whole = middle.pixels.shape == picture.pixels.shape
            return with_truth(tile if whole else as_middle(tile), None if truth is None else self.middle(truth))

        images = self.images(GROUPS, GROUPS_IMAGES)
        if self.setting.config.scale != (FIT,):
            yield from map(by_backbone, images)
            return
        with closing(ahead(by_features, images, threads=THREADS, waiting=2 * THREADS)) as tiles:
            yield from tiles

    def middle(self, image: np.ndarray) -> np.ndarray:
        """The middle of an image, LARGEST pixels a side at the scale of the run; a scale that fits shows all of it."""
        factor = scale_factor(self.setting.config.scale[0])
        if factor is None:
            return image
        sides = [min(side, max(self.setting.backbone.patch, round(LARGEST / factor))) for side in image.shape[:2]]
        top, left = ((there - side) // 2 for there, side in zip(image.shape, sides))
        return image[top : top + sides[0], left : left + sides[1]]


def as_middle(tile: dict[str, Any]) -> dict[str, Any]:
    """A tile that shows the middle of its image."""
    return tile | {"name": f"{tile['name']} (middle)"}


def draw(shown: Shown) -> list[Path]:
    """Draws the pictures of the folder; -> those that succeeded. Reports a failure and continues. A thread writes a
    picture while the next one is drawn."""
    makers: dict[str, Callable[[Shown], Image | Path]]
    makers, paths = {GROUPS: groups_picture, CURVES: curves_picture, TREE: tree_of_groups, PAGE: page}, []
    with behind(1) as later:
        for name in pictures_of(shown.setting.config):
            try:
                drawn, path = makers[name](shown), shown.folder.path / name
                if not isinstance(drawn, Path):
                    later(pictures.save, path, drawn)
                paths.append(path)
            except WriteError:  # the disk is full: the report would not fit either
                raise
            except Exception as error:  # whatever it is, a picture must not lose a run that is learnt
                problem = f"{name} could not be drawn ({reason(error)})"
                shown.setting.say(f"warning    {problem}; the same command tries again")
    return paths


def different(store: FeatureStore, count: int) -> set[str]:
    """The names of at most `count` images that differ: CANDIDATES evenly spaced ones, without one of the two most alike
    again and again, so that near-duplicates take no place from others. Each quarter of an image is compared by its mean
    feature."""
    rows = {name: row for row, name in reversed([*enumerate(store.names)])}  # the first of each image
    usable = list(dict.fromkeys(store.names))
    names = [usable[place] for place in evenly_spaced(len(usable), max(count, CANDIDATES)).tolist()]
    features = store.rows([rows[name] for name in names]).float().unflatten(1, store.grid).permute(0, 3, 1, 2)
    quarters = unit_rows(adaptive_avg_pool2d(features, 2).flatten(2).mT).flatten(1)
    alike = (quarters @ quarters.T).fill_diagonal_(-torch.inf)
    kept = list(range(len(names)))
    while len(kept) > count:
        among = alike[kept][:, kept]
        gone = max(divmod(int(among.argmax()), len(kept)), key=lambda one: among[one].topk(2).values[1].item())
        del kept[gone]  # of the two most alike, the one that is also nearer to a third
    return {names[place] for place in kept}


def groups_picture(shown: Shown) -> Image:
    """Images of the default head, their groups over them, and the ground truth if there is one."""
    segmenter, header, tiles = shown.segmenter, Atlas.of(shown.segmenter).header(), [*shown.tiles()]
    write_tiles(shown.folder.path, header, tiles)
    return picture_of(segmenter.checkpoint, header, tiles)


def curves_picture(shown: Shown) -> Image:
    """The default head's figures over the steps."""
    records = [record for record in shown.records if record["head"] == shown.default.name]
    return charts.curves_picture(records, PANELS, str(shown.folder.path))


def tree_of_groups(shown: Shown) -> Image:
    """The default head's tree, where it is cut."""
    return tree_picture(shown.segmenter.checkpoint, str(shown.folder.path))


def page(shown: Shown) -> Path:
    """The page of the default head, which is written part by part."""
    return write_run_page(shown.setting, shown.segmenter, dict(shown.report), shown.made, shown.started)
