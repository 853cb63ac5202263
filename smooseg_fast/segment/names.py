"""Names, colours and merges of groups: what people call the numbers of a mask.

A name belongs to the set of fine groups that a group consists of, and not to a number of groups. It follows its group
to every cut of the tree in which that set is one group, or one merge of groups; elsewhere the group is "group N".

Merging is a lookup of masks: pixels of merged groups get the lowest of their numbers, and every other group keeps its
own. A merge holds at every cut in which whole groups fill it, so its parts stay together at finer cuts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..system.files import read_text, regular, write_json
from ..system.stores import File
from .colours import palette

Colour = tuple[int, int, int]
Part = frozenset[int]  # the fine groups of a group, or of several that are merged

NAMES = "names.json"  # next to a checkpoint, for people and tools; what is read is in the checkpoint
LONGEST = 60  # characters of a name
JOINERS = re.compile("[\u200c\u200d]")  # in words of Persian and in emoji
FIELDS = {"groups", "least_share", "names", "colours", "merge"}  # of names.json


@dataclass(frozen=True)
class Group:
    """A group as people see it.

    number: of its pixels in a mask. name: as given, or "group N". colour: RGB, 0 to 255 each. share: of the area of
    the training images, 0 to 1; None where nobody measured it.
    """

    number: int
    name: str
    colour: Colour
    share: float | None = None

    @property
    def label(self) -> str:
        """The name, or the number of a group without one."""
        return str(self.number) if self.name == f"group {self.number}" else self.name

    @property
    def caption(self) -> str:
        """Number and name, such as "3 road", or the number of a group without a name."""
        return str(self.number) if self.label == str(self.number) else f"{self.number} {self.name}"

    def as_json(self) -> dict[str, Any]:
        return {"number": self.number, "name": self.name, "colour": as_hex(self.colour), "share": self.share}


@dataclass(frozen=True)
class Names:
    """Names, colours and merges of the groups of one cut, by their numbers in it; ready for names.json.

    groups: of the cut, before merging: its numbers are 0..groups - 1. names, colours: of the groups that have some; of
    merged ones under their lowest number. merge: lists of numbers, each ascending. least_share: of the cut.
    """

    groups: int
    names: dict[int, str] = field(default_factory=dict)
    colours: dict[int, Colour] = field(default_factory=dict)
    merge: list[list[int]] = field(default_factory=list)
    least_share: float = 0.0

    @property
    def table(self) -> np.ndarray:
        """The number in a mask of every number before merging, uint8 [256]; those that are no group stay."""
        table = np.arange(256, dtype=np.uint8)
        for numbers in self.merge:
            table[numbers] = min(numbers)
        return table

    @property
    def numbers(self) -> list[int]:
        """The numbers that a mask can hold, ascending."""
        return sorted(set(self.table[: self.groups].tolist()))

    def name(self, number: int) -> str:
        """The name of a group, or "group N"."""
        return self.names.get(number, f"group {number}")

    def listed(self, shares: Sequence[float] | None = None) -> list[Group]:
        """The groups after merging, in the order of their numbers. shares: of every group before merging, [groups]."""
        area = None if shares is None else self.merged(np.asarray(shares, float))
        defaults = palette(256).tolist()
        return [
            Group(
                number=number,
                name=self.name(number),
                colour=self.colours.get(number, tuple(defaults[number])),
                share=None if area is None else float(area[place]),
            )
            for place, number in enumerate(self.numbers)
        ]

    def merged(self, counts: np.ndarray) -> np.ndarray:
        """Sum the rows [groups,...] of groups that are merged -> a row for each of `numbers`."""
        sums = np.zeros_like(counts)
        np.add.at(sums, self.table[: self.groups], counts)
        return sums[self.numbers]

    def as_json(self) -> dict[str, Any]:
        least = {"least_share": self.least_share} if self.least_share else {}
        return {
            "groups": self.groups,
            **least,
            "names": {str(number): name for number, name in sorted(self.names.items())},
            "colours": {str(number): as_hex(colour) for number, colour in sorted(self.colours.items())},
            "merge": self.merge,
        }

    def write(self, path: str | Path) -> Path:
        """Write names.json. WriteError when it cannot be written."""
        return write_json(path, self.as_json())

    @classmethod
    def read(cls, path: str | Path, flag: str = "--file") -> Names:
        """Read a names.json. UserError, naming the `flag`, for a file that is none."""
        place = f"{flag} {path}"
        try:
            content = json.loads(regular(Path(path).expanduser()).read_text(encoding="utf-8"))
        except OSError as error:
            advice = "give the path of the names.json, such as ~/Downloads/names.json"
            raise UserError(f"{place}: cannot be read ({error.strerror}); {advice}") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: is not JSON; give a names.json") from error
        return cls.from_json(content, place)

    @classmethod
    def from_json(cls, content: Any, place: str) -> Names:
        """The names in a names.json's content. UserError that begins with `place` for what is not legal."""
        if not isinstance(content, dict) or type(content.get("groups")) is not int:
            raise UserError(f'{place}: is no names file; it needs {{"groups": N, "names": {{"3": "road"}}}}')
        if unknown := sorted(set(content) - FIELDS):
            raise UserError(f"{place}: holds {unknown[0]!r:.40}; a names file holds {', '.join(sorted(FIELDS))}")
        names, colours, merge = content.get("names", {}), content.get("colours", {}), content.get("merge", [])
        least = content.get("least_share", 0.0)
        if not isinstance(names, dict) or not isinstance(colours, dict) or type(least) not in (int, float):
            raise UserError(f'{place}: names and colours must look like {{"3": "road"}} and {{"3": "#aabbcc"}}')
        if not isinstance(merge, list) or not all(isinstance(numbers, list) for numbers in merge):
            raise UserError(f"{place}: merge must be lists of group numbers such as [[7, 12]], got {merge!r:.60}")
        given = cls(
            groups=content["groups"],
            names={number_of(number, place): name for number, name in names.items()},
            colours={number_of(number, place): colour_of(colour, place) for number, colour in colours.items()},
            merge=[sorted(number_of(number, place) for number in numbers) for numbers in merge],
            least_share=float(least),
        )
        return given.checked(place)

    def checked(self, place: str) -> Names:
        """These names, if they are legal. UserError that begins with `place` for unknown numbers, for names that are
        doubled or no text, and for merges that overlap."""
        merged = [number for numbers in self.merge for number in numbers]
        for number in (*self.names, *self.colours, *merged):
            if not 0 <= number < self.groups:
                last = self.groups - 1
                raise UserError(f"{place}: there is no group {number}; the {self.groups} groups are 0 to {last}")
        for number in merged:
            if merged.count(number) > 1:
                raise UserError(f"{place}: group {number} is merged twice; list it once")
        if alone := next((numbers for numbers in self.merge if len(numbers) < 2), None):
            raise UserError(f"{place}: a merge needs two groups or more, got {alone}")
        table, holders = self.table, dict[str, int]()
        for number, name in sorted(self.names.items()):
            check_name(name, place)
            if table[number] != number:
                raise UserError(f"{place}: group {number} is merged into {table[number]}; name {table[number]}")
            if name in holders:
                one = holders[name]
                raise UserError(f"{place}: {name!r} names groups {one} and {number}; merge them: {one},{number}={name}")
            holders[name] = number
        return self


@dataclass(frozen=True)
class Naming:
    """All names, colours and merges of a checkpoint, by fine groups.

    merges are disjoint. A name may belong to nested parts, of which a cut shows one, and never to parts side by side.
    """

    names: Mapping[Part, str] = field(default_factory=dict)
    colours: Mapping[Part, Colour] = field(default_factory=dict)
    merges: tuple[Part, ...] = ()

    def at(self, cut: np.ndarray, least_share: float = 0.0) -> Names:
        """The names that hold at a cut, given as the group of every fine group, int [K0]."""
        parts = parts_of(cut)
        merge = []
        for whole in self.merges:
            inside = [number for number, part in enumerate(parts) if part <= whole]
            if len(inside) > 1 and sum(len(parts[number]) for number in inside) == len(whole):
                merge.append(inside)
        units = units_of(parts, merge)
        return Names(
            groups=len(parts),
            names={number: self.names[unit] for number, unit in units.items() if unit in self.names},
            colours={number: self.colours[unit] for number, unit in units.items() if unit in self.colours},
            merge=sorted(merge),
            least_share=least_share,
        )

    def changed(self, cut: np.ndarray, given: Names) -> Naming:
        """These, with what is `given` at a cut in place of what held there. What holds at other cuts alone stays, but
        for merges that overlap new ones, and for a name that another group now has."""
        parts, before = parts_of(cut), self.at(cut)
        visible = {frozenset().union(*(parts[number] for number in numbers)) for numbers in before.merge}
        units = units_of(parts, given.merge)
        new = [units[min(numbers)] for numbers in given.merge]
        merges = [whole for whole in self.merges if whole not in visible and all(whole.isdisjoint(one) for one in new)]
        names = {part: name for part, name in self.names.items() if part not in units.values()}
        for number, name in given.names.items():
            unit = units[number]
            names = {part: other for part, other in names.items() if other != name or not part.isdisjoint(unit)}
            names[unit] = name
        colours = {part: colour for part, colour in self.colours.items() if part not in units.values()}
        colours |= {units[number]: colour for number, colour in given.colours.items()}
        return Naming(names, colours, (*merges, *new))

    def apart(self, cut: np.ndarray, numbers: Iterable[int]) -> Naming:
        """These, without the merges that have these numbers at a cut; their parts get the names of before back."""
        units = units_of(parts_of(cut), self.at(cut).merge)
        gone = [units[number] for number in numbers]
        return Naming(self.names, self.colours, tuple(whole for whole in self.merges if whole not in gone))

    def as_json(self) -> dict[str, Any]:
        return {
            "names": [[sorted(part), name] for part, name in self.names.items()],
            "colours": [[sorted(part), as_hex(colour)] for part, colour in self.colours.items()],
            "merges": [sorted(part) for part in self.merges],
        }

    @classmethod
    def from_json(cls, content: Any, fine: int) -> Naming:
        """The naming in a header, of `fine` fine groups. ValueError, KeyError or UserError for what is not legal."""

        def part(numbers: Any) -> Part:
            if not numbers or not all(type(number) is int and 0 <= number < fine for number in numbers):
                raise ValueError(f"its names are of groups {numbers!r:.60}, and there are {fine}")
            return frozenset(numbers)

        merges = tuple(part(numbers) for numbers in content["merges"])
        if sum(map(len, merges)) != len(frozenset().union(*merges)):
            raise ValueError("its merges overlap")
        for _, name in content["names"]:
            check_name(name, "a name")
        return cls(
            names={part(numbers): name for numbers, name in content["names"]},
            colours={part(numbers): colour_of(colour, "a colour") for numbers, colour in content["colours"]},
            merges=merges,
        )


UNNAMED = Naming()


def parts_of(cut: np.ndarray) -> list[Part]:
    """The fine groups of every group of a cut, int [K0]."""
    return [frozenset(np.flatnonzero(cut == number).tolist()) for number in range(int(cut.max()) + 1)]


def units_of(parts: Sequence[Part], merge: Iterable[Sequence[int]]) -> dict[int, Part]:
    """The fine groups of every group after merging, by its number."""
    units = dict(enumerate(parts))
    for numbers in merge:
        units[min(numbers)] = frozenset().union(*(units.pop(number) for number in numbers))
    return units


def number_of(text: Any, place: str) -> int:
    """A group's number from JSON or a command line. UserError that begins with `place` for anything else."""
    if type(text) is int or (isinstance(text, str) and re.fullmatch(r"\d{1,4}", text, re.ASCII)):
        return int(text)
    raise UserError(f"{place}: {text!r:.40} is not the number of a group; give one as the masks hold it, such as 3")


def check_name(name: Any, place: str) -> None:
    """UserError that begins with `place` unless `name` is a line of text."""
    seen = JOINERS.sub("", name) if isinstance(name, str) else ""
    if not seen.strip() or name != name.strip() or not seen.isprintable():
        raise UserError(f"{place}: {name!r:.60} is no name; give printable text without spaces at its ends")
    if len(name) > LONGEST:
        raise UserError(f"{place}: {name!r:.40} has {len(name)} characters; give a name of at most {LONGEST}")


def colour_of(text: Any, place: str) -> Colour:
    """The colour that #rrggbb stands for. UserError that begins with `place` for anything else."""
    if not isinstance(text, str) or not re.fullmatch("#[0-9a-fA-F]{6}", text):
        raise UserError(f"{place}: {text!r:.40} is no colour; give #rrggbb, such as #e6a00c")
    red, green, blue = bytes.fromhex(text[1:])
    return red, green, blue


def as_hex(colour: Colour) -> str:
    return f"#{bytes(colour).hex()}"


def write_groups(path: str | Path, groups: Sequence[Group]) -> Path:
    """Write the groups of a folder of masks as JSON, for readers of the folder alone."""
    return write_json(path, {"groups": [group.as_json() for group in groups]})


def read_groups(path: File) -> list[Group]:
    """Read what `write_groups` wrote. UserError when the file is missing or not as it was written."""
    advice = "run the same smooseg predict again, which writes it"
    try:
        content = json.loads(read_text(path))
        return [
            Group(int(row["number"]), str(row["name"]), colour_of(row["colour"], "colour"), row["share"])
            for row in content["groups"]
        ]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {advice}") from error
    except (ValueError, KeyError, TypeError, RecursionError, UserError) as error:
        raise UserError(f"{path}: is damaged; {advice}") from error
