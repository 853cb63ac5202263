"""The README's handful of rows, and what the design asks for beside what was measured."""

from __future__ import annotations

from collections.abc import Callable

import sweeps
import tables
from cells import newest, threads_text
from tables import Cells

USUAL = dict(D=384, K=27)
CPU = dict(device="cpu", dtype="float32", mode=("forward + backward", "step"), **USUAL)
GPU = dict(device="cuda", dtype="bfloat16", mode="graph", B=32, P=784, **USUAL)
ROWS = {
    "objective, CPU, fp32, B = 8, P = 784": dict(CPU, case="objective", B=8, P=784, H=1),
    "objective, CPU, fp32, B = 4, P = 1600": dict(CPU, case="objective", B=4, P=1600, H=1),
    "training step, CPU, fp32, B = 16, P = 784": dict(CPU, case="head step", B=16, P=784, H=1),
    "objective, GPU, bf16, graph replay, B = 32, P = 784": dict(GPU, case="objective", H=1),
    "the same with 16 heads at once": dict(GPU, case="objective", H=16),
    "training step, GPU, bf16, B = 32, P = 784": dict(GPU, case="head step", mode=("captured step", "step"), H=1),
}
COLUMNS = (*tables.IMPLS, "triton")


def chosen(cells: Cells, wanted: dict) -> Cells:
    """Cells of one row, by their key without the implementation; of several machines or shapes the one measured last."""
    found = {cell: runs for cell, runs in cells.items() if tables.matches(cell, **wanted)}
    if not found:
        return {}
    last = max(found, key=lambda cell: max(row.get("date", "") for row in found[cell].values()))._replace(impl="")
    return {cell: runs for cell, runs in found.items() if cell._replace(impl="") == last}


def measured(cells: Cells) -> str:
    """The README's table."""
    rows = {label: chosen(cells, wanted) for label, wanted in ROWS.items()}
    best = {
        (label, cell.impl): row
        for label, group in rows.items()
        for cell, runs in group.items()
        if (row := tables.shown(runs, "median_ms"))
    }
    notes = tables.Notes(row for row in best.values() if "median_ms" in row)
    body = []
    for label, group in rows.items():
        line = [label]
        for impl in COLUMNS:
            row = best.get((label, impl))
            if row is None:
                line.append("")
            elif "median_ms" in row:
                line.append(f"{tables.figure('median_ms', row)}{notes.mark(row)}")
            else:
                line.append(notes.reason(row["skipped"]))
        body.append([*line, tables.gain(group, next(iter(group))) if group else ""])
    table = tables.table(["forward + backward, D = 384, K = 27, T = 2", *COLUMNS, "dense over ours"], body)
    return f"{table}\n\nMedians in ms, and in brackets how many times the floor that is.\n\n{notes.text()}".rstrip()


def times_floor(cells: Cells, wanted: dict, impl: str) -> float | None:
    rows = [newest(runs, "times_floor") for cell, runs in chosen(cells, wanted).items() if cell.impl == impl]
    return next((row["times_floor"] for row in rows if row), None)


def median(cells: Cells, wanted: dict, impl: str) -> float | None:
    rows = [newest(runs, "median_ms") for cell, runs in chosen(cells, wanted).items() if cell.impl == impl]
    return next((row["median_ms"] for row in rows if row), None)


def ratio(cells: Cells, wanted: dict, one: str, other: str) -> float | None:
    runs = {cell.impl: runs for cell, runs in chosen(cells, wanted).items()}
    return tables.ratio(runs.get(one), runs.get(other))


def goal(label: str, value: float | None, limit: float, text: Callable[[float], str], *, below: bool) -> list[str]:
    if value is None:
        return [label, "", ""]
    return [label, text(value), "yes" if (value <= limit if below else value >= limit) else "no"]


def extraction(cells: Cells) -> list[list[str]]:
    """Of 1024 x 512 JPEGs on a CPU."""
    wanted = dict(device="cpu", case="extract", width=1024, height=512, pixels=224)
    rows = [
        newest(runs, "images_per_s")
        for cell, runs in chosen(cells, dict(wanted, shape="mean_colours")).items()
        if cell.impl == "extraction"
    ]
    rate = next((row["images_per_s"] for row in rows if row), None)
    body = []
    for shape, squares in (("vit_s8_slide", "sliding squares"), ("vit_s8", "one square a photo")):
        over = ratio(cells, dict(wanted, shape=shape, dtype="float32"), "extraction", tables.ALONE)
        more = f"CPU, extraction with ViT-S/8, 224 px, fp32, {squares}: at most 3 % more than the backbone alone"
        body.append(goal(more, over, 1.03, lambda value: f"{100 * (value - 1):.1f} %", below=True))
    return [
        *body,
        goal(
            "CPU, extraction with a trivial backbone: 150 images/s",
            rate,
            150,
            lambda value: f"{value:.0f}",
            below=False,
        ),
    ]


def pair_goals(cells: Cells) -> list[list[str]]:
    sizes = dict(case="pairs", P=784, D=384, Z=70)
    gpu = dict(sizes, device="cuda", dtype="bfloat16", mode="graph", B=32)
    cpu = dict(sizes, device="cpu", dtype="float32", mode="forward + backward", B=8)
    name = "GPU, energy of all pairs, B = 32, P = 784: triton"
    compiled = ratio(cells, gpu, "dense + compile", "triton")
    return [
        goal(f"{name} 8× faster than dense", ratio(cells, gpu, "dense", "triton"), 8, tables.times, below=False),
        goal(f"{name} 2× faster than dense + compile", compiled, 2, tables.times, below=False),
        goal(
            f"{name} at 40 % of the measured matrix rate (2.5× its floor)",
            times_floor(cells, gpu, "triton"),
            2.5,
            tables.times,
            below=True,
        ),
        goal(
            "CPU, energy of pairs, B = 8, P = 784: torch as fast as dense",
            ratio(cells, cpu, "dense", "torch"),
            1,
            tables.times,
            below=False,
        ),
    ]


def goals(cells: Cells) -> str:
    one, many, step = (ROWS[label] for label in list(ROWS)[3:])
    small, large, _ = (ROWS[label] for label in list(ROWS)[:3])
    body = []
    for heads, wanted in (("1 head", one), ("16 heads", many)):
        name = f"GPU, {heads}: triton"
        body.append(
            goal(f"{name} within 2× of its floor", times_floor(cells, wanted, "triton"), 2, tables.times, below=True)
        )
        body.append(
            goal(
                f"{name} 20× faster than dense", ratio(cells, wanted, "dense", "triton"), 20, tables.times, below=False
            )
        )
        faster = ratio(cells, wanted, "torch + compile", "triton")
        body.append(goal(f"{name} faster than torch + compile", faster, 1, tables.times, below=False))
    body.append(
        goal(
            "GPU: training step within 0.3 ms",
            median(cells, step, "triton"),
            0.3,
            lambda ms: f"{tables.milliseconds(ms)} ms",
            below=True,
        )
    )
    body.append(
        goal(
            "GPU: training step 8× faster than dense",
            ratio(cells, step, "dense", "triton"),
            8,
            tables.times,
            below=False,
        )
    )
    body.append(
        goal(
            "CPU, B = 8, P = 784: torch 9× faster than dense",
            ratio(cells, small, "dense", "torch"),
            9,
            tables.times,
            below=False,
        )
    )
    body.append(
        goal(
            "CPU, B = 4, P = 1600: torch 22× faster than dense",
            ratio(cells, large, "dense", "torch"),
            22,
            tables.times,
            below=False,
        )
    )
    for dtype, name in (("float32", "fp32"), ("bfloat16", "bf16 projection")):
        whole = dict(CPU, dtype=dtype, case="head step", B=32, P=784, H=1)
        name = f"CPU, training step, B = 32, P = 784, {name}"
        for dense, which in (
            ("dense, own process", "as PyTorch comes"),
            ("dense", "with freed memory kept, as ours has it"),
        ):
            found = ratio(cells, whole, dense, "torch")
            body.append(goal(f"{name}: 8× faster than dense {which}", found, 8, tables.times, below=False))
        alone = ratio(cells, whole, "torch", "products alone")
        body.append(
            goal(
                f"{name}: within 1.5× of its matrix products alone",
                alone,
                1.5,
                lambda value: f"{value:.2f}×",
                below=True,
            )
        )
    body += extraction(cells)
    body += pair_goals(cells)
    for sweep in sweeps.sweeps(cells):
        impl = "triton" if sweep.cell.device == "cuda" else "torch"
        if sweep.letter == "P" and impl in sweep.lines:
            low, high = sweeps.STATED["P"]
            points = [point for point in sweep.points(impl, "median_ms") if low <= point[0] <= high]
            label = f"{threads_text(*sweep.cell[1:3])}: {impl} linear in P, slope at most 1.1 over {low} to {high}"
            body.append(goal(label, sweeps.slope(points), 1.1, lambda value: f"{value:.2f}", below=True))
    return tables.table(["goal", "measured", "reached"], body)
