"""Writes the generated blocks of README.md and docs/, a picture and cells.csv from benchmarks/results.

    python benchmarks/report.py               # after a measurement, or after aot_report.py
    python benchmarks/report.py --check       # writes nothing; exits 1 and names what is out of date

A block stands between `<!-- report: NAME -->` and `<!-- end report -->`. A row of a table comes from one run, the
newest of those with the most numbers in it, so every ratio does too. A picture is up to date when it was drawn from the
same data: another matplotlib draws other bytes. Exit status 2: a file cannot be read, or a block is unknown.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import charts  # noqa: E402
import results  # noqa: E402

from smooseg_fast.system.files import write_atomic  # noqa: E402
from smooseg_fast.system.sizes import readable  # noqa: E402

PAGES = ("README.md", "docs/performance.md", "docs/kernels_aot.md")
RESULTS, PICTURE = "benchmarks/results", "docs/pictures/scaling.svg"
BLOCK = re.compile(r"(<!-- report: (?P<name>[^>]*?) -->\n).*?(<!-- end report -->)", re.DOTALL)
KEY = ["device", "machine", "threads", "case", "shape", "sizes", "mode", "dtype"]
COLUMNS = [*KEY, "impl", "n", "median_ms", "p20_ms", "p80_ms", "mean_us", "times_floor", "floor_ms", "floor_bytes"]
COLUMNS += ["floor_flops", "images_per_s", "peak_bytes", "counted_bytes", "bytes_per_s", "flops_per_s", "skipped"]
COLUMNS += ["date", "commit", "dirty", "torch", "triton", "driver", "python", "run"]
IMPLS = ["dense", "dense + compile", "torch", "torch + compile", "triton"]
CASES = ["objective", "memory objective", "head step", "assign", "pairs"]  # in the order of tables
STATED = {"P": (784, 12544)}  # a slope over this range, next to the one over everything measured
TRAINED = "B 32, P 784, D 384, K 27"
README = [("cpu", "objective", "B 8, P 784, D 384, K 27"), ("cpu", "head step", TRAINED)]
README += [("cuda", "objective", TRAINED), ("cuda", "objective", TRAINED + ", H 16")]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LEGEND = "Median milliseconds; in brackets the multiple of a counted lower bound (docs/performance.md)."


def collect(rows: list[results.Row]) -> pd.DataFrame:
    """A line for each cell (KEY, impl) and run, the oldest first. Lines of one run add up; a later one wins."""
    named = [row | {"sizes": results.sizes_text(row), "at": row.get("sizes") or {}} for row in rows]
    lines = pd.DataFrame(sorted(named, key=results.age), columns=[*COLUMNS, "at"])
    lines["threads"] = lines["threads"].where(lines["device"] == "cpu")  # those of a card's host do not count
    return lines.groupby([*KEY, "impl", "run"], sort=False, dropna=False).last().reset_index()


def cells_csv(lines: pd.DataFrame) -> str:
    """Every cell: its newest run with a number, or the newest that says why there is none."""
    lines = lines.assign(numbered=lines[["median_ms", "mean_us", "peak_bytes"]].notna().any(axis=1))
    newest = lines.sort_values("numbered", kind="stable").groupby([*KEY, "impl"], sort=False, dropna=False).tail(1)
    return newest.sort_values([*KEY, "impl"])[COLUMNS].to_csv(index=False, float_format="%.10g", lineterminator="\n")


def milliseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:#.3g}".rstrip(".")


def times(value: float) -> str:
    return f"{value:.1f}×" if value < 10 else f"{value:.0f}×"


def rows_of(lines: pd.DataFrame, figure: str) -> Iterator[tuple[pd.Series, pd.DataFrame]]:
    """The key and the lines by implementation of every row of a table, all of one run."""
    order = lines["case"].map(CASES.index), lines["dtype"] != "float32"
    lines = lines.assign(order=order[0], half=order[1]).sort_values(["device", "order", "half"], kind="stable")
    for _, group in lines.groupby(KEY, sort=False, dropna=False):
        runs = [run.set_index("impl") for _, run in group.groupby("run", sort=False)]
        best = max(reversed(runs), key=lambda run: run[figure].notna().sum())
        if best[figure].notna().any():
            yield group.iloc[0], best


def entry(line: pd.Series, figure: str) -> str:
    """A number with its multiple of the floor; a dash with the needed bytes where it was left out."""
    if pd.notna(line[figure]):
        floor = f" ({times(line['times_floor'])})" if figure == "median_ms" and pd.notna(line["times_floor"]) else ""
        return (readable if figure == "peak_bytes" else milliseconds)(line[figure]) + floor
    return "" if pd.isna(line["skipped"]) else f"– ({readable(line['counted_bytes'])})"


def gain(run: pd.DataFrame, figure: str) -> str:
    """Dense over the better of ours."""
    ours = run[figure].reindex(["torch", "triton"]).dropna().astype(float)
    dense = run[figure].get("dense", np.nan)
    return f"{times(dense / ours.min())} ({ours.idxmin()})" if len(ours) and dense > 0 else ""


def footnotes(lines: pd.DataFrame) -> str:
    """A letter a run: when, which code, where, with which versions, and how many samples."""
    notes = []
    for letter, (_, run) in zip(LETTERS, lines.groupby("run", sort=False)):
        one = run.iloc[0]
        dirty = {True: " with uncommitted changes", False: ""}.get(one["dirty"], " (uncommitted changes not recorded)")
        where = [one["date"][:10], f"commit {one['commit'][:7]}{dirty}", one["machine"]]
        where += [] if pd.isna(one["threads"]) else [f"{one['threads']:.0f} threads"]
        where += [f"{name} {one[name]}" for name in ("driver", "torch", "triton", "python") if pd.notna(one[name])]
        where += [f"n = {run['n'].min():.0f} to {run['n'].max():.0f}"] if run["n"].notna().any() else []
        notes.append(f"{letter}: {', '.join(where)}")
    return "<br>\n".join(notes)


def markdown(head: list[str], body: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *body))


def letters(lines: pd.DataFrame) -> dict[str, str]:
    return dict(zip(lines["run"].unique(), LETTERS))


def table(lines: pd.DataFrame, figure: str = "median_ms") -> str:
    """Rows of cases and sizes, columns of implementations, dense over the better of ours, and the run."""
    body, rows = [], list(rows_of(lines, figure))
    lines = pd.concat([run for _, run in rows] or [lines[:0]])
    shown = set(lines.index[lines[[figure, "skipped"]].notna().any(axis=1)])
    impls = [impl for impl in IMPLS if impl in shown]
    for key, run in rows:
        what = ", ".join([key["case"], "GPU" if key["device"] == "cuda" else "CPU", key["dtype"], key["mode"]])
        entries = [entry(run.loc[impl], figure) if impl in run.index else "" for impl in impls]
        body.append([what, key["sizes"], *entries, gain(run, figure), letters(lines)[run["run"].iloc[0]]])
    return "\n\n".join([markdown(["", "sizes", *impls, "dense over ours", "run"], body), footnotes(lines)])


def sweeps(lines: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Device, letter and lines by the letter's value `at`: of every scaling the newest run with the most numbers."""
    lines = lines[lines["case"].str.startswith("scaling ")]
    for device, letter in sorted(set(zip(lines["device"], lines["case"].str[-1])), key=str):
        group = lines[(lines["device"] == device) & (lines["case"].str[-1] == letter)]
        runs = [run for _, run in group.groupby(["machine", "threads", "run"], sort=False, dropna=False)]
        best = max(reversed(runs), key=lambda run: run["median_ms"].notna().sum())
        at = [sizes.get(letter, results.USUAL.get(letter)) for sizes in best["at"]]
        yield device, letter, best.assign(at=at).sort_values("at")


def slope(points: pd.DataFrame, figure: str) -> str:
    """Least squares of log y on log x: 1 is linear, 2 quadratic."""
    points = points[["at", figure]].dropna().astype(float)
    return f"{np.polyfit(*np.log(points.to_numpy().T), 1)[0]:.2f}" if len(points) > 1 else ""


def scaling(lines: pd.DataFrame) -> str:
    body, shown = [], list(sweeps(lines))
    lines = pd.concat([sweep for _, _, sweep in shown] or [lines[:0]])
    for _, letter, sweep in shown:
        for impl, curve in sweep.groupby("impl", sort=False):
            timed = curve[curve["median_ms"].notna()]
            beyond = curve[curve["skipped"].notna() & (curve["at"] > timed["at"].max())].head(1).itertuples()
            stop = "".join(f"at {line.at}: needs {readable(line.counted_bytes)}" for line in beyond)
            part = timed[timed["at"].between(*STATED.get(letter, (0, 0)))]
            for points in [timed] + [part] * (1 < len(part) < len(timed) and impl != "dense"):
                slopes = [slope(points, figure) for figure in ("median_ms", "peak_bytes")]
                extent = f"{points['at'].min()} to {points['at'].max()}"
                body.append([letter, impl, extent, *slopes, stop, letters(lines)[sweep["run"].iloc[0]]])
    head = ["against", "implementation", "range", "slope of time", "slope of memory", "dense stops", "run"]
    return markdown(head, body) + "\n\n" + footnotes(lines)


def aot(rows: pd.DataFrame) -> str:
    """For each target and version of Triton: faults, the most that a program takes, and instructions a row and head."""
    body = []
    for (target, version), group in rows.groupby(["target", "triton"], sort=False):
        registers = group.loc[group["registers"].idxmax()]
        shared = group.loc[(group["shared"] / group["shared_limit"]).idxmax()]
        worst = f"{registers['registers']:.0f} ({registers['kernel']}, {registers['case']})"
        most = f"{shared['shared']:,.0f} of {shared['shared_limit']:,.0f} ({shared['kernel']}, {shared['case']})"
        faults, spilled = group["faults"].notna().sum(), group["spills"].max()
        steps = group[group["case"].str.startswith("bf16 dropout") & group["per_row"].notna()].itertuples()
        counts = [f"{row.kernel}{row.case.removeprefix('bf16 dropout')}: {row.per_row:.0f}" for row in steps]
        body.append([target, version, f"{len(group)}", f"{faults}", f"{spilled:.0f}", worst, most, "<br>".join(counts)])
    head = ["target", "Triton", "kernels", "faults", "most bytes spilled", "most registers", "most shared bytes"]
    return markdown([*head, "instructions a row and head"], body)


def outputs(root: Path) -> tuple[dict[Path, str], list]:
    """The texts of every page and of cells.csv, and the panels of the picture."""
    lines = collect(results.read(sorted((root / RESULTS).glob("*.jsonl"))))
    shown = lines[lines["case"].isin(CASES) & ((lines["mode"] != "forward") | (lines["case"] == "assign"))]
    shown = shown[shown["impl"].isin(IMPLS) & ~shown["mode"].str.startswith("kernel")]
    main = shown[["device", "case", "sizes"]].apply(tuple, axis=1).isin(README)
    on_card = shown["mode"].isin(["graph", "captured step"])
    main &= np.where(shown["dtype"] == "float32", shown["device"] == "cpu", on_card)
    trained = shown["case"].isin(CASES[:3])
    blocks = {
        "measured": table(shown[main]) + "\n\n" + LEGEND,
        "speed": table(shown[trained]),
        "other": table(shown[~trained]),
        "memory": table(shown[trained & (shown["dtype"] != "bfloat16")], "peak_bytes"),
        "scaling": scaling(lines),
        "aot": aot(pd.read_csv(root / RESULTS / "aot.csv", dtype={"triton": str})),
    }
    texts = {root / RESULTS / "cells.csv": cells_csv(lines)}
    for page in PAGES:
        text = (root / page).read_text(encoding="utf-8")
        matches = list(BLOCK.finditer(text))
        unknown = [match["name"] for match in matches if match["name"] not in blocks or match[0].count("<!--") > 2]
        if unknown or len(matches) != text.count("<!-- report:"):
            raise ValueError(f"{page}: unknown or unfinished block {', '.join(unknown)}; there are {', '.join(blocks)}")
        texts[root / page] = BLOCK.sub(lambda match: f"{match[1]}{blocks[match['name']]}\n{match[3]}", text)
    return texts, charts.panels(sweeps(lines))


def run(root: Path, check: bool) -> int:
    texts, panels = outputs(root)
    picture = root / PICTURE
    present = {path: path.read_text(encoding="utf-8") for path in [*texts, picture] if path.exists()}
    stale = [path for path, text in texts.items() if present.get(path) != text]
    if charts.digest(panels) not in present.get(picture, ""):
        stale.append(picture)
    for path in [] if check else stale:
        write_atomic(path, charts.svg(panels) if path == picture else texts[path])
    names = [f"{'out of date:' if check else 'wrote'} {path.relative_to(root)}" for path in stale]
    print("\n".join(names) or "everything is up to date")
    return int(check and bool(names))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to write to (this one)")
    args = parser.parse_args(arguments)
    try:
        return run(args.root, args.check)
    except (OSError, ValueError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
