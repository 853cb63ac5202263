"""Markdown tables of results. Every function takes the cells of all files and gives the text of one marked block.

A cell shows the newest run that has it; a ratio is made within one run, the newest that has both of its sides. Nothing measured: empty.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable

import compare
import results
import sweeps
from cells import LETTERS, USUAL, Cell, Runs, newest, threads_text, together

Cells = dict[Cell, Runs]
Keep = Callable[[Cell], bool]
IMPLS = ("dense", "dense + compile", "torch", "torch + compile")
FAST = ("torch", "triton")  # ours
NOTHING = "No results file has any of it yet."
VERSIONS = {"driver": "driver", "torch": "torch", "triton": "Triton", "numpy": "numpy", "python": "Python"}


def milliseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:#.3g}".rstrip(".")


def size(value: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:#.3g}".rstrip(".") + f" {unit}"
    return f"{value:.0f} B"


def times(value: float) -> str:
    return f"{value:.1f}×" if value < 10 else f"{value:.0f}×"


def sizes(cell: Cell) -> str:
    return ", ".join(f"{letter} {value}" for letter, value in cell.sizes)


def figure(name: str, row: results.Row) -> str:
    if name == "peak_bytes":
        return size(row[name])
    floor = row.get("times_floor") or (
        row["floor_ms"] and row["median_ms"] / row["floor_ms"] if "floor_ms" in row else None
    )
    return milliseconds(row["median_ms"]) + (f" ({times(floor)})" if floor else "")


def matches(cell: Cell, **wanted: object) -> bool:
    """Names of the cell's own fields, or letters of sizes; a tuple allows any of its values."""
    have = {**USUAL, **dict(cell.sizes), **cell._asdict()}
    return all(have.get(name) in (value if isinstance(value, tuple) else (value,)) for name, value in wanted.items())


def ratio(one: Runs | None, other: Runs | None, name: str = "median_ms") -> float | None:
    pair = together(one or {}, other or {}, name)
    return pair and pair[0][name] / pair[1][name]


class Notes:
    """Footnotes of one table: letters for runs (cells are marked only where there are several), numbers for reasons."""

    def __init__(self, rows: Iterable[results.Row]) -> None:
        self.runs: dict[str, list[results.Row]] = {}
        for row in sorted(rows, key=lambda row: row.get("date", ""), reverse=True):
            self.runs.setdefault(str(row.get("run")), []).append(row)
        self.reasons: list[str] = []

    def mark(self, row: results.Row) -> str:
        at = list(self.runs).index(str(row.get("run")))
        return f" <sup>{chr(ord('a') + at % 26) * (1 + at // 26)}</sup>" if len(self.runs) > 1 else ""

    def reason(self, text: str) -> str:
        text = short(text)
        if text not in self.reasons:
            self.reasons.append(text)
        return f"– <sup>{self.reasons.index(text) + 1}</sup>"

    def text(self) -> str:
        lines = [f"{self.mark(rows[0]).strip()} {run_text(rows)}".strip() for rows in self.runs.values()]
        lines += [f"<sup>{number}</sup> {escaped(reason)}" for number, reason in enumerate(self.reasons, 1)]
        return "<br>\n".join(lines)


def short(reason: str) -> str:
    """Bytes written out to the last digit as GB or MB."""
    return re.sub(
        r"\b\d{1,3}(?:,\d{3}){2,}\b(?: bytes)?",
        lambda found: size(float(found[0].removesuffix(" bytes").replace(",", ""))),
        reason,
    )


def escaped(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def run_text(rows: list[results.Row]) -> str:
    """One run: when, which code, where, with what, and how many calls."""
    row = rows[0]
    dirty = {True: " with uncommitted changes", False: "", None: " (uncommitted changes, if any, not recorded)"}[
        row.get("dirty")
    ]
    date = f"{row.get('date', '')[:16].replace('T', ' ')} UTC"
    who = threads_text(row.get("machine"), row.get("threads"))
    calls = [row["n"] for row in rows if "n" in row]
    versions = [f"{name} {row[key]}" for key, name in VERSIONS.items() if row.get(key)]
    n = [f"n = {min(calls)} to {max(calls)}" if min(calls) < max(calls) else f"n = {calls[0]}"] if calls else []
    return escaped(", ".join([date, f"commit {str(row.get('commit'))[:7]}{dirty}", who, *versions, *n]))


def table(head: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def places(cells: Cells, keep: Keep) -> dict[tuple, Cells]:
    """Cells by machine."""
    found: dict[tuple, Cells] = {}
    for cell, runs in cells.items():
        if keep(cell):
            found.setdefault(cell[:3], {})[cell] = runs
    return dict(sorted(found.items(), key=lambda item: str(item[0])))


def heading(place: tuple) -> str:
    return f"**{threads_text(*place[1:])}**"


def shown(runs: Runs, name: str) -> results.Row | None:
    return newest(runs, name) or newest(runs, "skipped")


def by_implementation(cells: Cells, keep: Keep, name: str = "median_ms", *, cases: bool = False) -> str:
    """A table a machine: a row a shape, sizes, dtype and mode; a column an implementation; the ratio of one run last.

    With `cases` a column names the case, and a row needs a number.
    """
    parts = []
    for place, group in places(cells, keep).items():
        chosen = {cell: row for cell, runs in group.items() if (row := shown(runs, name))}
        if cases:
            numbered = {cell._replace(impl="") for cell, row in chosen.items() if name in row}
            chosen = {cell: row for cell, row in chosen.items() if cell._replace(impl="") in numbered}
        if not chosen:
            continue
        notes = Notes(row for row in chosen.values() if name in row)
        columns = list(IMPLS) + ["triton"] * (place[0] == "cuda")
        columns += sorted({cell.impl for cell in chosen} - set(columns))
        body = []
        for key in dict.fromkeys(cell._replace(impl="") for cell in chosen):
            entries = []
            for impl in columns:
                row = chosen.get(key._replace(impl=impl))
                entries.append(
                    ""
                    if row is None
                    else figure(name, row) + notes.mark(row)
                    if name in row
                    else notes.reason(row["skipped"])
                )
            body.append(
                [
                    *[key.case] * cases,
                    key.shape,
                    sizes(key),
                    " ".join(filter(None, (key.dtype, key.mode))),
                    *entries,
                    gain(group, key, name),
                ]
            )
        head = [*["case"] * cases, "shape", "sizes", "dtype, mode", *columns, "dense over ours"]
        parts.append(f"{heading(place)}\n\n{table(head, body)}\n\n{notes.text()}")
    return "\n\n".join(parts) or NOTHING


def gain(cells: Cells, key: Cell, name: str = "median_ms") -> str:
    """Dense over the better of ours, in one run; which one is said."""
    found = [
        (ratio(cells.get(key._replace(impl="dense")), cells.get(key._replace(impl=impl)), name), impl) for impl in FAST
    ]
    found = [(value, impl) for value, impl in found if value]
    return f"{times(max(found)[0])} ({max(found)[1]})" if found else ""


def objective(cells: Cells) -> str:
    return by_implementation(cells, lambda cell: cell.case == "objective" and not cell.mode.startswith("kernel "))


def head_step(cells: Cells) -> str:
    return by_implementation(cells, lambda cell: cell.case == "head step")


def assign(cells: Cells) -> str:
    return by_implementation(cells, lambda cell: cell.case.startswith("assign"))


def pairs(cells: Cells) -> str:
    return by_implementation(cells, lambda cell: cell.case == "pairs")


def memory(cells: Cells) -> str:
    return by_implementation(
        cells, lambda cell: not cell.case.startswith(("scaling", "ceiling")), "peak_bytes", cases=True
    )


ALONE = "backbone alone"


def extract(cells: Cells) -> str:
    """From files to a store, and its parts alone; what a row has beyond the backbone is of one run."""

    def beyond(cell: Cell, row: results.Row) -> str:
        found = ratio(cells[cell], cells.get(cell._replace(impl=ALONE))) if cell.impl == "extraction" else None
        return "" if found is None else f"{100 * (found - 1):.1f} %" if found < 2 else times(found)

    columns = {
        "backbone": lambda cell, row: " ".join((cell.shape, cell.dtype)),
        "what": lambda cell, row: cell.impl,
        "images": lambda cell, row: "{images} of {width}x{height}, squares of {pixels}".format(**row["sizes"]),
        "ms an image": lambda cell, row: milliseconds(row["median_ms"] / row["sizes"]["images"]),
        "images/s": lambda cell, row: (
            f"{row['images_per_s']:.0f}" if row["images_per_s"] >= 100 else f"{row['images_per_s']:#.3g}"
        ),
        "beyond the backbone": beyond,
    }
    return listing(cells, lambda cell: cell.case == "extract", columns, "images_per_s")


KNOWN = ("extract", "objective", "head step", "assign", "pairs", "memory", "ceiling", "scaling")


def rest(cells: Cells) -> str:
    """What no other block shows, by case."""
    cases = sorted({cell.case for cell in cells if not cell.case.startswith(KNOWN)})
    return (
        "\n\n".join(
            f"{case}:\n\n{by_implementation(cells, lambda cell, case=case: cell.case == case)}" for case in cases
        )
        or NOTHING
    )


def listing(cells: Cells, keep: Keep, columns: dict[str, Callable[[Cell, results.Row], str]], *names: str) -> str:
    """A table a machine with a row for each cell that has all figures of `names`."""
    parts = []
    for place, group in places(cells, keep).items():
        chosen = {cell: row for cell, runs in group.items() if (row := newest(runs, *names))}
        if chosen:
            notes = Notes(chosen.values())
            body = [[*(column(cell, row) for column in columns.values())] for cell, row in chosen.items()]
            for line, row in zip(body, chosen.values()):
                line[-1] += notes.mark(row)
            parts.append(f"{heading(place)}\n\n{table(columns, body)}\n\n{notes.text()}")
    return "\n\n".join(parts) or NOTHING


WHAT = {
    "case": lambda cell, row: cell.case,
    "shape": lambda cell, row: cell.shape,
    "sizes": lambda cell, row: sizes(cell),
    "implementation": lambda cell, row: cell.impl,
    "dtype, mode": lambda cell, row: " ".join(filter(None, (cell.dtype, cell.mode))),
}


def spread(cells: Cells) -> str:
    """Median, p20, p80 and n of everything timed."""
    columns = {
        **WHAT,
        "median ms": lambda cell, row: milliseconds(row["median_ms"]),
        "p20 to p80 ms": lambda cell, row: f"{milliseconds(row['p20_ms'])} to {milliseconds(row['p80_ms'])}",
        "half of it over the median": lambda cell, row: (
            f"{50 * (row['p80_ms'] - row['p20_ms']) / row['median_ms']:.1f} %"
        ),
        "n": lambda cell, row: str(row.get("n", "")),
    }
    listed = listing(cells, lambda cell: True, columns, "median_ms", "p20_ms", "p80_ms")
    return listed if listed == NOTHING else f"<details><summary>Every cell</summary>\n\n{listed}\n\n</details>"


def ceilings(cells: Cells) -> str:
    columns = {
        "ceiling": lambda cell, row: " ".join(filter(None, (cell.impl, cell.dtype, cell.shape))),
        "reached": lambda cell, row: rate(row),
    }
    return listing(cells, lambda cell: cell.case == "ceiling", columns)


def rate(row: results.Row) -> str:
    if "bytes_per_s" in row:
        return (
            f"{row['bytes_per_s'] / 1e9:#.3g}".rstrip(".") + " GB/s"
            if row["bytes_per_s"] < 1e12
            else f"{row['bytes_per_s'] / 1e12:.2f} TB/s"
        )
    flops = row.get("flops_per_s", 0)
    return f"{flops / 1e9:.0f} GFLOP/s" if flops < 1e12 else f"{flops / 1e12:.0f} TFLOP/s"


def floors(cells: Cells) -> str:
    """Counted bytes and operations; equal for all implementations, so one row a problem."""
    columns = {name: column for name, column in WHAT.items() if name != "implementation"} | {
        "bytes": lambda cell, row: size(row["floor_bytes"]),
        "operations": lambda cell, row: (
            f"{row['floor_flops'] / 1e9:#.3g} GFLOP".replace(". ", " ") if "floor_flops" in row else ""
        ),
        "floor ms": lambda cell, row: milliseconds(row["floor_ms"]),
    }
    problems: Cells = {}
    for cell, runs in cells.items():
        if newest(runs, "floor_bytes", "floor_ms") and not cell.case.startswith("scaling"):
            problem = cell._replace(impl="")
            problems[problem] = dict(
                sorted({**problems.get(problem, {}), **runs}.items(), key=lambda item: item[1].get("date", ""))
            )
    return listing(problems, lambda cell: True, columns, "floor_bytes", "floor_ms")


def kernels(cells: Cells) -> str:
    columns = {
        "kernel": lambda cell, row: cell.mode.removeprefix("kernel ").removesuffix("_kernel"),
        "shape": lambda cell, row: cell.shape,
        "mean µs": lambda cell, row: f"{row['mean_us']:.1f}",
    }
    return listing(cells, lambda cell: cell.mode.startswith("kernel "), columns, "mean_us")


def scaling(cells: Cells) -> str:
    """Slopes by least squares in log-log; a slope is of one run."""
    parts = []
    found = sweeps.sweeps(cells)
    for place in dict.fromkeys(sweep.cell[:3] for sweep in found):
        here = [sweep for sweep in found if sweep.cell[:3] == place]
        body = [line for sweep in here for name in sweep.lines for line in slopes(sweep, name)]
        notes = Notes(row for sweep in here for row in sweep.rows() if "skipped" not in row)
        for sweep in here:
            marks = {notes.mark(row) for row in sweep.rows() if "skipped" not in row}
            for line in body:
                if line[0] == sweep.letter:
                    line[1] += "".join(marks)
        head = ["against", "implementation", "range", "points", "slope of time", "slope of memory", "stops before"]
        parts.append(f"{heading(place)}\n\n{table(head, body)}\n\n{notes.text()}")
    return "\n\n".join(parts) or NOTHING


def slopes(sweep: sweeps.Sweep, name: str) -> list[list[str]]:
    """Rows for everything measured, and for the range that a goal is stated over where it is another one."""
    points, peaks, stop = sweep.points(name, "median_ms"), sweep.points(name, "peak_bytes"), sweep.stopped(name)
    values = [at for at, _ in points]
    ranges = [(min(values), max(values))] if values else []
    stated = sweeps.STATED.get(sweep.letter)
    if stated and values and stated != ranges[0] and min(values) <= stated[0] and max(values) >= stated[1]:
        ranges.append(stated)
    lines = []
    for low, high in ranges:
        inside, heavy = ([point for point in all_points if low <= point[0] <= high] for all_points in (points, peaks))
        found = [sweeps.slope(inside), sweeps.slope(heavy)]
        fits = ["" if value is None else f"{value:.2f}" for value in found]
        lines.append(
            [
                sweep.letter,
                name,
                f"{low} to {high}",
                str(len(inside)),
                *fits,
                f"{stop[0]}: {escaped(short(stop[1]))}" if stop else "",
            ]
        )
    return lines or [[sweep.letter, name, "", "0", "", "", f"{stop[0]}: {escaped(short(stop[1]))}" if stop else ""]]


def skipped(cells: Cells) -> str:
    """Every cell that has a reason and no number."""
    rows = []
    for cell, runs in cells.items():
        last = newest(runs, "skipped")
        if last and not any(newest(runs, name) for name in ("median_ms", "peak_bytes", "mean_us")):
            rows.append([threads_text(cell.machine, cell.threads), compare.name(cell), escaped(short(last["skipped"]))])
    return (
        table(["machine", "cell", "why"], sorted(rows)) if rows else "No results file says that anything was left out."
    )


def repeats(cells: Cells) -> str:
    """Two newest runs of one commit, cell by cell, by the rule of compare.py."""
    body = []
    for place, group in places(cells, lambda cell: cell.case != "ceiling").items():
        a, b = {}, {}
        for cell, runs in group.items():
            timed = [
                row
                for row in runs.values()
                if "median_ms" in row and row.get("commit") == list(runs.values())[-1].get("commit")
            ]
            if len(timed) > 1:
                a[cell], b[cell] = (next(iter(compare.sides([row]).values())) for row in timed[-2:])
        if changes := compare.compare(a, b):
            apart = [abs(change.ratio - 1) for change in changes]
            beyond = sum(change.beyond != 0 for change in changes)
            body.append(
                [
                    threads_text(*place[1:]),
                    str(len(apart)),
                    f"{100 * statistics.median(apart):.1f} %",
                    f"{100 * max(apart):.1f} %",
                    str(beyond),
                ]
            )
    head = ["machine", "cells measured twice", "apart, median", "apart, largest", "beyond the noise"]
    return table(head, body) if body else "No machine has two runs of one commit yet."


def letters() -> str:
    return ", ".join(f"{letter} = {USUAL[letter]}" for letter in LETTERS if letter in USUAL)
