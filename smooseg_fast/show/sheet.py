"""The sheets at the end of training and prediction: images next to their groups, and to the ground truth if any."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..errors import UserError
from ..segment.colours import table_of
from ..segment.names import Group
from ..system.ahead import ahead
from . import pictures
from .overlays import overlay, with_names

PAGE, THREADS = 24, 2  # images on a page, and pages that are drawn at a time
FEW = 12  # images up to which thumbnails are larger
FEW_BOX, BOX = (640, 640), (241, 362)  # pixels of thumbnails; the second is the largest cell of a page of many images
NAMED = 0.005  # the least share of the pixels with which a group stands in the legend


class Shown(NamedTuple):
    """An image uint8 [H,W,3] to show, its labels uint8 [H,W], and its ground truth, alike, if there is one."""

    name: str
    image: np.ndarray
    labels: np.ndarray
    truth: np.ndarray | None = None


@dataclass(frozen=True)
class TruthLook:
    """How ground truth is drawn: a colour for every class, uint8 [256,3], and (colour, name) of those that no group
    has the colour of."""

    colours: np.ndarray
    legend: Sequence[tuple[Sequence[int], str]]


def sheet_pages(
    shown: Iterable[Shown], groups: Sequence[Group], title: str, truth: TruthLook | None = None
) -> Iterator[Image.Image]:
    """Draw contact sheets of at most PAGE images each, THREADS at a time; thumbnails of so many are in memory.

    Args:
        shown: read once.
        groups: shares are those of the legend.
        title: {first} and {last} in it become the numbers of a page's first and last image.

    Raises:
        UserError: when `shown` is empty.
    """
    small, empty = (thumbnail(one, images=1) for one in shown), True

    def draw(numbered: tuple[int, list[Shown]]) -> Image.Image:
        first, page = numbered
        return page_of(page, groups, title.format(first=first, last=first + len(page) - 1), truth)

    pages = ((1 + PAGE * number, page) for number, page in enumerate(iter(lambda: [*islice(small, PAGE)], [])))
    with closing(ahead(draw, pages, threads=THREADS, waiting=THREADS)) as drawn:
        for page in drawn:
            empty = False
            yield page
    if empty:
        raise UserError("the sheet has no images to show: none of them can be read any more; put them back")


def thumbnail(shown: Shown, images: int) -> Shown:
    """The same, not larger than the sheets of so many images show it."""
    box = BOX if images > FEW else FEW_BOX
    height, width = shown.labels.shape
    return shown if width <= box[0] and height <= box[1] else resized(shown, box)


def resized(shown: Shown, box: tuple[int, int]) -> Shown:
    """The same, as large as fits into `box`, its width and height."""
    factor = min(side / now for side, now in zip(box, shown.labels.shape[::-1]))
    size = [max(1, round(factor * now)) for now in shown.labels.shape[::-1]]
    if size == [*shown.labels.shape[::-1]]:
        return shown
    image = Image.fromarray(shown.image).resize(size, Image.Resampling.HAMMING, reducing_gap=2.0)

    def small(labels: np.ndarray) -> np.ndarray:
        return np.array(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))

    truth = None if shown.truth is None else small(shown.truth)
    return Shown(shown.name, np.array(image), small(shown.labels), truth)


def page_of(shown: Sequence[Shown], groups: Sequence[Group], title: str, truth: TruthLook | None) -> Image.Image:
    """Draw a page: each image, its groups over it with their names, and the ground truth where `truth` says how; the
    image's name below. Two or three images stand side by side."""
    columns = ["image", "groups"] + ["ground truth"] * (truth is not None)
    across = 1 if len(shown) == 1 else 3 if len(shown) > FEW and truth is None else 2
    colours = table_of({group.number: group.colour for group in groups})
    names = {group.number: group.label for group in groups}
    cell = pictures.cell_size([one.image.shape for one in shown], len(columns) * across)
    cells = []
    for one in (resized(one, cell) for one in shown):
        row: list[np.ndarray | Image.Image] = [one.image]
        row.append(with_names(overlay(one.image, one.labels, colours), one.labels, names))
        if truth is not None:
            blank = np.full_like(one.image, 255)
            row.append(blank if one.truth is None else pictures.by_label(truth.colours)[one.truth])
        cells.append(row)
    legend = [
        (group.colour, f"{group.caption}: {100 * group.share:.0f} %")
        for group in groups
        if group.share is not None and group.share >= NAMED
    ]
    starts = range(0, len(shown), across)
    return pictures.contact_sheet(
        [[picture for row in cells[start : start + across] for picture in row] for start in starts],
        columns * across,
        [[one.name for one in shown[start : start + across]] for start in starts],
        [*legend, *(() if truth is None else truth.legend)],
        title,
    )
