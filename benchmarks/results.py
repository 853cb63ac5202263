"""Measurements on disk: one JSON object a line, appended, never rewritten.

`machine.describe` says who measured; the rest of a line is:

    case        what was measured: "objective", "head step", "assign", "extract", "pairs", "scaling P", "ceiling"
    shape       name of the sizes ("P784", "H16" in a scaling)
    sizes       {"B": 8, "P": 784, "D": 384, "Z": 64, "K": 27, "T": 2, "H": 1}; "pixels" is the side of labels, or
                of an extraction's squares, which also has its images, their height and width; "patches" take part
    impl        "dense", "torch", "triton"; with " + compile" through torch.compile; "extraction", "backbone alone"
    mode        "forward", "forward + backward", "step", "kernel NAME"; from a CUDA graph: "graph" (forward + backward),
                "captured step" on the wall's clock, "captured step, GPU" without what the host does
    dtype       "float32", "bfloat16", "float16"
    n, median_ms, p20_ms, p80_ms          time of one call; n samples were taken, each of `calls` calls at once
    mean_us, median_us, launches          time of one kernel in one call, all its launches together, from a profiler
    floor_bytes, floor_flops, floor_ms    counted bytes and operations; the slower of the two at this run's ceilings
    times_floor                           median_ms / floor_ms
    images_per_s                          from the median
    peak_bytes                            highest memory use beyond the inputs
    counted_bytes                         tensors alive at one time, counted from shapes
    bytes_per_s, flops_per_s              of a ceiling
    skipped                               why there is no number, e.g. matrices larger than the memory
    passed                                of a gate, which compares values and has no time
    error                                 what kept a part of gpu.py from this number

A line without a number says why in `skipped` or `error`; a cell that nobody measured has no line. Older lines also have
"memory objective" (its peak alone), "products alone" (the matrix products of a head step), "dense, own process" (a
process that returns freed memory to the system, as PyTorch does by default) and "decoding, 2 threads".
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "results"
USUAL = {"Z": 64, "T": 2, "H": 1}  # not shown; older lines leave them out
Row = dict[str, Any]
FIGURES = (
    "median_ms",
    "p20_ms",
    "p80_ms",
    "n",
    "mean_us",
    "times_floor",
    "peak_bytes",
    "bytes_per_s",
    "flops_per_s",
    "passed",
)


def append(path: Path, row: Row) -> None:
    """Writes at once and to the disk, so that a run that is cut off keeps every line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, default=str) + "\n")
        file.flush()
        os.fsync(file.fileno())


def write(path: Path, text: str) -> None:
    """Replaces a file as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def read(paths: Iterable[Path]) -> list[Row]:
    """All rows in order. ValueError names the file and the line that is not one JSON object with a case."""
    rows = []
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                rows.append({**row, "case": row["case"]})
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}:{number}: not a line of results ({error}); remove it") from error
    return rows


def age(row: Row) -> tuple[bool, str]:
    """A key that sorts the oldest first; a run with uncommitted changes counts as older than any without."""
    return row.get("dirty") is not True, row.get("date") or ""


def sizes_text(row: Row) -> str:
    """ "B 8, P 784, D 384, K 27": sizes at their usual value are left out."""
    sizes = {name: value for name, value in (row.get("sizes") or {}).items() if USUAL.get(name) != value}
    ordered = sorted(sizes.items(), key=lambda item: f"BPDKZTH{item[0]}".index(item[0]))
    return ", ".join(f"{name} {value}" for name, value in ordered)


def summary(rows: list[Row]) -> Iterator[str]:
    """One line a measurement, printed at the end of a run: a reason, or its figures by name."""
    for row in rows:
        figures = [f"{name} {row[name]:.4g}" for name in FIGURES if name in row]
        name = f"{row['case']:16s} {row.get('shape', ''):24s} {row['impl']:16s} {row['mode'][:18]:18s}"
        yield f"{name} {row.get('skipped') or row.get('error') or ', '.join(figures)}"
