"""How the values in a file become a picture: RGB of 8 bits, and where it is a measurement.

Values of more than 8 bits, signed ones and floats have no fixed black and white. They are stretched between two limits:
by default one pair for a whole data set, so that intensities stay comparable between its images.

One pair serves all bands of a picture in colour, which keeps its hues. Bands that are not declared to be red, green and
blue (channels of a microscope, bands of a satellite) have units of their own: each gets a pair, so that a weak one does
not turn black.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from ..config import TrainConfig
from ..system.progress import say

# robust against hot and dead pixels, and against borders; between the 0.35 % of ImageJ and the 1 % of cellpose
PERCENTILES = (0.5, 99.5)
WHITE = 255  # shown where nothing was measured, as image viewers do
ROWS = 512  # that are converted at a time
SAMPLED = 2**22  # pixels whose percentiles are those of an image

Limits = tuple[float, float]
_told: set[str] = set()  # groups without a range that were met


class Rectangle(NamedTuple):
    """Pixels of a picture: rows `top` to `bottom` - 1, columns `left` to `right` - 1."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def inside(self) -> tuple[slice, slice]:
        """The index of these pixels in an array [H,W,...]."""
        return slice(self.top, self.bottom), slice(self.left, self.right)


class Picture(NamedTuple):
    """RGB `pixels` uint8 [H,W,3], and `valid` bool [H,W]: where they are measurements. None: everywhere."""

    pixels: np.ndarray
    valid: np.ndarray | None = None


class Samples(NamedTuple):
    """Values of a file, before anything is stretched.

    Attributes:
        values: of the bands that are shown, [H,W,1] or [H,W,3].
        kind: their type on disk, such as "uint16"; "uint8" is shown as it is.
        colour: whether three bands are declared to be red, green and blue.
        alpha: opacity, uint8 [H,W]; None for opaque images.
        nodata: the value that stands for no measurement, of all bands or of each; None if there is none.
        inverted: low values are bright.
    """

    values: np.ndarray
    kind: str
    colour: bool = True
    alpha: np.ndarray | None = None
    nodata: float | tuple[float | None, ...] | None = None
    inverted: bool = False

    @property
    def group(self) -> str:
        """The images that share one range."""
        return group_of(self.kind, self.colour, self.values.shape[2])

    def turned(self, orientation: int) -> Samples:
        """Upright by an EXIF orientation, 1 to 8."""
        alpha = None if self.alpha is None else turned(self.alpha, orientation)
        return self._replace(values=turned(self.values, orientation), alpha=alpha)

    def measured(self, rows: slice = slice(None), step: int = 1) -> np.ndarray:
        """Where each value is a measurement, bool [h,w,bands], of every `step`-th row and column."""
        values = self.values[rows][::step, ::step]
        measured = np.isfinite(values) if values.dtype.kind == "f" else np.ones(values.shape, bool)
        of_bands = enumerate(self.nodata) if isinstance(self.nodata, tuple) else [(slice(None), self.nodata)]
        for band, nodata in of_bands:
            if nodata is not None and np.isfinite(nodata):
                with np.errstate(over="ignore"):
                    # GDAL writes the number of float32 data with more digits than they have
                    missing = values.dtype.type(nodata) if values.dtype.kind == "f" else nodata
                measured[..., band] &= values[..., band] != missing
        if self.alpha is not None:
            measured &= self.alpha[rows][::step, ::step, None] > 0
        return measured

    def valid(self) -> np.ndarray | None:
        """Where the picture is a measurement, bool [H,W]; None: everywhere. One band may well hold the no-data value;
        all of them do where nothing was measured."""
        if self.values.dtype.kind != "f" and self.nodata is None and self.alpha is None:
            return None
        valid = np.empty(self.values.shape[:2], bool)
        for top in range(0, len(valid), ROWS):
            rows = slice(top, top + ROWS)
            valid[rows] = self.measured(rows).any(2)
            if self.values.dtype.kind == "f":
                valid[rows] &= np.isfinite(self.values[rows]).all(2)
        return None if valid.all() else valid

    def sample(self, most: int) -> list[np.ndarray]:
        """The measurements [n] in at most about `most` pixels, evenly spaced: of all bands together, or of each."""
        height, width, bands = self.values.shape
        step = max(1, round((height * width / most) ** 0.5))
        values, measured = self.values[::step, ::step], self.measured(step=step)
        if self.group == self.kind:
            return [values[measured]]
        return [values[..., band][measured[..., band]] for band in range(bands)]


@dataclass(frozen=True)
class Range:
    """The values of the images of one group (`Samples.group`) that become 0 and 255, a pair for all bands or one for
    each."""

    group: str
    limits: tuple[Limits, ...]

    def __str__(self) -> str:
        pairs = ", ".join(f"{number(low)} to {number(high)}" for low, high in self.limits)
        return f"{pairs} of {self.group}"


@dataclass(frozen=True)
class Reading:
    """How the values of files become RGB.

    Attributes:
        intensity: the (lowest, highest) value that become 0 and 255; "data": those in `ranges`; "image": those of each
            image, which a group without a range gets too. Images of 8 bits are never stretched.
        bands: the bands that are shown as red, green and blue, or the one that is shown as grey, from 1; None takes the
            first three.
        pages: "all", or the number of the page of a stack that is read, from 1.
        ranges: measured over a data set.
        surveyed: whether they are, so that a group without a range comes as a surprise.
    """

    intensity: Limits | Literal["data", "image"] = "data"
    bands: tuple[int, ...] | None = None
    pages: int | Literal["all"] = 1
    ranges: tuple[Range, ...] = ()
    surveyed: bool = field(default=False, compare=False)

    @classmethod
    def of(cls, config: TrainConfig) -> Reading:
        """Take it from the settings; nothing is measured yet."""
        return cls(intensity_of(config.intensity), config.bands, pages_of(config.pages))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Reading:
        """From what `as_json` gave. Exception where it is something else."""
        intensity, bands, pages = values["intensity"], values["bands"], values["pages"]
        if intensity not in ("data", "image"):
            low, high = map(float, intensity)
            intensity = (low, high)
        if pages != "all" and type(pages) is not int:
            raise ValueError("its pages are no number")
        ranges = tuple(
            Range(str(part["group"]), tuple((float(low), float(high)) for low, high in part["limits"]))
            for part in values["ranges"]
        )
        return cls(intensity, None if bands is None else tuple(map(int, bands)), pages, ranges)

    def as_json(self) -> dict[str, Any]:
        """All that decides pixels."""
        return {name: value for name, value in asdict(self).items() if name != "surveyed"}

    def changed(self, intensity: tuple[str, ...] | None, bands: tuple[int, ...] | None, pages: str | None) -> Reading:
        """Apply the flags --intensity, --bands and --pages that are given; other bands have no ranges yet."""
        reading = self
        if bands is not None and bands != self.bands:
            reading = replace(reading, bands=bands, ranges=())
        if intensity is not None:
            reading = replace(reading, intensity=intensity_of(intensity), ranges=())
        return reading if pages is None else replace(reading, pages=pages_of(pages))

    def __str__(self) -> str:
        """All of it, in one line for people; equal lines mean equal pixels."""
        parts = [str(part) for part in self.ranges] if self.intensity == "data" else [str(self.intensity)]
        parts += [] if self.bands is None else ["bands " + " ".join(map(str, self.bands))]
        parts += [] if self.pages == 1 else [f"pages {self.pages}"]
        return "; ".join(parts) or "8 bits"

    @property
    def first_page(self) -> int:
        """The page that is read of a stack, the first where all are."""
        return 1 if self.pages == "all" else self.pages

    def range_of(self, group: str) -> Range | None:
        """The range that was measured for a group of images."""
        return next((part for part in self.ranges if part.group == group), None)


PLAIN = Reading()


def intensity_of(words: tuple[str, ...]) -> Limits | Literal["data", "image"]:
    """The words of --intensity, which are legal."""
    if len(words) == 2:
        return float(words[0]), float(words[1])
    return "image" if words[0] == "image" else "data"


def pages_of(word: str) -> int | Literal["all"]:
    """The word of --pages, which is legal."""
    return "all" if word == "all" else int(word)


def turned(values: np.ndarray, orientation: int) -> np.ndarray:
    """Turn values [H,W,...] upright by their EXIF orientation, 1 to 8."""
    if orientation >= 5:
        values = values.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    return values


def group_of(kind: str, colour: bool, shown: int) -> str:
    """The name of the images that share one range: by the type of their values, and whether bands are apart."""
    return kind if colour or shown == 1 else f"{kind} bands"


def number(value: float) -> str:
    """A value of an image for people, and for a key: no two are alike."""
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)


def limits_of(values: np.ndarray) -> Limits:
    """The PERCENTILES of values [n], as two of them; the smallest and largest where these are one. (0, 0) for none."""
    if not len(values):
        return 0.0, 0.0
    low = float(np.percentile(values, PERCENTILES[0], method="lower"))
    high = float(np.percentile(values, PERCENTILES[1], method="higher"))
    return (low, high) if low < high else (float(values.min()), float(values.max()))


def shown(samples: Samples, reading: Reading = PLAIN) -> Picture:
    """Stretch what a file holds to RGB. Transparent places are laid on white, and places without data are white."""
    values, valid = samples.values, samples.valid()
    height, width, bands = values.shape
    stretched = samples.kind != "uint8"
    if stretched and not isinstance(reading.intensity, str):
        limits: tuple[Limits, ...] = (reading.intensity,)
    elif stretched:
        part = reading.range_of(samples.group) if reading.intensity == "data" else None
        limits = tuple(map(limits_of, samples.sample(SAMPLED))) if part is None else part.limits
        if part is None and reading.surveyed and reading.intensity == "data" and samples.group not in _told:
            _told.add(samples.group)
            why = "none was among the images that were looked at"
            say(f"intensity of {samples.group}: from each image itself, because {why}; --intensity LOW HIGH fixes it")
    as_they_are = not stretched and bands == 3 and samples.alpha is None
    pixels = values if as_they_are else np.empty((height, width, 3), np.uint8)
    for top in () if as_they_are else range(0, height, ROWS):
        rows = slice(top, top + ROWS)
        block = stretch(values[rows], limits) if stretched else values[rows]
        pixels[rows] = 255 - block if samples.inverted else block
        if samples.alpha is not None:
            alpha = samples.alpha[rows, :, None].astype(np.uint16)
            pixels[rows] = (pixels[rows] * alpha + WHITE * (255 - alpha) + 127) // 255
    if valid is not None:
        pixels[~valid] = WHITE
    return Picture(pixels, valid)


def stretch(values: np.ndarray, limits: tuple[Limits, ...]) -> np.ndarray:
    """Values [h,w,bands] as uint8, from limits for all bands or for each."""
    low, high = (np.array(ends, np.float64) for ends in zip(*limits))
    with np.errstate(over="ignore", invalid="ignore"):
        # float32 would lose steps of large integers
        scaled = (values.astype(np.float64) - low) * 255 / np.where(high > low, high - low, 1)
        return np.rint(np.clip(np.nan_to_num(scaled, posinf=255, neginf=0), 0, 255)).astype(np.uint8)
