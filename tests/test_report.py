"""report.py on made-up results: which run counts, what stays empty, where a curve stops, what --check sees."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import charts  # noqa: E402
import report  # noqa: E402
import results  # noqa: E402

SIZES = dict(B=8, P=784, D=384, K=27, Z=64, T=2, H=1)
BOTH = "forward + backward"


def line(impl="torch", median=6.5, *, day=1, case="objective", shape="b8", sizes=None, mode=BOTH, **others):
    who = dict(machine="a CPU", device="cpu", threads=2, torch="2.13.0", python="3.12.3", commit="abcdef0123456789")
    run = dict(dirty=False, date=f"2026-01-{day:02d}T10:00:00+00:00", run=f"run{day}")
    row = dict(case=case, shape=shape, sizes={**SIZES, **(sizes or {})}, impl=impl, mode=mode, dtype="float32")
    timing = {} if median is None else dict(n=15, median_ms=median, p20_ms=0.98 * median, p80_ms=1.03 * median)
    return {**who, **run, **row, **timing, **others}


def rows(*lines, figure="median_ms"):
    """The rows of a table, by column."""
    head, _, *body = (row for row in report.table(report.collect(lines), figure).splitlines() if row.startswith("|"))
    return [dict(zip(*([cell.strip() for cell in row.strip("|").split("|")] for row in (head, row)))) for row in body]


def test_a_row_is_of_the_newest_run_with_the_most_numbers_and_the_footnote_says_which():
    lines = [line("dense", 200.0, day=1), line("torch", 9.0, day=1), line("torch", 5.0, day=2)]
    (row,) = rows(*lines)
    assert (row["dense"], row["torch"], row["dense over ours"], row["run"]) == ("200", "9.00", "22× (torch)", "a")
    note = "a: 2026-01-01, commit abcdef0, a CPU, 2 threads, torch 2.13.0, python 3.12.3, n = 15 to 15"
    assert report.table(report.collect(lines)).endswith(note)
    (row,) = rows(*lines, line("dense", 180.0, day=3, dirty=True), line("triton", 4.0, day=3, dirty=True))
    assert (row["dense"], row["torch"], row.get("triton")) == ("200", "9.00", None)
    (row,) = rows(*lines, line("dense", 180.0, day=3), line("triton", 4.0, day=3))
    assert (row["dense"], row.get("torch"), row["dense over ours"]) == ("180", None, "45× (triton)")


def test_a_clean_checkout_goes_before_a_newer_one_with_changes():
    assert rows(line("torch", 9.0, day=1), line("torch", 6.5, day=2, dirty=True))[0]["torch"] == "9.00"


def test_other_machines_and_threads_have_rows_of_their_own():
    found = rows(line("dense", 200.0), line("torch", 5.0, threads=8), line("torch", 4.0, machine="another"))
    assert [(row["dense"], row["torch"], row["dense over ours"]) for row in found] == [
        ("200", "", ""),
        ("", "5.00", ""),
        ("", "4.00", ""),
    ]


def test_the_threads_of_a_cards_host_do_not_count():
    card = dict(device="cuda", machine="a card", mode="graph")
    (row,) = rows(line("dense", 60.0, threads=16, **card), line("triton", 3.0, threads=8, **card))
    assert row["dense over ours"] == "20× (triton)"
    assert row[""] == "objective, GPU, float32, graph"


def test_a_skipped_cell_says_what_it_needs_until_it_is_measured():
    skip = dict(skipped="too large", counted_bytes=11_400_000_000)
    (row,) = rows(line(), line("dense", None, **skip))
    assert row["dense"] == "– (11.4 GB)"
    (row,) = rows(line(day=1), line("dense", 200.0, day=1), line(day=2), line("dense", None, day=2, **skip))
    assert row["dense"] == "200"


def test_lines_of_one_run_and_cell_add_up():
    lines = [line("dense", 200.0), line("torch", 5.0), line("torch", None, peak_bytes=21e6)]
    lines.append(line("dense", None, peak_bytes=294e6))
    (row,) = rows(*lines, figure="peak_bytes")
    assert (row["torch"], row["dense over ours"]) == ("21.0 MB", "14× (torch)")
    assert rows(*lines)[0]["torch"] == "5.00"


def test_usual_sizes_need_not_be_written():
    bare = line(sizes={"P": 784})
    bare["sizes"] = {name: SIZES[name] for name in "BPDK"}
    assert results.sizes_text(line()) == results.sizes_text(bare) == "B 8, P 784, D 384, K 27"
    assert results.sizes_text(line(sizes={"H": 4})).endswith(", H 4")


def sweep(day=1, largest=12544):
    lines = []
    for P in (392, 784, 1568, 3136, 6272, 12544, 25088):
        common = dict(case="scaling P", shape=f"P{P}", sizes={"P": P}, day=day)
        dense = dict(median=1e-4 * P**2, peak_bytes=40 * P**2)
        if P >= 6272:
            dense = dict(median=None, skipped="too large", counted_bytes=9e9)
        lines.append(line("dense", **common, **dense))
        if largest >= P:
            lines.append(line("torch", 0.01 * P, **common, peak_bytes=5000 * P))
    return lines


def test_slopes():
    points = pd.DataFrame({"at": [2, 4, 16], "y": [8.0, 16.0, 64.0]})
    assert report.slope(points, "y") == "1.00"
    assert report.slope(points**2, "y") == "1.00"
    assert report.slope(points.assign(y=points["at"] ** 2), "y") == "2.00"
    assert report.slope(points.assign(y=[np.nan, 1.0, np.nan]), "y") == ""
    text = report.scaling(report.collect(sweep(largest=25088)))
    assert [row.split(" | ") for row in text.splitlines() if row.startswith("| P")] == [
        ["| P", "dense", "392 to 3136", "2.00", "2.00", "at 6272: needs 9.0 GB", "a |"],
        ["| P", "torch", "392 to 25088", "1.00", "1.00", "", "a |"],
        ["| P", "torch", "784 to 12544", "1.00", "1.00", "", "a |"],
    ]


def test_a_sweep_is_of_one_run():
    """The newest of those with the most points, for every curve."""
    single = line("torch", 1.0, case="scaling P", sizes={"P": 784}, day=3)
    ((_, _, lines),) = report.sweeps(report.collect([*sweep(1), *sweep(2), single]))
    assert set(lines["run"]) == {"run2"}


def test_the_picture_has_its_data_and_is_the_same_twice():
    panels = charts.panels(report.sweeps(report.collect(sweep())))
    assert [title for title, _ in panels] == ["milliseconds against P, CPU", "MB beyond the inputs against P, CPU"]
    (_, curves), (_, memory) = panels
    assert curves["dense"][-1] == [3136, pytest.approx(1e-4 * 3136**2)]  # and no further
    assert memory["torch"][0] == [392, pytest.approx(5000 * 392e-6)]
    assert charts.svg(panels) == charts.svg(panels)
    assert f"digest {charts.digest(panels)}" in charts.svg(panels)
    assert charts.digest(panels) != charts.digest(panels[:1])


def test_every_cell_is_in_the_csv():
    """Its newest run with a number, or else the reason."""
    lines = [line("torch", 9.0, day=1), line("torch", 5.0, day=2), line("torch", None, day=3, skipped="no time")]
    lines += [line("dense", None, skipped="too large"), line("triton", None, mode="kernel x", mean_us=3.5)]
    text = report.cells_csv(report.collect(lines))
    header, *body = (row.split(",") for row in text.replace('"B 8, P 784, D 384, K 27"', "sizes").splitlines())
    cells = {cell["impl"]: cell for cell in (dict(zip(header, row)) for row in body)}
    assert (cells["torch"]["median_ms"], cells["torch"]["run"]) == ("5", "run2")
    assert cells["dense"]["skipped"] == "too large"
    assert cells["triton"]["mean_us"] == "3.5"


def test_the_first_run_on_a_card():
    lines = report.collect(results.read([ROOT / "benchmarks" / "results" / "gpu.jsonl"])[:27])
    row = lines[lines["mode"] == "graph"].set_index(["case", "sizes", "impl"])["median_ms"]
    assert row["objective", "B 32, P 784, D 384, K 27", "triton"] == pytest.approx(0.0742, rel=1e-2)
    text = report.table(lines[(lines["mode"] == "graph") & (lines["case"] == "objective")])
    assert "| 0.0742 (4.6×) | 57× (triton) |" in text
    assert "image_moments_kernel" in report.cells_csv(lines)


@pytest.fixture
def checkout(tmp_path):
    for folder in ("docs/pictures", "benchmarks/results"):
        (tmp_path / folder).mkdir(parents=True)
    block = "<!-- report: {} -->\nold\n<!-- end report -->\n"
    (tmp_path / "README.md").write_text(f"before\n{block.format('measured')}between 3 | 4\n")
    names = ("speed", "memory", "scaling")
    (tmp_path / "docs" / "performance.md").write_text("\n".join(map(block.format, names)))
    (tmp_path / "docs" / "kernels_aot.md").write_text(block.format("aot"))
    shutil.copy(ROOT / "benchmarks" / "results" / "aot.csv", tmp_path / "benchmarks" / "results")
    lines = [*sweep(), line("dense", 182.0, floor_ms=2.0), line(floor_ms=2.0)]
    (tmp_path / report.RESULTS / "cpu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return tmp_path


def main(checkout, *arguments):
    return report.main(["--root", str(checkout), *arguments])


def test_check_writes_nothing_and_names_what_is_out_of_date(checkout, capsys):
    before = {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()}
    assert main(checkout, "--check") == 1
    out = capsys.readouterr().out
    assert "out of date: README.md" in out
    assert "out of date: docs/pictures/scaling.svg" in out
    assert before == {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()}
    assert main(checkout) == 0
    assert main(checkout, "--check") == 0
    page = (checkout / "README.md").read_text()
    assert page.startswith("before\n<!-- report: measured -->\n|")
    assert page.endswith("<!-- end report -->\nbetween 3 | 4\n")
    assert (checkout / report.PICTURE).is_file()


def test_a_number_and_a_picture_changed_by_hand_are_seen(checkout, capsys):
    main(checkout)
    page = checkout / "README.md"
    page.write_text(page.read_text().replace("182", "181"))
    (checkout / report.PICTURE).write_text("<svg/>")
    capsys.readouterr()
    assert main(checkout, "--check") == 1
    assert capsys.readouterr().out == "out of date: README.md\nout of date: docs/pictures/scaling.svg\n"
    assert main(checkout) == 0
    assert main(checkout, "--check") == 0


@pytest.mark.parametrize("damage", ["results", "unknown block", "open block"])
def test_one_line_of_what_is_wrong(checkout, capsys, damage):
    page, lines = checkout / "README.md", checkout / report.RESULTS / "cpu.jsonl"
    if damage == "results":
        lines.write_text(json.dumps(line()) + '\n{"case": "obj\n')
    elif damage == "unknown block":
        page.write_text(page.read_text().replace("report: measured", "report: mesured"))
    else:
        page.write_text(page.read_text().replace("<!-- end report -->", "", 1))
    assert main(checkout) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert {"results": "cpu.jsonl:2", "unknown block": "mesured", "open block": "README.md"}[damage] in error


def test_the_pages_of_this_checkout():
    """Every block of the committed pages is known. (`.ci/run` checks that they are up to date.)"""
    texts, panels = report.outputs(ROOT)
    assert {path.name for path in texts} == {"cells.csv", "README.md", "performance.md", "kernels_aot.md"}
    assert panels
