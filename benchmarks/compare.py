"""Compare two results files: the cells that got faster or slower beyond noise.

    python -m pytest --benchmark-only --bench-results A.jsonl   # in a checkout of one commit; B.jsonl in the other's
    python benchmarks/compare.py A.jsonl B.jsonl                # best measured in turn: A, B, A, B

Of each cell the runs of the newest commit in a file count. d is the logarithm of the ratio of medians, B over A, each
the median over its runs. It is beyond noise when |d| exceeds all of
    log(1 + threshold)                                changes too small to matter
    2 hypot(h_A / sqrt(runs_A), h_B / sqrt(runs_B))   h: half of p20 to p80 over the median: spread of calls
    4 s sqrt(1/runs_A + 1/runs_B)                     s: spread of a run's median from run to run: the cell's own, drawn
                                                      to the typical cell's with the weight of 6 runs; 2.5 % where runs
                                                      are single
tests/test_compare.py holds the rates of false alarms and of slowdowns found: two rounds raise an alarm in 3 of 100
comparisons and find 20 % in 87 of 100 cells on a shared machine; one round tells less.

A ceiling (a copy, a matrix product of PyTorch) is none of our code: where one moves beyond noise, the machine moved.
Exit status: 0 nothing slower, 1 something slower, 2 no comparison (one line says why).
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

import results

CALLS_FACTOR, RUNS_FACTOR, ASSUMED_RUN_SPREAD, TYPICAL_WEIGHT, BLIND = 2.0, 4.0, 0.025, 6, 0.20
Cell = tuple[str, ...]  # device, case, shape, sizes, impl, mode, dtype


class Side(NamedTuple):
    """One cell in one file: a median in milliseconds and a relative half-width for each run."""

    medians: list[float]
    half_widths: list[float]


class Change(NamedTuple):
    cell: Cell
    medians: tuple[float, float]
    noise: float  # the largest ratio of medians, or inverse of one, that noise explains
    runs: str

    @property
    def ratio(self) -> float:
        return self.medians[1] / self.medians[0]

    @property
    def beyond(self) -> int:
        """1 slower, -1 faster, 0 within noise."""
        return (self.ratio > self.noise) - (self.ratio < 1 / self.noise)

    def __str__(self) -> str:
        verdict = {1: "slower", -1: "faster", 0: ""}[self.beyond]
        times = f"{verdict:6s} {self.medians[0]:9.4g} -> {self.medians[1]:9.4g} ms  x {self.ratio:.3f}"
        noise = f"(noise {100 * (self.noise - 1):.1f} %, {self.runs} runs)"
        return f"{times}  {noise}  {' '.join(filter(None, self.cell))}"


def sides(rows: Iterable[results.Row]) -> dict[Cell, Side]:
    """Pick for every timed cell the runs of the newest commit that measured it; uncommitted changes count as older."""
    cells: dict[Cell, dict[str, results.Row]] = {}
    for row in sorted(rows, key=results.age):
        if (row.get("median_ms") or 0) > 0:
            names = (row.get(name) or "" for name in ("impl", "mode", "dtype"))
            cell = (row.get("device") or "cpu", row["case"], row.get("shape") or "", results.sizes_text(row), *names)
            cells.setdefault(cell, {})[str(row.get("run"))] = row
    sides = {}
    for cell, runs in cells.items():
        newest = [row for row in runs.values() if row.get("commit") == list(runs.values())[-1].get("commit")]
        widths = [(row["p80_ms"] - row["p20_ms"]) / (2 * row["median_ms"]) for row in newest]
        sides[cell] = Side([row["median_ms"] for row in newest], widths)
    return sides


def run_spreads(a: dict[Cell, Side], b: dict[Cell, Side]) -> dict[Cell, float]:
    """Standard deviation of one run's log median in each cell of both sides, estimated from runs of the same code."""
    own, freedom = {}, {}
    for cell in (cell for cell in a if cell in b):
        logs = [[math.log(median) for median in side[cell].medians] for side in (a, b)]
        freedom[cell] = sum(len(values) - 1 for values in logs)
        squares = sum((value - statistics.fmean(values)) ** 2 for values in logs for value in values)
        own[cell] = squares / max(freedom[cell], 1)
    # nearly the median of a chi-square over its mean: the typical cell, blind to a few wild ones
    unbiased = [own[cell] / (1 - 2 / (9 * n)) ** 3 for cell, n in freedom.items() if n]
    prior = TYPICAL_WEIGHT * (statistics.median(unbiased) if unbiased else ASSUMED_RUN_SPREAD**2)
    return {cell: math.sqrt((prior + n * own[cell]) / (TYPICAL_WEIGHT + n)) for cell, n in freedom.items()}


def compare(a: dict[Cell, Side], b: dict[Cell, Side], threshold: float = 0.05) -> list[Change]:
    """The rule above for every cell that both sides have, the slowest change first."""
    changes = []
    for cell, spread in run_spreads(a, b).items():
        pair = a[cell], b[cell]
        weights = [1 / math.sqrt(len(side.medians)) for side in pair]
        widths = [statistics.median(side.half_widths) * weight for side, weight in zip(pair, weights)]
        calls, runs = CALLS_FACTOR * math.hypot(*widths), RUNS_FACTOR * spread * math.hypot(*weights)
        medians = tuple(statistics.median(side.medians) for side in pair)
        counts = "+".join(str(len(side.medians)) for side in pair)
        changes.append(Change(cell, medians, math.exp(max(math.log1p(threshold), calls, runs)), counts))
    return sorted(changes, key=lambda change: -change.ratio)


def report(changes: list[Change], everything: bool) -> tuple[list[str], int]:
    """Lines to print, and the exit status."""
    ours = [change for change in changes if change.cell[1] != "ceiling"]
    slower, faster, same = (sum(change.beyond == verdict for change in ours) for verdict in (1, -1, 0))
    lines = [str(change) for change in ours if everything or change.beyond]
    lines.append(f"{slower} slower, {faster} faster, {same} within noise")
    moved = [change for change in changes if change.cell[1] == "ceiling" and change.beyond]
    lines += [f"the machine itself moved, measure again: {change}" for change in moved]
    if blind := sum(change.noise > 1 + BLIND for change in ours):
        lines.append(f"too noisy to see {100 * BLIND:.0f} %: {blind} cells; more runs or a quieter machine would tell")
    return lines, int(slower > 0)


def differences(a: list[results.Row], b: list[results.Row], *names: str) -> list[str]:
    """Names whose values differ between the files, of those that both have."""
    values = [[sorted({str(row[name]) for row in rows if row.get(name)}) for name in names] for rows in (a, b)]
    return [f"{name}: {one} against {two}" for name, one, two in zip(names, *values) if one and two and one != two]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", metavar="A.jsonl", type=Path)
    parser.add_argument("b", metavar="B.jsonl", type=Path)
    parser.add_argument("--threshold", type=float, default=0.05, help="smallest relative change to report (0.05)")
    parser.add_argument("--across-machines", action="store_true")
    parser.add_argument("--all", action="store_true", help="print the cells within noise too")
    args = parser.parse_args(arguments)
    try:
        a, b = (results.read([path]) for path in (args.a, args.b))
        for device, names in {"cpu": ("machine", "threads"), "cuda": ("machine",)}.items():
            apart = differences(*([row for row in rows if row.get("device") == device] for rows in (a, b)), *names)
            if apart and not args.across_machines:
                raise ValueError(f"{device} {apart[0]}; --across-machines compares them anyway")
        changes = compare(sides(a), sides(b), args.threshold)
        if not changes:
            raise ValueError("no cell was measured on both sides; compare the same cases, shapes and dtypes")
    except (OSError, ValueError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    lines, status = report(changes, args.all)
    print("\n".join(lines + differences(a, b, "torch", "triton", "python", "driver")))
    return status


if __name__ == "__main__":
    sys.exit(main())
