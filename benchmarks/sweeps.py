"""Scaling: times and memory against one size, all of one run, and their slopes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from cells import USUAL, Cell, Runs, age
from results import Row

LETTERS = "PHKB"
STATED = {"P": (784, 12544)}  # a slope over this range beside the one over everything measured


@dataclass
class Sweep:
    """One machine and letter: for each implementation its lines by the value of the letter, all of one run."""

    cell: Cell
    letter: str
    lines: dict[str, dict[int, Row]] = field(default_factory=dict)

    def points(self, name: str, figure: str) -> list[tuple[int, float]]:
        return [(at, row[figure]) for at, row in sorted(self.lines[name].items()) if row.get(figure, 0) > 0]

    def stopped(self, name: str) -> tuple[int, str] | None:
        """The first value beyond all that have a number, and why it has none; None where the curve does not stop."""
        last = max((at for at, _ in self.points(name, "median_ms")), default=0)
        return next(
            ((at, row["skipped"]) for at, row in sorted(self.lines[name].items()) if at > last and "skipped" in row),
            None,
        )

    def rows(self) -> list[Row]:
        return [row for line in self.lines.values() for row in line.values()]


def sweeps(cells: dict[Cell, Runs]) -> list[Sweep]:
    """Of each machine and letter the newest of the runs with the most numbers (as `collect` orders them): curves are of one run."""
    groups: dict[tuple, dict[Cell, Runs]] = {}
    for cell, runs in cells.items():
        letter = cell.case.removeprefix("scaling ")
        if cell.case.startswith("scaling ") and letter in LETTERS:
            groups.setdefault((cell[:3], letter), {})[cell] = runs
    found = []
    for (_, letter), group in sorted(groups.items(), key=lambda item: (str(item[0][0]), LETTERS.index(item[0][1]))):
        runs = {run: age(row) for line in group.values() for run, row in line.items()}
        counts = {run: sum("median_ms" in line.get(run, {}) for line in group.values()) for run in runs}
        best = max(runs, key=lambda run: (counts[run], runs[run]))
        kept = [(cell, line[best]) for cell, line in group.items() if best in line]
        sweep = Sweep(kept[0][0], letter)
        for cell, row in kept:
            at = dict(cell.sizes).get(letter, USUAL.get(letter))
            if at is not None:
                sweep.lines.setdefault(label(cell, [other for other, _ in kept]), {})[at] = row
        found.append(sweep)
    return found


def label(cell: Cell, others: list[Cell]) -> str:
    """The implementation, and whatever else the lines of this sweep differ in."""
    parts = [cell.impl]
    parts += [getattr(cell, name) for name in ("mode", "dtype") if len({getattr(other, name) for other in others}) > 1]
    return ", ".join(part for part in parts if part)


def slope(points: list[tuple[int, float]]) -> float | None:
    """Least squares of log y on log x; None for fewer than two points. 1 is linear, 2 quadratic."""
    if len(points) < 2:
        return None
    x, y = ([math.log(value) for value in values] for values in zip(*points))
    mean = sum(x) / len(x)
    return sum((a - mean) * b for a, b in zip(x, y)) / sum((a - mean) ** 2 for a in x)
