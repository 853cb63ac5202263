"""Measurements on disk: one JSON object a line, appended, never rewritten. `machine.describe` says who; the rest of a line is:

    case        what was measured: "objective", "head step", "assign", "extract", "pairs", "memory objective", "scaling P", "ceiling"
    shape       name of the sizes ("P784", "H16" in a scaling)
    sizes       {"B": 8, "P": 784, "D": 384, "Z": 64, "K": 27, "T": 2, "H": 1}, and the "pixels" of a side where labels are made;
                of an extraction the images, their height and width, and the pixels of their squares
    impl        "dense", "torch", "triton", "keops"; with " + compile" where it went through torch.compile; "products alone": the matrix
                products of a head step and nothing else; of an extraction "extraction", "backbone alone", "decoding, 2 threads"; "dense, own
                process": in a process that gives freed memory back, as PyTorch comes, where all others keep it
    mode        "forward", "forward + backward", "step", "kernel NAME"; from a CUDA graph: "graph" (forward + backward), "captured step"
    dtype       "float32", "bfloat16", "float16"
    n, median_ms, p20_ms, p80_ms              of one call; n calls were timed (each of them `calls` at once)
    mean_us                                   of one kernel in one call, from a profiler
    floor_bytes, floor_flops, floor_ms        what must move and be computed, counted; the time of the slower at the run's own ceilings
    times_floor                               median_ms / floor_ms
    images_per_s                              by the median
    peak_bytes                                memory beyond inputs at its highest, measured in a process of its own
    counted_bytes                             of tensors alive at one time, from shapes: beside peak_bytes, or where nothing could run
    bytes_per_s, flops_per_s                  of a ceiling
    skipped                                   why there is no number: a size that the memory or the default run's time does not hold

A cell that nobody measured has no line; a line without a number says why in `skipped`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "results"

Row = dict[str, Any]


def append(path: Path, row: Row) -> None:
    """A run that is cut off keeps every line it wrote."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read(paths: Iterable[Path]) -> list[Row]:
    """The rows of all files in order. ValueError names the file and line that is not one JSON object."""
    rows = []
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not a line of results ({error}); remove it") from error
            if not isinstance(row, dict) or "case" not in row:
                raise ValueError(f"{path}:{number}: not a line of results (no case); remove it")
            rows.append(_renamed(row))
    return rows


def _renamed(row: Row) -> Row:
    """Lines of the first GPU run as they would be written today."""
    if "gpu" not in row:
        return row
    row = {"machine": row.pop("gpu"), "device": "cuda", "run": row["date"], "dirty": None, **row}
    row["dtype"] = row.get("dtype", "").removeprefix("torch.") or None
    name, _, heads = row["case"].partition(" H=")
    if heads:
        row |= {
            "case": name,
            "shape": "cityscapes_s8" if heads == "1" else f"heads{heads}",
            "sizes": {**row.get("sizes", {}), "H": int(heads)},
        }
    elif name.startswith("assign "):
        sizes = {"B": 32, "P": 784, "D": 384, "K": 27, "pixels": int(name.rpartition("x")[2])}
        row |= {"case": "assign", "shape": "cityscapes_s8", "sizes": sizes, "dtype": "bfloat16"}
    row["impl"] = row["impl"].replace(" compiled", " + compile")
    if row["mode"] == "eager" and row["case"] != "ceiling":
        row["mode"] = "forward + backward" if row["case"] == "objective" else "forward"
    return row
