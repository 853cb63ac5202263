"""Labels that follow the picture's edges: soft scores of the codes, refined by the picture, tile by tile.

The scores of a pixel are softmax(t cos), of the cosines of its upsampled code to the prototypes, or of the upsampled
best cosines of merged groups. `Refiner` refines them in a rectangle of the picture; `refined_tiles` cuts a picture of
any size into such rectangles while its codes come band by band. A rectangle is computed with as many pixels around it
as reach into it, so that tiles leave no seam: all of them for "guided" and "joint", those within two sigmas for a CRF.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from math import ceil, isqrt
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import smooseg_kernels as sk
from smooseg_kernels import edges
from smooseg_kernels.rows import inverse_norms, unit_rows

from ..config import Refine
from ..datasets import IGNORE
from ..datasets.images import ImageError
from ..datasets.reading import Picture, Rectangle
from ..system.host import return_freed_memory
from ..system.progress import say
from .grouping import Grouping
from .tiles import FAINT, TOP, Start

SCORES = 1 << 24  # of a rectangle with its surroundings, about
CODES = 1 << 25  # numbers in the codes of a row of rectangles, about, so that memory grows little with the width
STRIP = 1 << 20  # scores that are upsampled at a time
CRF_TEMPERATURE = 2.0  # the paper's: softmax(2 cos)
BILATERAL, GAUSSIAN = (67.0, 3.0, 4.0), (1.0, 3.0)  # the paper's: sigma in pixels, sigma of colour, weight
CRF_SIGMAS = 2  # of the bilateral kernel, around a rectangle
TEMPERATURE = 10.0  # of the other ways: probabilities as in training. With 2, borders are as good, and mIoU 0.1 less
GUIDED_RADIUS, GUIDED_EPS = 3.0, 1e-5  # patches; variance of colours in 0..1
NOISE_RADIUS, NOISE_EPS = 2, 3e-4  # of the filter that takes noise off the guide: pixels; variance of colours in 0..1
JOINT_WINDOW, JOINT_SIGMAS = 5, (1.0, 0.03)  # patches; sigma of position in patches, and of colours in 0..1
JOINT_DENSITY = 2  # the most cells per patch and axis that these windows grow by, because time grows with its square
EXACT_PAIRS, EXACT_PASSES = 5e8, 11  # of pixels that a thread sums in a second; the kernel's sum, and ten iterations
EXACT_NOTED_S, EXACT_LIMIT_S = 30.0, 3600.0  # from where a line gives the time of a picture, and where it is refused


class Plane(NamedTuple):
    """The cells over a picture: grid (h, w) of them lie on size (height, width) pixels, which begin at the corner of
    the picture's shape (H, W). Shifts and upsamplers tell `density` cells per patch and axis apart, others one."""

    grid: tuple[int, int]
    size: tuple[int, int]
    shape: tuple[int, int]
    density: int = 1

    @property
    def cell(self) -> float:
        """Pixels a side of a cell on the picture."""
        return max(side / cells for side, cells in zip(self.size, self.grid))

    @property
    def patch(self) -> float:
        """Pixels a side of a patch of the backbone on the picture."""
        return self.density * self.cell


@dataclass(frozen=True)
class Refiner:
    """Refines the scores of codes by the picture under them; "none" upsamples them alone."""

    method: Refine
    grouping: Grouping
    plane: Plane

    @cached_property
    def radius(self) -> int:
        """The radius of the guided filter's windows in pixels."""
        return max(1, round(GUIDED_RADIUS * self.plane.patch))

    @property
    def finer(self) -> int:
        """Cells per patch and axis that the windows of joint upsampling count; JOINT_DENSITY of them bound its time."""
        return min(self.plane.density, JOINT_DENSITY)

    @cached_property
    def step(self) -> int:
        """Pixels at whose multiples rectangles begin."""
        return max(1, self.radius // edges.SUBSAMPLED) if self.method == "guided" else 1

    @cached_property
    def reach(self) -> int:
        """Pixels around a rectangle that reach into it."""
        if self.method == "guided":
            return (2 * ceil(self.radius / self.step) + 2 + ceil(2 * NOISE_RADIUS / self.step)) * self.step
        if self.method == "joint":
            return ceil((JOINT_WINDOW // 2 * self.finer + 1) * self.plane.cell)
        if self.method == "none":
            return 0
        return ceil(CRF_SIGMAS * BILATERAL[0])

    @cached_property
    def side(self) -> int:
        """The side of the rectangles into which a picture is cut; one no larger than they are with their surroundings
        stays whole."""
        room = isqrt(SCORES // len(self.grouping)) - 2 * self.reach
        side, longer = max(room, 2 * self.reach, self.step), max(self.plane.shape)
        return longer if longer <= side + 2 * self.reach else side // self.step * self.step

    @cached_property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of the rectangles: `side` of each, or less and more, so that the codes under a row of
        rectangles take no more than CODES as long as these have 2 * `reach` rows."""
        side, around = self.side, 2 * self.reach
        codes = self.plane.grid[1] * self.grouping.prototypes.shape[1]
        rows = max(around, self.step, int(CODES / codes * self.plane.cell) - around) // self.step * self.step
        if rows >= side:
            return side, side
        columns = SCORES // len(self.grouping) // (rows + around) - around
        return rows, max(side, columns // self.step * self.step)

    def start(self, row: int) -> Start:
        """Where to begin so that the row `row` of pixels is labelled: at the first row of its rectangles."""
        top = row // self.sides[0] * self.sides[0]
        return Start(top, self.patches(self.around(Rectangle(top, 0, top + 1, 1))).top)

    def around(self, core: Rectangle) -> Rectangle:
        """A rectangle with all that reaches into it."""
        (H, W), reach = self.plane.shape, self.reach
        top, left, bottom, right = core
        return Rectangle(max(0, top - reach), max(0, left - reach), min(H, bottom + reach), min(W, right + reach))

    def cores(self) -> Iterator[Rectangle]:
        """The rectangles that make up the picture, row by row from the top."""
        (H, W), (rows, columns) = self.plane.shape, self.sides
        for top in range(0, H, rows):
            for left in range(0, W, columns):
                yield Rectangle(top, left, min(top + rows, H), min(left + columns, W))

    def exact_seconds(self) -> float:
        """About how long "crf-exact" takes for the picture on the threads of this CPU."""
        windows = map(self.around, self.cores())
        pairs = sum(float((w.bottom - w.top) * (w.right - w.left)) ** 2 for w in windows)
        return EXACT_PASSES * pairs / (EXACT_PAIRS * torch.get_num_threads())

    def patches(self, window: Rectangle) -> Rectangle:
        """The patches that the scores of these pixels depend on."""
        tops, ends = [], []
        for first, end, patches, length in zip(window[:2], window[2:], self.plane.grid, self.plane.size):
            tops.append(max(0, int((first + 0.5) * patches / length - 0.5)))
            ends.append(min(patches, int((end - 0.5) * patches / length + 0.5) + 1))
        return Rectangle(*tops, *ends)

    @torch.no_grad()
    def probabilities(
        self, codes: Tensor, weight: Tensor | None, first: tuple[int, int], picture: Picture, core: Rectangle
    ) -> Tensor:
        """The refined probabilities [n,m,K] of the pixels of a rectangle, 1 in all.

        Args:
            codes: [a,b,Z] of `patches(around(core))`, as `Grouping.scores` gives them.
            weight: of these patches [a,b], see `patch_weight`.
            first: row and column of the first of them.
            picture: the whole picture; what it shows without data has no say.
        """
        window = self.around(core)
        weight = torch.ones_like(codes[..., 0]) if weight is None else weight.to(codes)
        patches = Patches(self.grouping, codes, weight, first, self.plane)
        if self.method == "none":
            return patches.softmax(patches.rows(core), patches.columns(core), TEMPERATURE)
        pixels, valid = (
            None if part is None else torch.from_numpy(part[window.top : window.bottom, window.left : window.right])
            for part in picture
        )
        assert pixels is not None
        pixels, valid = pixels.to(codes.device), None if valid is None else valid.to(codes.device)
        inner = Rectangle(*(side - start for side, start in zip(core, (*window[:2], *window[:2]))))
        if self.method == "guided":
            probs = self._guided(patches, pixels, valid, window, inner)
        elif self.method == "joint":
            probs = self._joint(patches, pixels, valid, window, inner)
        else:
            scores = patches.softmax(patches.rows(window), patches.columns(window), CRF_TEMPERATURE)
            if valid is not None and not valid.all():  # no evidence of their own
                scores[~valid] = 1 / scores.shape[-1]
                pixels[~valid] = pixels[valid].float().mean(0).to(torch.uint8) if valid.any() else 128
            method = "exact" if self.method == "crf-exact" else "lattice"
            probs = sk.dense_crf(
                scores.permute(2, 0, 1).contiguous(), pixels, gaussian=GAUSSIAN, bilateral=BILATERAL, method=method
            ).permute(1, 2, 0)
            return probs[inner.top : inner.bottom, inner.left : inner.right]
        probs = probs.clamp(min=1e-6)  # also where windows show no data
        return probs / probs.sum(-1, keepdim=True)

    def _guided(
        self, patches: Patches, pixels: Tensor, valid: Tensor | None, window: Rectangle, inner: Rectangle
    ) -> Tensor:
        """The guided filter by the picture without its noise, which would leave single pixels of other groups.

        Fits see the scores at the centres of the subsampled cells alone: scores are smooth there.
        """
        step, guide = self.step, colours_of(pixels)
        counted = guide.new_ones(1, *guide.shape[1:3], 1) if valid is None else valid[None, ..., None].to(guide)
        guide = edges.denoised(guide, counted, radius=NOISE_RADIUS, eps=NOISE_EPS)
        cells = edges.pooled(counted, step)
        colours = edges.pooled(guide * counted, step) / cells.clamp(min=1)
        rows, columns = patches.rows(window, step), patches.columns(window, step)
        scores = patches.softmax(rows, columns, TEMPERATURE)[None]
        radius = max(1, round(self.radius / step))
        lines, _ = edges.fitted(scores, colours, cells, radius=radius, eps=GUIDED_EPS)
        # upsampled lines of the rectangle need the cells next to it
        first = [max(0, start // step - 1) for start in inner[:2]]
        lines = lines[:, first[0] : -(-inner.bottom // step) + 1, first[1] : -(-inner.right // step) + 1]
        part = guide[:, first[0] * step : inner.bottom, first[1] * step : inner.right]
        probs = edges.applied(lines, part, step)[0]
        return probs[inner.top - first[0] * step :, inner.left - first[1] * step :]

    def _joint(
        self, patches: Patches, pixels: Tensor, valid: Tensor | None, window: Rectangle, inner: Rectangle
    ) -> Tensor:
        guide, mask = colours_of(pixels), None if valid is None else valid[None]
        rows, columns = patches.rows(window), patches.columns(window)
        colours = edges.cell_means(guide, (rows, columns), patches.grid, mask)
        return edges.joint(
            (TEMPERATURE * patches.cosines).softmax(-1)[None],
            guide[:, inner.top : inner.bottom, inner.left : inner.right],
            colours,
            (rows[inner.top : inner.bottom], columns[inner.left : inner.right]),
            window=JOINT_WINDOW // 2 * self.finer * 2 + 1,
            sigmas=(JOINT_SIGMAS[0] * self.finer, JOINT_SIGMAS[1]),
            weight=patches.weight[None],
        )[0]


class Patches:
    """Codes [a,b,Z] of a rectangle of patches whose first one is `first` (row, column) of the plane."""

    def __init__(self, grouping: Grouping, codes: Tensor, weight: Tensor, first: tuple[int, int], plane: Plane):
        self.merged, self.weight, self.first, self.plane = grouping.groups is not None, weight, first, plane
        self.directions = unit_rows(grouping.prototypes.float())
        self.codes = codes.float()
        self.grid = codes.shape[0], codes.shape[1]

    @property
    def cosines(self) -> Tensor:
        """[a,b,K], of the patches."""
        return self.codes if self.merged else unit_rows(self.codes) @ self.directions.mT

    def rows(self, window: Rectangle, step: int = 1) -> Tensor:
        """Where the centres of the rows of a window lie, in patches from the first one on; of cells of `step` rows."""
        return self._centres(window.top, window.bottom, 0, step)

    def columns(self, window: Rectangle, step: int = 1) -> Tensor:
        return self._centres(window.left, window.right, 1, step)

    def _centres(self, start: int, end: int, axis: int, step: int) -> Tensor:
        cells = torch.arange(-(-(end - start) // step), dtype=torch.float64)
        centres = (start + (cells + 0.5) * step) * (self.plane.grid[axis] / self.plane.size[axis])
        return (centres - self.first[axis]).to(self.codes)

    def softmax(self, rows: Tensor, columns: Tensor, temperature: float) -> Tensor:
        """softmax(temperature * cos) [n,m,K] where rows [n] and columns [m] meet."""
        left, right, x = taps(columns, self.grid[1])
        count = max(1, STRIP // (len(columns) * len(self.directions)))
        strips = []
        for part in rows.split(count):
            above, below, y = taps(part, self.grid[0])
            weighted = self.codes * self.weight[..., None]
            lines = torch.lerp(weighted[above], weighted[below], y[:, None, None])  # [n,b,Z]
            scores = lines if self.merged else lines @ self.directions.mT
            fine = torch.lerp(scores[:, left], scores[:, right], x[:, None])
            if self.merged:
                weights = torch.lerp(self.weight[above], self.weight[below], y[:, None])
                inverse = 1 / torch.lerp(weights[:, left], weights[:, right], x)[..., None]
            else:  # the length of the upsampled code
                inverse = inverse_lengths(lines, left, right, x)
            strips.append((fine * (temperature * inverse)).softmax(-1))
        return torch.cat(strips)


def inverse_lengths(lines: Tensor, left: Tensor, right: Tensor, x: Tensor) -> Tensor:
    """1 / |lerp(lines[:, left], lines[:, right], x)| [n,m,1] of lines [n,b,Z], without upsampling them; 0 for no
    length, by the rule of `smooseg_kernels.rows`."""
    squares = (lines * lines).sum(-1)
    following = torch.cat([lines[:, 1:], lines[:, -1:]], 1)
    products = (lines * following).sum(-1)  # with the code to the right
    square = (1 - x) ** 2 * squares[:, left] + x**2 * squares[:, right] + 2 * x * (1 - x) * products[:, left]
    return inverse_norms(square.clamp(min=0).sqrt()[..., None])


def taps(centres: Tensor, patches: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bilinear interpolation at `centres` [n] in patches: the patches before and after, and the share of the second."""
    place = (centres - 0.5).clamp(min=0)
    before = place.long().clamp(max=patches - 1)
    return before, (before + 1).clamp(max=patches - 1), place - before


def colours_of(pixels: Tensor) -> Tensor:
    """uint8 [H,W,3] -> [1,H,W,3] in 0..1, or [1,H,W,1] where the picture is grey."""
    grey = bool((pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 1] == pixels[..., 2]).all())
    return (pixels[..., :1] if grey else pixels)[None].float() / 255


def patch_weight(valid: np.ndarray | None) -> Tensor | None:
    """The say of patches [h,w] among those around a pixel, from which of them show data; None where all do."""
    return None if valid is None else torch.where(torch.from_numpy(valid), 1.0, FAINT)


def refined_tiles(
    bands: Iterable[Tensor], refiner: Refiner, picture: Picture, valid: np.ndarray | None = None, start: Start = TOP
) -> Iterator[tuple[Rectangle, Tensor]]:
    """Refine a picture in rectangles, row by row from the top -> each with its probabilities [n,m,K].

    Memory: the bands of codes under a row of rectangles, and one rectangle.

    Args:
        bands: codes or scores [n,w,Z] from top to bottom, as `Grouping.scores` gives them, from `start.cell` on.
        valid: which patches count, bool [h,w], None where all do.
        start: the first row of pixels, with which a rectangle begins.
    """
    require_time(refiner)
    coming, first = iter(bands), start.cell
    kept: deque[Tensor] = deque()  # bands of which the first begins at row `first` of the patches
    for core in refiner.cores():
        if core.top < start.pixel:
            continue
        patches = refiner.patches(refiner.around(core))
        while kept and first + len(kept[0]) <= patches.top:
            first += len(kept.popleft())
        while first + sum(map(len, kept)) < patches.bottom:
            band = next(coming)
            if kept or first + len(band) > patches.top:
                kept.append(band.contiguous())  # a view would keep the codes of other heads
            else:
                first += len(band)
            del band
        columns = slice(patches.left, patches.right)
        part = cut(kept, (patches.top - first, patches.bottom - first), columns)
        of_part = None if valid is None else patch_weight(valid[patches.top : patches.bottom, columns])
        yield core, refiner.probabilities(part, of_part, (patches.top, patches.left), picture, core)
        if refiner.sides[1] < refiner.plane.shape[1]:  # else pieces of free memory add up to gigabytes
            return_freed_memory()


def cut(bands: Iterable[Tensor], rows: tuple[int, int], columns: slice) -> Tensor:
    """A copy of some rows and columns of bands [n,w,Z] that follow each other."""
    (top, bottom), parts = rows, []
    for band in bands:
        parts.append(band[max(0, top) : max(0, bottom), columns])
        top, bottom = top - len(band), bottom - len(band)
    return torch.cat(parts)


def require_time(refiner: Refiner) -> None:
    """Says once for each size how long "crf-exact" takes on a CPU. ImageError where it would be hours."""
    if refiner.method != "crf-exact" or refiner.grouping.head.teacher.device.type != "cpu":
        return
    seconds, (H, W) = refiner.exact_seconds(), refiner.plane.shape
    size = f"{W} x {H} pixels"
    if seconds > EXACT_LIMIT_S:
        time = f"about {seconds / 3600:,.0f} hours on this CPU for {size}"
        advice = "give --refine crf, its approximation on a lattice, or a --device with a GPU"
        raise ImageError("image", f"--refine crf-exact would take {time}", advice)
    if seconds > EXACT_NOTED_S:
        minutes = max(1, round(seconds / 60))
        say_once(f"crf-exact: about {minutes} min on this CPU for an image of {size}; --refine crf takes seconds")


say_once = cache(say)


def refined_bands(
    bands: Iterable[Tensor], refiner: Refiner, picture: Picture, valid: np.ndarray | None = None, start: Start = TOP
) -> Iterator[np.ndarray]:
    """Label a picture by its refined scores -> bands uint8 [n,W], the likeliest groups, IGNORE without data."""
    width, band = picture.pixels.shape[1], np.empty((0, 0), np.uint8)
    for core, probs in refined_tiles(bands, refiner, picture, valid, start):
        if not core.left:
            band = np.empty((core.bottom - core.top, width), np.uint8)
        band[:, core.left : core.right] = probs.argmax(-1).to(torch.uint8).cpu().numpy()
        if core.right == width:
            if picture.valid is not None:
                band[~picture.valid[core.top : core.bottom]] = IGNORE
            yield band
