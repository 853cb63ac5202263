"""A look at the files of a data set before they are read: the range of their values, their pages, and what of them is
not shown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from ..system.progress import announced
from ..system.stores import File
from . import raster
from .base import Dataset, Files
from .evenly import evenly
from .header import Header
from .imageerror import ImageError
from .images import header_of, read_samples
from .reading import PERCENTILES, Range, Reading, limits_of, number

HEADERS = 1024  # files whose headers are looked at
MEASURED = 64  # images whose values are read
MEASURED_BYTES = 2**31  # that these take on the whole
PIXELS = 2**16  # of each that count: an image has the weight of any other
STACKS = (".tif", ".tiff", ".webp")  # suffixes of files that may hold several pages


class Place(NamedTuple):
    """An image: a file, and its page from 1; None for the page that a `Reading` names."""

    file: File
    page: int | None = None


def settle(train: Dataset, val: Dataset | None, reading: Reading) -> tuple[Dataset, Dataset | None]:
    """Read two data sets alike: with the ranges of the first, measured where `reading` lacks them.

    Their notes say what was measured and what is not shown. UserError for bands or pages of images that are read as
    their owners publish them.
    """
    train, reading = settled(train, reading)
    return train, None if val is None else settled(val, reading, tell_known=False)[0]


def settled(dataset: Dataset, reading: Reading, *, tell_known: bool = True) -> tuple[Dataset, Reading]:
    """A data set read so, with a range for every kind of value that it has, and that reading.

    tell_known: whether its notes repeat the ranges that `reading` has.
    """
    if not isinstance(dataset, Files):
        return dataset, reading
    if not dataset.reads_files:
        if (reading.bands, reading.pages) != (None, 1):
            flag = "--bands" if reading.bands else "--pages"
            raise UserError(f"{flag}: {dataset.name} is read as its owners publish it; leave {flag} out")
        return dataset, reading
    dataset, notes = with_pages(dataset) if reading.pages == "all" else (dataset, ())
    places = [Place(*pair) for pair in zip(dataset.images, dataset.pages or [None] * len(dataset))]
    reading, lines = survey(places, reading, tell_known=tell_known)
    return replace(dataset, reading=reading, notes=(*dataset.notes, *notes, *lines)), reading


def with_pages(files: Files) -> tuple[Files, tuple[str, ...]]:
    """Make an image of every page, and a note of how many stacks there are. The first page alone keeps the label."""
    counts = page_counts(files.images)
    stacks = sum(count > 1 for count in counts)
    if not stacks:
        return files, ()
    names = page_names(files.names, counts)
    pages = [(index, page) for index, count in enumerate(counts) for page in range(1, count + 1)]
    notes = [f"{stacks} of {len(files)} files are stacks: {len(pages)} images with all their pages"]
    if any(files.labels[index] is not None and counts[index] > 1 for index in range(len(files))):
        notes.append("the label of a stack is that of its first page; the other pages have none")
    split = replace(
        files,
        names=tuple(names),
        images=tuple(files.images[index] for index, _ in pages),
        labels=tuple(files.labels[index] if page == 1 else None for index, page in pages),
        pages=tuple(page for _, page in pages),
    )
    return split, tuple(notes)


def page_counts(paths: Sequence[File]) -> list[int]:
    """How many pages each file has; 1 where it cannot be read."""
    counts = []
    with announced(f"pages      counting those of {len(paths)} files"):
        for path in paths:
            pages = 1
            if path.suffix.lower() in STACKS:
                with suppress(ImageError):
                    pages = header_of(path).pages
            counts.append(pages)
    return counts


def page_names(names: Sequence[str], counts: Sequence[int]) -> list[str]:
    """The name of every page: stack#2.tif for the second page of stack.tif, with as many digits as the last one has.

    The number comes before the suffix, so that files written for the pages differ. Another # avoids the name of a file.
    """
    taken, paged = {name.casefold() for name in names}, []
    for name, count in zip(names, counts):
        if count == 1:
            paged.append(name)
            continue
        path, digits, mark = Path(name), len(str(count)), ""
        pages = [name]
        while not taken.isdisjoint(page.casefold() for page in pages):
            mark += "#"
            stems = [f"{path.stem}{mark}{page:0{digits}}" for page in range(1, count + 1)]
            pages = [path.with_name(stem + path.suffix).as_posix() for stem in stems]
        paged += pages
    return paged


def survey(places: Sequence[Place], reading: Reading, *, tell_known: bool = True) -> tuple[Reading, tuple[str, ...]]:
    """Add a range to `reading` for every kind of value in the images that has none, and say what is not shown.

    Looks at HEADERS of the files, evenly spaced, and reads the values of MEASURED images of each kind.
    """
    looked, headers = evenly(places, HEADERS), []
    with announced(f"kinds      looking at {len(looked)} of {len(places)} images"):
        for place in looked:
            with suppress(ImageError):
                headers.append((place, header_of(place.file)))
    notes = list(not_shown([header for _, header in headers], reading))
    reading = replace(reading, surveyed=True)
    deep = [(place, header) for place, header in headers if header.kind != "uint8"]
    if not deep:
        return reading, tuple(notes)
    kinds = ", ".join(sorted({header.kind for _, header in deep}))
    if reading.intensity == "image":
        share, other = PERCENTILES
        notes.append(f"intensity of {kinds}: from the {share} % to the {other} % value of each image -> 0 to 255")
    elif isinstance(reading.intensity, tuple):
        low, high = map(number, reading.intensity)
        notes.append(f"intensity {low} to {high} of {kinds} -> 0 to 255, as given")
    else:
        groups = {header.group(reading.bands) for _, header in deep}
        known = [part for part in reading.ranges if part.group in groups]
        ranges, lines = measure(deep, reading)
        reading = replace(reading, ranges=(*reading.ranges, *ranges))
        notes += lines
        if tell_known:
            notes += [f"intensity {part} -> 0 to 255, as in training" for part in known]
    return reading, tuple(notes)


def measure(deep: list[tuple[Place, Header]], reading: Reading) -> tuple[list[Range], list[str]]:
    """The ranges of the groups that have none yet, and a line about each group."""
    by_group = defaultdict(list)
    for place, header in deep:
        by_group[header.group(reading.bands)].append((place, header.bytes))
    ranges, lines = [], []
    for group, members in sorted(by_group.items()):
        if reading.range_of(group) is not None:
            continue
        mean = sum(size for _, size in members) / len(members)
        chosen = evenly(members, max(1, min(MEASURED, int(MEASURED_BYTES / max(mean, 1)))))
        values: list[list[np.ndarray]] = []
        with announced(f"intensity  measuring that of {len(chosen)} images of {group}"):
            for place, _ in chosen:
                with suppress(ImageError):
                    of_image, sample = sampled(place, reading)
                    if of_image == group:
                        values.append(sample)
        if not values:
            continue
        limits = tuple(limits_of(np.concatenate(of_band)) for of_band in zip(*values))
        ranges.append(Range(group, limits))
        lines.append(f"intensity {ranges[-1]} -> 0 to 255, from {len(values)} image{'s' * (len(values) > 1)}")
    return ranges, lines


def sampled(place: Place, reading: Reading) -> tuple[str, list[np.ndarray]]:
    """The group of an image, and the measurements in about PIXELS pixels of it, see `Samples.sample`."""
    if isinstance(place.file, Path) and raster.in_windows(place.file, reading, place.page):
        with raster.opened(place.file, reading, place.page) as opened:
            return opened.group, opened.sample(PIXELS)
    samples = read_samples(place.file, reading, place.page)
    return samples.group, samples.sample(PIXELS)


def not_shown(headers: Sequence[Header], reading: Reading) -> Iterator[str]:
    """A line for every kind of thing in the files that is left out or converted."""
    count = f"of {len(headers)} images"
    several = [header.bands for header in headers if header.bands not in (1, 3)]
    if several and reading.bands is None:
        numbers = " or ".join(map(str, sorted(set(several))))
        first = "the first three are" if max(several) > 2 else "the first is"
        yield f"{len(several)} {count} have {numbers} bands: {first} shown, --bands chooses others"
    stacks = [header.pages for header in headers if header.pages > 1]
    if stacks and reading.pages != "all":
        most = f"{max(stacks)} pages" if min(stacks) == max(stacks) else f"up to {max(stacks)} pages"
        yield f"{len(stacks)} {count} are stacks of {most}: page {reading.pages} is read, --pages all reads every one"
    for space in sorted({header.space for header in headers} - {""}):
        converted = sum(header.space == space for header in headers)
        yield f"{converted} {count} are {space}: converted to RGB without their colour profile"
    marked = [header.nodata for header in headers if header.nodata is not None]
    if marked:
        values = " or ".join(number(value) for value in sorted(set(marked))[:3])
        yield f"{len(marked)} {count} mark pixels without data by {values}: not learnt from, and 255 in masks"
    transparent = sum(header.opacity for header in headers)
    if transparent:
        yield f"{transparent} {count} may be transparent: laid on white, and no data where nothing of them shows"
