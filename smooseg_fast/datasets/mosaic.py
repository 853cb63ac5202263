"""The embedded demo: pictures of materials fitted together, with exact labels, drawn from a seed; nothing on disk.

An image is a scene of one of a few kinds (each kind does without some of the materials), cut into irregular regions of
one procedural material each. What varies without changing the label: from image to image the colour and strength of the
light, the distance, focus, haze and sensor noise; from image to image and material to material the contrast, colour,
size and pattern; from region to region the rotation; within an image the slope, patches and shadows of the light.
Lengths are in units of a 224-pixel picture, so that another size shows the same scene finer or coarser, its sensor
noise apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.random import PCG64, Generator, SeedSequence
from scipy import ndimage

from .reading import PLAIN, Picture

VERSION = 1  # part of the fingerprint: raise it with every change that alters an image
UNITS = 224  # the side of every scene
TILE = 256  # the side of the periodic noise; a power of two, so that wrapping is a bit mask
NUMBERS = 4096  # random numbers for the squares of a grid; a power of two for the same reason

Array = np.ndarray
Texture = Callable[[Generator, Array, Array], tuple[Array, Array]]


class Mosaic:
    """`count` labelled images of size x size pixels. Image i depends on (seed, split, i) and the size alone.

    The same arguments give the same labels and pixels on every machine, up to a last digit where its sine rounds
    differently. The splits "train" and "val" share no image of any seed. size: at least 16 pixels.
    """

    labelled, held_out, notes, reading = True, True, (), PLAIN

    def __init__(self, split: Literal["train", "val"], count: int, size: int = UNITS, seed: int = 0) -> None:
        self.split, self.count, self.size, self.seed = split, count, size, seed
        self.name = f"mosaic {split}"
        self.names = tuple(f"{split}/{index:05d}.png" for index in range(count))
        self.class_names = tuple(material.name for material in MATERIALS)

    def __len__(self) -> int:
        return self.count

    def picture(self, index: int) -> Picture:
        return Picture(self.image(index))

    def image(self, index: int) -> Array:
        """Draw image `index`, uint8 [size,size,3]."""
        rng = self._generator(index)
        scene = Scene(rng, self.size)
        return photograph(rng, scene, scene.paint(rng))

    def label(self, index: int) -> Array:
        """Draw the class of every pixel, uint8 [size,size]."""
        return Scene(self._generator(index), self.size).label

    def fingerprint(self) -> str:
        arguments = f"mosaic {VERSION} {self.split} {self.count} {self.size} {self.seed}"
        return hashlib.sha256(arguments.encode()).hexdigest()

    def _generator(self, index: int) -> Generator:
        return Generator(PCG64(SeedSequence((self.seed, ("train", "val").index(self.split), index))))


class Scene:
    """The regions of an image and their materials: a Voronoi diagram of random points, seen through a bumpy pane.

    Attributes, all [size,size]: x, y, the place of every pixel in units; region, its number; label, its class; seam, 0
    to 1, how close the border of its region is.
    """

    def __init__(self, rng: Generator, size: int) -> None:
        axis = (np.arange(size, dtype=np.float32) + 0.5) * np.float32(UNITS / size)
        self.x, self.y = np.meshgrid(axis, axis)
        kind = KINDS[rng.integers(len(KINDS))]
        # by sorting, because numpy may change how it shuffles
        present = np.array(kind)[np.argsort(rng.random(len(kind)), kind="stable")][: rng.integers(4, 6)].tolist()
        more = rng.integers(5, 9) - len(present)  # each lies in one region, some in several
        self.materials = present + [present[rng.integers(len(present))] for _ in range(more)]
        x, y = (
            place + sum(height * smooth_field(rng, size, knots) for knots, height in WARP) for place in (self.x, self.y)
        )
        sites = rng.random((len(self.materials), 2), dtype=np.float32) * UNITS
        distances = ((x - site_x) ** 2 + (y - site_y) ** 2 for site_x, site_y in sites)
        self.region, nearest, second = two_nearest(enumerate(distances))
        self.label = np.array(self.materials, np.uint8)[self.region]
        self.seam = np.exp(-(np.sqrt(second) - np.sqrt(nearest)) / 3)

    def paint(self, rng: Generator) -> Array:
        """Paint linear reflectances, float32 [size,size,3]."""
        distance = 2 ** rng.uniform(-0.5, 0.5)
        looks = {number: MATERIALS[number].look(rng, distance) for number in sorted(set(self.materials))}
        canvas = np.empty((self.label.size, 3), np.float32)
        for region, number in enumerate(self.materials):
            inside = np.flatnonzero(self.region == region)
            (period, dark, light), angle = looks[number], rng.uniform(0, 2 * np.pi)
            du, dv = rng.uniform(100, 200, 2).astype(np.float32)
            c, s = np.float32(np.cos(angle) / period), np.float32(np.sin(angle) / period)
            x, y = self.x.ravel()[inside], self.y.ravel()[inside]
            mix, relief = MATERIALS[number].texture(rng, c * x + s * y + du, c * y - s * x + dv)
            colour = dark + np.clip(mix, 0, 1)[:, None] * (light - dark)
            canvas[inside] = colour * (relief * relief)[:, None]
        return canvas.reshape(*self.label.shape, 3) * (1 - 0.6 * self.seam)[:, :, None]


def photograph(rng: Generator, scene: Scene, canvas: Array) -> Array:
    """Photograph the canvas in uneven light, through haze and lens, on a noisy sensor: uint8 [size,size,3]."""
    size = len(canvas)
    slope = rng.uniform(0, 2 * np.pi)
    x, y = (scene.x - UNITS / 2) / UNITS, (scene.y - UNITS / 2) / UNITS
    across = np.float32(np.cos(slope)) * x + np.float32(np.sin(slope)) * y
    light = 1 + rng.uniform(0.1, 0.8) * across + 0.25 * smooth_field(rng, size, 2)
    light = light * (1 - rng.uniform(0, 1) * (x * x + y * y))
    shadow = smooth_step(smooth_field(rng, size, 3) + across, rng.uniform(0.1, 0.6), rng.uniform(0.65, 0.9))
    light = np.maximum(light, 0.15) * (1 - np.float32(rng.uniform(0.1, 0.5)) * shadow)

    warmth, green, exposure = 0.42 * rng.standard_normal(), 0.22 * rng.standard_normal(), 2 ** rng.uniform(-0.8, 0.5)
    tint = (exposure * np.exp([warmth, green, -warmth])).astype(np.float32)
    haze = np.float32(0.08 * rng.random() * rng.random())
    linear = canvas * (light[:, :, None] * tint * (1 - haze)) + haze * 0.6 * tint
    focus = rng.uniform(0.3, 0.8) * size / UNITS
    linear = ndimage.gaussian_filter(linear, (focus, focus, 0), mode="nearest", truncate=3)
    # pictures hold square roots of linear values, on which the noise of counting photons is the same everywhere
    noise = rng.uniform(0.01, 0.03) * rng.standard_normal(linear.shape, np.float32)
    return np.rint(255 * np.clip(np.sqrt(np.clip(linear, 0, 1)) + noise, 0, 1)).astype(np.uint8)


# Noise and geometry


@lru_cache(maxsize=1)
def noise_tile() -> Array:
    """Return periodic smooth noise float32 [TILE*TILE], uniform over 0 to 1, with bumps about 8 samples across."""
    rough = Generator(PCG64(TILE)).random((TILE, TILE))
    order = np.argsort(ndimage.gaussian_filter(rough, 2.5, mode="wrap"), axis=None, kind="stable")
    tile = np.empty(TILE * TILE, np.float32)
    tile[order] = (np.arange(TILE * TILE) + 0.5) / (TILE * TILE)
    return tile


def noise(rng: Generator, u: Array, v: Array, frequency: float) -> Array:
    """Sample smooth noise in 0 to 1 at the points (u, v), bilinear: about `frequency` / 8 bumps a unit."""
    tile, (du, dv) = noise_tile(), TILE * rng.random(2, dtype=np.float32)
    u, v = u * frequency + du, v * frequency + dv
    column, row = np.floor(u), np.floor(v)
    u, v = u - column, v - row
    column, row = column.astype(np.int32), row.astype(np.int32)
    left, right = column & (TILE - 1), (column + 1) & (TILE - 1)
    top, bottom = (row & (TILE - 1)) * TILE, ((row + 1) & (TILE - 1)) * TILE
    upper = tile[top + left] * (1 - u) + tile[top + right] * u
    lower = tile[bottom + left] * (1 - u) + tile[bottom + right] * u
    return upper * (1 - v) + lower * v


def smooth_field(rng: Generator, size: int, knots: int) -> Array:
    """Draw float32 [size,size], a cubic B-spline through knots x knots random numbers of -2 to 2; deviation about 0.5.

    Summed element by element: the rounding of a matrix product would depend on the machine.
    """
    grid = 4 * rng.random((knots + 3, knots + 3), dtype=np.float32) - 2
    place = (np.arange(size, dtype=np.float32) + 0.5) * np.float32(knots / size)
    first = place.astype(np.int32)
    t = place - first
    weights = ((1 - t) ** 3 / 6, (3 * t**3 - 6 * t**2 + 4) / 6, (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6, t**3 / 6)
    columns = sum(weight * grid[:, first + k] for k, weight in enumerate(weights))
    return sum(weight[:, None] * columns[first + k] for k, weight in enumerate(weights))


def smooth_step(x: Array, low: float, high: float) -> Array:
    """Rise from 0 at `low` to 1 at `high` without a corner."""
    t = np.clip((x - np.float32(low)) / np.float32(high - low), 0, 1)
    return t * t * (3 - 2 * t)


def random_numbers(rng: Generator) -> Array:
    """Draw float32 [NUMBERS] in 0 to 1, one for each `square`."""
    return rng.random(NUMBERS, dtype=np.float32)


def square(column: Array, row: Array) -> Array:
    """Return the index of a square of the grid in `random_numbers`; whole numbers of either sign and any type."""
    return (column.astype(np.int32) * 37 + row.astype(np.int32) * 1031) & (NUMBERS - 1)


def cells(rng: Generator, u: Array, v: Array, jitter: float) -> tuple[Array, Array, Array]:
    """Draw Worley's cells: one point in every unit square, up to `jitter` / 2 from its middle.

    Returns the distances to the nearest and the second nearest point, and the nearest one's number in 0 to 1.
    """
    right, down, tone = random_numbers(rng), random_numbers(rng), random_numbers(rng)
    right, down = (0.5 + jitter * (place - 0.5) for place in (right, down))
    column, row = np.floor(u).astype(np.int32), np.floor(v).astype(np.int32)
    u, v = u - column, v - row

    def points() -> Iterator[tuple[Array, Array]]:
        for dy, dx in np.ndindex(3, 3):
            place = square(column + dx - 1, row + dy - 1)
            yield place, (right[place] + (dx - 1 - u)) ** 2 + (down[place] + (dy - 1 - v)) ** 2

    winner, nearest, second = two_nearest(points())
    return np.sqrt(nearest), np.sqrt(second), tone[winner]


def two_nearest(points: Iterable[tuple[int | Array, Array]]) -> tuple[Array, Array, Array]:
    """From (number, squared distances) of points, the nearest one's number, its distances, and the second nearest's."""
    winner: int | Array = 0
    nearest, second = np.float32(np.inf), np.float32(np.inf)
    for number, distance in points:
        winner = np.where(distance < nearest, number, winner)
        second = np.minimum(second, np.maximum(nearest, distance))
        nearest = np.minimum(nearest, distance)
    return np.asarray(winner), nearest, second


# Textures: (rng, u, v), points in periods -> (mix, relief). mix: 0 is the dark colour, 1 the light one; relief: 1 is
# fully lit, lower in dents


def bricks(rng: Generator, u: Array, v: Array) -> tuple[Array, Array]:
    tones, length, joint = random_numbers(rng), np.float32(rng.uniform(1.7, 2.4)), rng.uniform(0.07, 0.11)
    row = np.floor(v)
    along = u / length + (row.astype(np.int32) & 1) * 0.5
    column = np.floor(along)
    u, v = along - column, v - row
    face = smooth_step(np.minimum(np.minimum(u, 1 - u) * length, np.minimum(v, 1 - v)), 0.6 * joint, 1.6 * joint)
    mix = face * (0.72 + 0.28 * tones[square(column, row)] + 0.16 * (noise(rng, along * length, v + row, 40) - 0.5))
    return mix, 0.72 + 0.28 * face + 0.14 * face * (smooth_step(v, 0.75, 1) - smooth_step(-v, -0.25, 0))


def planks(rng: Generator, u: Array, v: Array) -> tuple[Array, Array]:
    tones, board = random_numbers(rng), np.floor(v)
    tone = tones[square(board, board)]
    rings = noise(rng, 0.12 * u + 40 * tone, 0.55 * v + 40 * tone, 8)
    grain = 0.5 + 0.5 * np.sin(rng.uniform(34, 48) * rings)
    mix = 0.5 * tone + 0.32 * grain + 0.22 * noise(rng, 0.15 * u, 2.6 * v, 16)
    return mix, 0.45 + 0.55 * smooth_step(np.minimum(v - board, board + 1 - v), 0, 0.07)


def weave(rng: Generator, u: Array, v: Array) -> tuple[Array, Array]:
    sag = 0.3 * noise(rng, u, v, 2)
    u, v = u + sag, v + sag
    column, row = np.floor(u), np.floor(v)
    u, v = u - column - 0.5, v - row - 0.5
    over = ((column + row).astype(np.int32) & 1).astype(bool)
    across, along, thread = np.where(over, v, u), np.where(over, u, v), np.where(over, row, column + 97)
    twist = np.sin(8 * np.pi * across + 2 * along)
    bulge = np.sqrt(np.clip(1 - (1.85 * across) ** 2, 0, 1)) * (1 - 1.5 * along * along)
    return 0.08 + 0.5 * over + 0.3 * random_numbers(rng)[square(thread, thread)] + 0.08 * twist, 0.35 + 0.7 * bulge


def spots(rng: Generator, u: Array, v: Array) -> tuple[Array, Array]:
    nearest, _, tone = cells(rng, u, v, 0.55)
    ragged, radius = nearest + 0.22 * (noise(rng, u, v, 24) - 0.5), 0.22 + 0.16 * tone
    spot = 1 - smooth_step(ragged - radius, -0.05, 0.05)
    rim = smooth_step(ragged - 0.45 * radius, -0.05, 0.05)
    return 0.82 + 0.18 * noise(rng, u, v, 10) - spot * (0.35 + 0.5 * rim), np.ones_like(u)


def moss(rng: Generator, u: Array, v: Array) -> tuple[Array, Array]:
    bend = 0.22 * noise(rng, u, v, 10)
    nearest, second, tone = cells(rng, u + bend, v - bend, 0.95)
    cushion = smooth_step(second - nearest, 0.03, 0.13)
    mix = cushion * (0.45 + 0.35 * tone + 0.2 * noise(rng, u, v, 30))
    return mix, 0.6 + 0.4 * smooth_step(second - nearest, 0.05, 0.4)


def fur(rng: Generator, u: Array, v: Array) -> tuple[Array, Array]:
    v = v + 0.9 * noise(rng, u, v, 1.1)
    strands = 0.5 * noise(rng, 0.22 * u, v, 8) + 0.5 * noise(rng, 0.3 * u, 2.1 * v, 8)
    return 0.75 * strands + 0.35 * noise(rng, 0.5 * u, 0.8 * v, 2.6), 0.6 + 0.5 * strands


def marble(rng: Generator, u: Array, v: Array) -> tuple[Array, Array]:
    phase = u + 1.7 * noise(rng, u, v, 3) + 0.5 * noise(rng, u, v, 9)
    vein = 1 - np.abs(2 * (phase - np.floor(phase)) - 1)
    mix = 0.55 + 0.45 * noise(rng, u, v, 5) - 0.75 * smooth_step(vein, 0.86, 1) - 0.2 * smooth_step(vein, 0.3, 1)
    return mix, np.ones_like(u)


def gravel(rng: Generator, u: Array, v: Array) -> tuple[Array, Array]:
    nearest, second, tone = cells(rng, u, v, 0.9)
    stone, dome = smooth_step(second - nearest, 0.02, 0.22), np.sqrt(np.clip(1 - 1.6 * nearest * nearest, 0, 1))
    return 0.1 + 0.8 * tone + 0.25 * (noise(rng, u, v, 22) - 0.5), 0.2 + stone * (0.35 + 0.5 * dome)


@dataclass(frozen=True)
class Material:
    """One class: its texture, the usual length of a period in units, and the colours that the texture mixes, as shown
    in white light.
    """

    name: str
    texture: Texture
    period: float
    dark: tuple[int, int, int]
    light: tuple[int, int, int]

    def look(self, rng: Generator, distance: float) -> tuple[float, Array, Array]:
        """Draw how one image shows it: the period in units, and the two colours as linear reflectances."""
        dark, light = (np.array(colour, np.float32) / 255 for colour in (self.dark, self.light))
        half = (light - dark) / 2 * rng.uniform(0.7, 1.1)
        middle = (dark + light) / 2 + 0.04 * rng.standard_normal(3, np.float32) + 0.05 * rng.standard_normal()
        period = self.period * distance * 2 ** rng.uniform(-0.1, 0.1)
        dark, light = (np.clip(shown, 0.02, 1) ** 2 for shown in (middle - half, middle + half))
        return period, dark, light


MATERIALS = (
    Material("bricks", bricks, 11, (205, 198, 190), (170, 82, 74)),  # `dark` is the mortar
    Material("planks", planks, 21, (46, 64, 104), (138, 162, 208)),
    Material("weave", weave, 9, (32, 76, 76), (130, 188, 178)),
    Material("spots", spots, 17, (54, 40, 24), (226, 194, 100)),
    Material("moss", moss, 20, (38, 62, 36), (106, 158, 88)),
    Material("fur", fur, 7, (30, 27, 28), (116, 106, 102)),
    Material("marble", marble, 44, (138, 122, 118), (250, 244, 238)),
    Material("gravel", gravel, 10, (76, 62, 92), (186, 168, 204)),
)
MISSING = ((0, 5), (1, 7), (2, 4), (3, 6))  # each kind of scene does without two of the materials
KINDS = tuple(tuple(number for number in range(len(MATERIALS)) if number not in pair) for pair in MISSING)
WARP = ((3, 26.0), (9, 9.0), (26, 2.5))  # (knots, height in units) of the bumps that bend the borders of regions
