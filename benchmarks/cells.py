"""Which lines of results speak of one measurement: a cell has one line for each run that made it.

Sizes are compared without the letters that stand at their usual value, so that lines from before a letter was written still match.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from results import Row

USUAL = {"Z": 64, "T": 2, "H": 1}  # unless a line says otherwise
LETTERS = "BPDKZTH"


class Cell(NamedTuple):
    """What was measured (case to dtype) and where (device to threads)."""

    device: str
    machine: str | None
    threads: int | None
    case: str
    shape: str
    sizes: tuple[tuple[str, int], ...]
    impl: str
    mode: str
    dtype: str


Runs = dict[str, Row]  # the lines of one cell by run, oldest first


def identity(row: Row) -> Cell:
    sizes = {name: value for name, value in (row.get("sizes") or {}).items() if USUAL.get(name) != value}
    order = {letter: at for at, letter in enumerate(LETTERS)}
    device = row.get("device") or "cpu"
    return Cell(
        device,
        row.get("machine"),
        row.get("threads") if device == "cpu" else None,  # those of a card's host do not count
        row["case"],
        row.get("shape") or "",
        tuple(sorted(sizes.items(), key=lambda item: (order.get(item[0], len(order)), item[0]))),
        row.get("impl") or "",
        row.get("mode") or "",
        row.get("dtype") or "",
    )


def age(row: Row) -> tuple[bool, str]:
    """To sort by, oldest first: a run with uncommitted changes counts as older than any without."""
    return row.get("dirty") is not True, row.get("date") or ""


def collect(rows: Iterable[Row]) -> dict[Cell, Runs]:
    """Lines of one cell and run are one measurement: a later one adds what the earlier has not, and wins where both have it."""
    cells: dict[Cell, Runs] = {}
    for row in sorted(rows, key=age):
        runs = cells.setdefault(identity(row), {})
        run = str(row.get("run") or row.get("date"))
        runs[run] = {**runs.get(run, {}), **{name: value for name, value in row.items() if value is not None}}
    return cells


def newest(runs: Runs, *figures: str) -> Row | None:
    """The line of the newest run that has all of `figures`."""
    return next((row for row in reversed(runs.values()) if all(name in row for name in figures)), None)


def together(one: Runs, other: Runs, figure: str) -> tuple[Row, Row] | None:
    """Both cells' lines of the newest run that has `figure` of both: the only two that a ratio may be made of."""
    for run in reversed(one):
        if run in other and figure in one[run] and figure in other[run]:
            return one[run], other[run]
    return None


def threads_text(machine: str | None, threads: int | None) -> str:
    return (machine or "unknown machine") + (
        "" if threads is None else f", {threads} thread{'s' if threads > 1 else ''}"
    )
