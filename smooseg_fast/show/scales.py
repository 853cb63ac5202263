"""A picture that helps to choose --scale: the same part of a few images, grouped without training at several scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import smooseg_kernels as sk

from ..backbones import Backbone
from ..config import FIT, NATIVE, TrainConfig
from ..datasets.cutting import first_scale, starts
from ..datasets.scaled import Scaled
from ..segment.colours import palette
from ..segment.kmeans import spherical_kmeans
from .overlays import overlay
from .pictures import contact_sheet

SCALES = (FIT, "0.5", NATIVE)
GROUPS = 8
PART = 1120  # pixels of an image's side, at most, that are drawn: of a larger one, those in the middle


class Region(NamedTuple):
    """A rectangle of an image, in pixels at some scale."""

    top: int
    left: int
    height: int
    width: int


def scales_sheet(images: Sequence[np.ndarray], names: Sequence[str], backbone: Backbone, size: int) -> Image.Image:
    """Draw a row for each image uint8 [H,W,3]: its middle, and GROUPS k-means groups of its features at each scale.

    The features of all images at a scale are grouped together, without any learning. Groups of one colour at two scales
    are equally bright, no more. size: side of the squares that the backbone gets, a multiple of its patch.
    """
    parts = [middle(image) for image in images]
    rows: list[list[np.ndarray | Image.Image]] = [[part] for part in parts]
    # a scale at which all images would be smaller than a square enlarges them, and shows what "fit" does
    sizes = {scale: tuple(first_scale(image, (scale,), size, "nearest").size for image in images) for scale in SCALES}
    scales = list({seen: scale for scale, seen in reversed(sizes.items())}.values())[::-1]
    for scale in scales:
        for row, part, labels in zip(rows, parts, groups_at(scale, images, backbone, size)):
            row.append(overlay(part, labels, palette(GROUPS)))
    notes = [f"; the middle {PART} pixels" if max(image.shape[:2]) > PART else "" for image in images]
    captions = [[f"{n}: {image.shape[1]} x {image.shape[0]} pixels{p}"] for n, image, p in zip(names, images, notes)]
    titles = [f"--scale {scale}" + (f" (short side {size})" if scale == FIT else "") for scale in scales]
    return contact_sheet(
        rows,
        ["image", *titles],
        captions,
        [],
        f"{GROUPS} groups of {backbone.name} without training: does another scale show more?",
    )


def groups_at(scale: str, images: Sequence[np.ndarray], backbone: Backbone, size: int) -> list[np.ndarray]:
    """Group the middles of all images at a scale -> labels uint8 [h,w] of each, brighter groups later."""
    scaled = [first_scale(image, (scale,), size, TrainConfig().resample) for image in images]
    regions = [region_at(part, image.shape[:2]) for part, image in zip(scaled, images)]
    tiles = [tiles_of(region, part.size, size) for region, part in zip(regions, scaled)]
    features = [
        torch.stack([features_of(part.window(*place, size, size), backbone) for place in places])
        for part, places in zip(scaled, tiles)
    ]  # of each image [tiles,P,D]
    rows = torch.cat([part.flatten(0, 1) for part in features])
    centres = spherical_kmeans(rows, min(GROUPS, len(rows)), starts=2).centres
    grid = (size // backbone.patch, size // backbone.patch)
    maps = []
    for part, places, region, image in zip(features, tiles, regions, images):
        canvas = np.zeros((region.height, region.width), np.uint8)
        for (top, left), labels in zip(places, sk.assign(part.float(), centres, grid=grid, size=(size, size))):
            y, x = top - region.top, left - region.left  # negative where the tile reaches beyond the region
            target = canvas[max(0, y) : y + size, max(0, x) : x + size]
            target[:] = labels[max(0, -y) :, max(0, -x) :][: target.shape[0], : target.shape[1]].cpu().numpy()
        height, width = middle(image).shape[:2]
        maps.append(np.array(Image.fromarray(canvas).resize((width, height), Image.Resampling.NEAREST)))
    return by_brightness(maps, [middle(image) for image in images])


def middle(image: np.ndarray) -> np.ndarray:
    """The middle of an image, at most PART pixels high and wide."""
    top, left = (max(0, side - PART) // 2 for side in image.shape[:2])
    return image[top : top + PART, left : left + PART]


def region_at(scaled: Scaled, shape: tuple[int, ...]) -> Region:
    """Where the middle of an image of this shape lies at a scale, at least a pixel high and wide."""
    sides = [max(1, round(min(side, PART) * there / side)) for side, there in zip(shape, scaled.size)]
    return Region(*((there - side) // 2 for there, side in zip(scaled.size, sides)), *sides)


def tiles_of(region: Region, whole: tuple[int, int], size: int) -> list[tuple[int, int]]:
    """(top, left) of the squares that cover a region, inside the whole where that is as large as a square."""
    axes = []
    for first, side, length in zip(region[:2], region[2:], whole):
        about = first + (side - size) // 2
        axes.append(
            [first + place for place in starts(side, size, size)]
            if side > size
            else [max(0, min(about, length - size))]
        )
    return [(top, left) for top in axes[0] for left in axes[1]]


def features_of(pixels: np.ndarray, backbone: Backbone) -> Tensor:
    """Compute the features [P,D] of a square uint8 [S,S,3]."""
    return backbone(torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None])[0][0].float()


def by_brightness(maps: Sequence[np.ndarray], images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Renumber the groups of all `maps` uint8 [h,w] so that brighter ones, over the images below them, come later."""
    counts, sums = np.zeros(GROUPS), np.zeros(GROUPS)
    for labels, image in zip(maps, images):
        counts += np.bincount(labels.ravel(), minlength=GROUPS)
        sums += np.bincount(labels.ravel(), image.mean(axis=2).ravel(), minlength=GROUPS)
    order = np.argsort(sums / np.maximum(counts, 1), kind="stable")
    rank = np.empty(GROUPS, np.uint8)
    rank[order] = np.arange(GROUPS)
    return [rank[labels] for labels in maps]
