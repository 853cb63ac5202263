"""The patch of the images that is nearest to each prototype, for pictures."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from smooseg_kernels.rows import unit_rows

from ..datasets.cutting import Cutting
from ..datasets.images import ImageError
from ..datasets.reading import Picture
from ..features.sample import evenly_spaced
from ..segment.model import Head, project
from .setting import Setting

IMAGES = 12  # they are read again, so few
SIDE, AROUND = 48, 3  # pixels of a stored patch, and the patches that it shows


@torch.no_grad()
def typical_patches(setting: Setting, head: Head) -> Tensor:
    """The patch nearest to every prototype, in some of its surroundings: uint8 [K,SIDE,SIDE,3].

    The patches are those of at most IMAGES images evenly spaced. A patch of an image that is gone is black.
    """
    store, config = setting.store, setting.config
    names = list(dict.fromkeys(store.names))
    chosen = {names[place] for place in evenly_spaced(len(names), IMAGES).tolist()}
    rows = [row for row, name in enumerate(store.names) if name in chosen]
    head = head.to(setting.device)
    codes = project(head, store.rows(rows).to(setting.device)).float()
    cosines = unit_rows(codes) @ unit_rows(head.teacher.float()).mT
    if (valid := store.valid(rows)) is not None:
        cosines[~valid] = -torch.inf
    places = [divmod(place, store.P) for place in cosines.flatten(0, 1).argmax(0).tolist()]
    cutting = Cutting(
        size=config.sides[0], crops=config.crops, resample=config.resample, scale=config.scale, margin=config.margin
    )
    squares = squares_of(setting, cutting, sorted({rows[row] for row, _ in places}))
    return torch.from_numpy(np.stack([around(squares.get(rows[row]), place, store.grid) for row, place in places]))


def squares_of(setting: Setting, cutting: Cutting, rows: list[int]) -> dict[int, np.ndarray]:
    """The pixels uint8 [S,S,3] of some rows of the store."""
    store, squares = setting.store, {}
    places = {name: index for index, name in enumerate(setting.dataset.names)}
    picture, last = Picture(np.empty(0)), ""
    for row in rows:  # those of an image follow one another
        try:
            if store.names[row] != last:
                picture, last = setting.dataset.picture(places[store.names[row]]), store.names[row]
        except ImageError:
            continue
        if cutting.plain:
            squares[row] = {cut.place: cut.pixels for cut in cutting.squares(picture)}[store.crops[row]][0]
        else:
            squares[row] = cutting.scaled(picture.pixels).window(*store.crops[row], cutting.size, cutting.size)
    return squares


def around(square: np.ndarray | None, place: int, grid: tuple[int, int]) -> np.ndarray:
    """A patch of a square uint8 [S,S,3] and the patches next to it, uint8 [SIDE,SIDE,3]."""
    if square is None:
        return np.zeros((SIDE, SIDE, 3), np.uint8)
    patch, edges = len(square) // grid[0], []
    for centre, patches in zip(divmod(place, grid[1]), grid):
        first = max(0, min(centre - AROUND // 2, patches - AROUND))
        edges.append(slice(first * patch, (first + AROUND) * patch))
    return np.asarray(Image.fromarray(np.ascontiguousarray(square[tuple(edges)])).resize((SIDE, SIDE)))
