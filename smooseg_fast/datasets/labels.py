"""Class numbers that label files mean: found from the labels of a whole data set, and the same for all its splits.

Files hold numbers from 0 with 255 for pixels without a label, but also 0 and 255 for two classes, grey values spread
from black to white, numbers with gaps, or colours. The values in use become consecutive classes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np

from ..errors import UserError
from ..system.ahead import ahead
from ..system.progress import SILENT_S, Bar, say
from ..system.stores import File
from .base import IGNORE
from .evenly import evenly
from .images import ImageError
from .labelmap import counted
from .masks import ODD, Mask, MaskKind, Tally, Values

SAMPLED = 2000  # labels whose numbers are looked up, evenly spaced over all splits
LOOKED_AT = 16  # labels after which photos among them are noticed
THREADS = 4  # that read them
MOST = 200  # distinct values, beyond which they are no classes
VOIDS = (255, 65535)  # the white of 8 and 16 bits, by convention without a label
NO_LABEL = -1  # in signed files
STEP = 16  # between the levels of grey masks, at least; numbers of classes lie closer
LISTED = 12  # values that a line lists
KIND_TITLES = {
    "bits": "black and white",
    "numbers": "8-bit grey",
    "deep": "of more than 8 bits",
    "palette": "with a palette",
    "colours": "in colours",
}


@dataclass(frozen=True)
class Scheme:
    """The class of every value in the label files of a data set.

    Attributes:
        reading: the values that count.
        classes: value -> class, 0 upwards, or IGNORE.
        names: of the classes.
        notes: lines for people, about what is not as usual.
        owner: who defines the classes: other values are then illegal. None: they are ignored, and said once.
        seen: pixels of each class in the labels that were looked up.
    """

    reading: Values
    classes: dict[int, int]
    names: tuple[str, ...]
    notes: tuple[str, ...]
    owner: str | None
    seen: tuple[int, ...]

    def look_up(self, mask: Mask) -> tuple[np.ndarray, dict[int, int]]:
        """Return classes uint8 [H,W], and the pixels of every value that has none; those become IGNORE."""
        values = mask.values(self.reading)
        known = np.array(sorted(self.classes))
        of_known = np.array([self.classes[value] for value in known.tolist()], np.uint8)
        if values.dtype == np.uint8:
            table = np.full(256, IGNORE, np.uint8)
            legal = np.zeros(256, bool)
            inside = (known >= 0) & (known <= 255)
            table[known[inside]], legal[known[inside]] = of_known[inside], True
            classes, unknown = table[values], values[~legal[values]]
        else:
            places = np.minimum(np.searchsorted(known, values), len(known) - 1)
            missed = known[places] != values
            classes, unknown = np.where(missed, np.uint8(IGNORE), of_known[places]), values[missed]
        numbers, counts = np.unique(unknown, return_counts=True)
        return classes, dict(zip(numbers.tolist(), counts.tolist()))


@dataclass
class Labelling:
    """Maps the numbers in the label `files` of all splits to classes; reads them at most once, when first needed.

    Args:
        place: the folder or file that messages name.
        names: the classes by classes.txt, or None.
        owner: classes.txt.
        ignore: numbers that count as not labelled, with 255 where that is no class.
    """

    place: str
    files: tuple[File, ...]
    names: tuple[str, ...] | None = None
    owner: str = ""
    ignore: tuple[int, ...] = ()
    _scheme: Scheme | None = field(default=None, init=False)
    _told: set[int] = field(default_factory=set, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    @property
    def scheme(self) -> Scheme:
        """The classes of the values. UserError when the labels hold none, or hold no classes."""
        with self._lock:
            if self._scheme is None:
                self._scheme = self._find()
            return self._scheme

    def __call__(self, mask: Mask, path: File) -> np.ndarray:
        """Return the classes uint8 [H,W] of a label; UserError naming `path` for values that classes.txt excludes."""
        scheme = self.scheme
        classes, unknown = scheme.look_up(mask)
        if unknown and scheme.owner is not None:
            raise UserError(
                f"{path}: the number {max(unknown)} in {sum(unknown.values())} pixels, which is no class of "
                f"{scheme.owner} (0 to {len(scheme.names) - 1}, and {IGNORE} to ignore); correct the label, or copy "
                "the original again"
            )
        with self._lock:
            fresh = unknown.keys() - self._told
            self._told |= fresh
        if fresh:
            numbers = listed([written(value, scheme.reading) for value in sorted(fresh)])
            say(
                f"{path}: {numbers} in {sum(unknown[value] for value in fresh)} pixels, in no label that was looked up "
                "before: not counted here; write classes.txt to count all numbers"
            )
        return classes

    def _find(self) -> Scheme:
        tallies = read_tallies(self.place, self.files)
        require_classes(self.place, tallies)
        reading, notes = choose_reading(self.place, tallies)
        pixels: dict[int, int] = {}
        for one in tallies:
            for value, count in zip(one.values(reading).tolist(), one.counts.tolist()):
                pixels[value] = pixels.get(value, 0) + count
        if len(pixels) > MOST + 1:
            raise UserError(
                f"{self.place}: the labels hold {len(pixels):,} different values, which are no classes but a photo's, "
                "smoothed borders, or numbers of single objects; write a number for each class as 8-bit PNG, or take "
                "the labels out to learn without figures"
            )
        scheme, read = scheme_of(self, reading, pixels, notes), len(tallies)
        sample = (f"by {read:,} of {len(self.files):,} labels, evenly spaced",) if read < len(self.files) else ()
        return replace(scheme, notes=(*scheme.notes, *sample))


def scheme_of(labelling: Labelling, reading: Values, pixels: dict[int, int], notes: list[str]) -> Scheme:
    """Give the values with so many `pixels` their classes. UserError when all are ignored."""
    names, place = labelling.names, labelling.place
    ignored = {value for value in pixels if value in labelling.ignore or value == NO_LABEL}
    if reading != "shown" and (void := void_of(sorted(pixels))) is not None:
        ignored.add(void)
    used = sorted(pixels.keys() - ignored)
    if not used:
        values = listed([written(value, reading) for value in sorted(ignored)]) or "without a value"
        raise UserError(
            f"{place}: every pixel of every label is {values} (ignore); write class numbers from 0 into the labels"
        )
    missing = sorted(set(labelling.ignore) - pixels.keys())
    notes += [f"--ignore {listed(map(str, missing))}: in no label"] if missing else []
    if names is not None and reading == "shown":
        notes.append(f"{labelling.owner} names numbers, but these labels hold colours: it is not used")
        names = None
    if names is not None:
        if len(used) != len(names) or used[-1] < len(names) or not are_levels(used):
            classes = {number: number for number in range(len(names))}
            classes.update(dict.fromkeys([IGNORE, NO_LABEL, *labelling.ignore, *ignored], IGNORE))
            seen = tuple(pixels.get(number, 0) * (classes[number] != IGNORE) for number in range(len(names)))
            notes += void_note(ignored, reading, [])
            return Scheme(reading, classes, names, tuple(notes), labelling.owner, seen)
        named = listed([f"{value} {name}" for value, name in zip(used, names)])
        notes.append(f"the values in the labels take the names of {labelling.owner} in order: {named}")
    elif len(used) > 1 and used != list(range(len(used))):
        notes.append(renumbered(used, reading, ignored))
    notes += void_note(ignored, reading, used)
    classes = {value: number for number, value in enumerate(used)}
    classes.update(dict.fromkeys([*ignored, NO_LABEL], IGNORE))
    if reading != "shown" and 255 not in classes:
        classes[255] = IGNORE
    by_value = tuple(written(value, reading, "class ") for value in used)
    return Scheme(reading, classes, names or by_value, tuple(notes), None, tuple(pixels[value] for value in used))


def void_of(values: Sequence[int]) -> int | None:
    """Return the one of the ascending `values` that means "not labelled" by convention, or None.

    White does, unless the values are levels of grey from black to white, such as 0 and 255, or 0, 128 and 255.
    """
    values = [value for value in values if value != NO_LABEL]
    if not values or values[-1] not in VOIDS:
        return None
    return None if are_levels(values) else values[-1]


def are_levels(values: Sequence[int]) -> bool:
    """Return whether ascending `values` are levels of grey from black on, and not numbers from a list of classes."""
    return len(values) > 1 and values[0] == 0 and bool((np.diff(values) >= STEP).all())


def void_note(ignored: set[int], reading: Values, used: Sequence[int]) -> list[str]:
    """Say what does not count; and that white does, where it might mean something else."""
    notes = []
    if ignored:
        verb = "counts" if len(ignored) == 1 else "count"
        notes.append(f"{listed([written(value, reading) for value in sorted(ignored)])} {verb} as not labelled")
    if len(used) > 2 and used[-1] in VOIDS and reading != "shown":
        notes.append(f"{used[-1]} is a class; where it marks pixels without a label, add --ignore {used[-1]}")
    return notes


def renumbered(used: Sequence[int], reading: Values, ignored: set[int]) -> str:
    """Say which values became consecutive classes."""
    last = len(used) - 1
    if reading == "shown":
        return f"the labels hold colours, each a class: {listed([written(value, reading) for value in used])}"
    if list(used) == [0, 255]:
        return "the labels hold 0 and 255 alone: two classes, of which 255 becomes class 1"
    missing = used[-1] - last - sum(0 <= value < used[-1] for value in ignored)
    gaps = f"; {missing} number{'s' if missing > 1 else ''} below {used[-1]} in no label" if missing else ""
    numbers = listed(map(str, used))
    return f"the labels hold the numbers {numbers}, which become classes 0 {'and' if last == 1 else 'to'} {last}{gaps}"


def written(value: int, reading: Values, title: str = "") -> str:
    """Write a value: a number behind its `title`, or a colour as on the web."""
    return f"#{value % ODD:06x}" if reading == "shown" or value >= ODD else f"{title}{value}"


def listed(items: Iterable[str]) -> str:
    """Write "a, b and c", or of many the first."""
    first = list(items)
    if len(first) > LISTED:
        first[LISTED - 1 :] = [f"{len(first) + 1 - LISTED} more"]
    return " and ".join([", ".join(first[:-1]), first[-1]] if len(first) > 1 else first)


def read_tallies(place: str, files: Sequence[File]) -> list[Tally]:
    """Count the numbers in at most SAMPLED labels. UserError where they look like photos, or none can be read."""
    tallies: list[Tally] = []
    errors: list[ImageError] = []
    chosen = evenly(files, SAMPLED)

    def read(path: File) -> Tally | ImageError:
        try:
            return counted(path)
        except ImageError as error:  # whoever reads this label learns of it
            return error

    with closing(ahead(read, chosen, threads=THREADS, waiting=THREADS)) as results:
        for result in Bar(
            iterable=results, total=len(chosen), desc="numbers", unit="label", delay=SILENT_S, leave=False
        ):
            (tallies if isinstance(result, Tally) else errors).append(result)
            if len(tallies) == LOOKED_AT:  # before photos by the thousand are counted
                require_classes(place, tallies)
    if not tallies:
        raise errors[0]
    return tallies


def require_classes(place: str, tallies: Sequence[Tally]) -> None:
    """UserError when most of the labels look like photos."""
    many = sum(not one.few for one in tallies)
    if 2 * many > len(tallies):
        raise UserError(
            f"{place}: {many} of {len(tallies)} labels hold more values than classes have, as photos do (up to "
            f"{max(len(one.numbers) for one in tallies):,}); write a number for each class as 8-bit PNG, or take the "
            "labels out to learn without figures"
        )


def choose_reading(place: str, tallies: Sequence[Tally]) -> tuple[Values, list[str]]:
    """Choose which values of the label files count. UserError for kinds that do not go together.

    The integers as stored, where all files hold numbers, or indices of one palette; else the grey values or the colours
    that are shown.
    """
    kinds: set[MaskKind] = {one.kind for one in tallies}
    notes = []
    if "colours" not in kinds and kinds in ({"palette"}, {"bits"}):
        if one_palette(tallies):
            return "stored", []
        notes.append("palettes differ from label to label, so the colours count and not their numbers")
    elif "colours" not in kinds and "palette" not in kinds:
        black_and_white = all(set(one.numbers.tolist()) <= {0, 255} for one in tallies if one.kind != "bits")
        if "bits" not in kinds or not black_and_white or "deep" in kinds:
            return "stored", []
    grey = all((one.values("grey") < ODD).all() for one in tallies)
    if "deep" in kinds or (kinds == {"palette", "numbers"} and not grey):
        counts = {kind: sum(one.kind == kind for one in tallies) for kind in sorted(kinds)}
        mixture = ", ".join(f"{count} {KIND_TITLES[kind]}" for kind, count in counts.items())
        raise UserError(f"{place}: labels of different kinds ({mixture}); save all in one kind, such as 8-bit grey PNG")
    return ("grey" if grey else "shown"), notes


def one_palette(tallies: Sequence[Tally]) -> bool:
    """Return whether every index in use has the same colour in all labels."""
    colours: dict[int, int] = {}
    for one in tallies:
        for number, colour in zip(one.numbers.tolist(), one.values("shown").tolist()):
            if colours.setdefault(number, colour) != colour:
                return False
    return True
