"""What a run prints at its end: one line a measurement, and how time and memory grow with each size."""

from __future__ import annotations

import math
from collections.abc import Iterator

from results import Row
from sweeps import STATED, slope


def table(rows: list[Row]) -> Iterator[str]:
    yield (
        f"{'case':16s} {'shape':24s} {'implementation':16s} {'mode':18s} "
        f"{'median ms':>10s} {'p20':>9s} {'p80':>9s} {'n':>4s} {'x floor':>8s} {'peak MB':>8s}"
    )
    for row in rows:
        name = f"{row['case']:16s} {row.get('shape', ''):24s} {row['impl']:16s} {row['mode'][:18]:18s}"
        if "skipped" in row:
            yield f"{name} {row['skipped']}"
            continue
        times = "".join(f"{row[key]:10.3f}" if key in row else " " * 10 for key in ("median_ms", "p20_ms", "p80_ms"))
        rate = row.get("bytes_per_s") or row.get("flops_per_s")
        ratio = f"{row['times_floor']:8.2f}" if "times_floor" in row else f"{rate / 1e9:6.1f} G" if rate else " " * 8
        peak = f"{row['peak_bytes'] / 1e6:8.1f}" if "peak_bytes" in row else ""
        yield f"{name} {times} {row.get('n', ''):>4} {ratio} {peak}".rstrip()


def slopes(rows: list[Row]) -> Iterator[str]:
    """Exponents of a power law: least squares on logarithms, over every size that was measured and over the range named above."""
    series: dict[tuple, list[tuple[int, float]]] = {}
    for row in rows:
        letter = row["case"].removeprefix("scaling ")
        for quantity in ("median_ms", "peak_bytes"):
            if letter != row["case"] and quantity in row:
                series.setdefault((letter, row["impl"], row["mode"], quantity), []).append(
                    (row["sizes"][letter], row[quantity])
                )
    for (letter, impl, mode, quantity), points in series.items():
        low, high = STATED.get(letter, (0, math.inf))
        parts = [points, [point for point in points if low <= point[0] <= high]]
        fits = [
            f"{slope(part):.2f} from {part[0][0]} to {part[-1][0]}"
            for part in dict.fromkeys(map(tuple, parts))
            if len(part) > 1
        ]
        if fits:
            what = "time" if quantity == "median_ms" else "peak memory"
            yield f"{impl}, {mode}: {what} grows with {letter} to the power {', '.join(fits)}"
