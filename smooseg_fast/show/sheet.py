"""The sheet at the end of training and prediction: images next to their groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from PIL import Image

from ..errors import UserError
from . import pictures

THUMBNAIL = 640  # pixels of a thumbnail's long side
NAMED = 0.005  # the least share of the pixels with which a group stands in the legend

Shown = tuple[str, np.ndarray, np.ndarray]


def groups_sheet(shown: Iterable[Shown], colours: np.ndarray, shares: Mapping[int, float], title: str) -> Image.Image:
    """Draw a contact sheet: each image, its groups over it, and its groups alone. From four images on, two in a row.

    Args:
        shown: (name, image uint8 [H,W,3], labels uint8 [H,W]); read once, and only thumbnails are kept.
        colours: uint8 [K,3].
        shares: the share of the pixels in each group, for the legend.

    Raises:
        UserError: when `shown` is empty.
    """
    cells = [(name, *thumbnails(image, labels, colours)) for name, image, labels in shown]
    if not cells:
        raise UserError("the sheet has no images to show: none of them can be read any more; put them back")
    across = 2 if len(cells) > 3 else 1
    rows = [cells[start : start + across] for start in range(0, len(cells), across)]
    legend = [(colours[k].tolist(), f"{k}: {100 * share:.0f} %") for k, share in shares.items() if share >= NAMED]
    return pictures.contact_sheet(
        [[picture for _, *three in row for picture in three] for row in rows],
        ["image", "groups over it", "groups"] * across,
        ["   |   ".join(name for name, *_ in row) for row in rows],
        legend,
        title,
    )


def thumbnails(image: np.ndarray, labels: np.ndarray, colours: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (image, groups over it, groups), with a long side of at most THUMBNAIL pixels."""
    small = Image.fromarray(image)
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    labels = np.array(Image.fromarray(labels).resize(small.size, Image.Resampling.NEAREST))
    image = np.array(small)
    return image, pictures.overlay(image, labels, colours), pictures.by_label(colours)[labels]
