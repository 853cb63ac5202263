"""report.py on results files made up for it: which run counts, what stays empty, what a picture stops at, what --check sees."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import cells  # noqa: E402
import charts  # noqa: E402
import goals  # noqa: E402
import report  # noqa: E402
import results  # noqa: E402
import sweeps  # noqa: E402
import tables  # noqa: E402

SIZES = dict(B=8, P=784, D=384, K=27, Z=64, T=2, H=1)
BOTH = "forward + backward"


def line(impl="torch", median=6.5, *, day=1, case="objective", shape="b8", sizes=None, mode=BOTH, **others):
    who = dict(
        machine="a CPU",
        device="cpu",
        threads=2,
        torch="2.13.0",
        python="3.12.3",
        commit="abcdef0123456789",
        dirty=False,
    )
    run = dict(date=f"2026-01-{day:02d}T10:00:00+00:00", run=f"run{day}")
    row = dict(case=case, shape=shape, sizes={**SIZES, **(sizes or {})}, impl=impl, mode=mode, dtype="float32")
    timing = {} if median is None else dict(n=15, median_ms=median, p20_ms=0.98 * median, p80_ms=1.03 * median)
    return {**who, **run, **row, **timing, **others}


def collected(*rows):
    return cells.collect(rows)


def columns(block, number=0):
    """The first row of a block's table by column."""
    lines = [line for line in block.splitlines() if line.startswith("|")]
    head, row = ([cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], lines[2 + number]))
    return dict(zip(head, row))


def test_the_newest_run_that_has_a_cell_wins_and_the_footnote_says_which():
    block = tables.objective(
        collected(line("dense", 200.0, day=1, dirty=True), line("torch", 9.0, day=1), line("torch", 6.5, day=2))
    )
    row = columns(block)
    assert row["torch"] == "6.50 <sup>a</sup>"
    assert row["dense"] == "200 <sup>b</sup>"
    assert row["dense + compile"] == ""
    assert (
        "<sup>b</sup> 2026-01-01 10:00 UTC, commit abcdef0 with uncommitted changes, a CPU, 2 threads, torch 2.13.0, Python 3.12.3"
        in block
    )
    assert "<sup>a</sup> 2026-01-02 10:00 UTC, commit abcdef0, a CPU" in block


def test_a_clean_checkout_goes_before_a_newer_one_with_changes():
    block = tables.objective(collected(line("torch", 9.0, day=1), line("torch", 6.5, day=2, dirty=True)))
    assert columns(block)["torch"].startswith("9.00")


def test_a_ratio_is_of_one_run():
    """200 / 9 of the first run: the second has no dense."""
    row = columns(
        tables.objective(collected(line("dense", 200.0, day=1), line("torch", 9.0, day=1), line("torch", 5.0, day=2)))
    )
    assert row["dense over ours"] == "22× (torch)"
    apart = columns(tables.objective(collected(line("dense", 200.0, day=1), line("torch", 5.0, day=2))))
    assert apart["dense over ours"] == ""


def test_other_machines_and_threads_have_tables_of_their_own():
    block = tables.objective(
        collected(line("dense", 200.0), line("torch", 5.0, threads=8), line("torch", 4.0, machine="another"))
    )
    assert re.findall(r"\*\*(.*?)\*\*", block) == ["a CPU, 2 threads", "a CPU, 8 threads", "another, 2 threads"]
    assert "×" not in block


def test_a_skipped_cell_has_its_reason_until_it_is_measured():
    skip = dict(skipped="its P x P matrices take 11,400,000,000 bytes at a time, of 8,000,000,000 available")
    block = tables.objective(collected(line(), line("dense", None, **skip), line("dense + compile", None, **skip)))
    assert columns(block)["dense"] == columns(block)["dense + compile"] == "– <sup>1</sup>"
    assert block.count("its P x P matrices take 11.4 GB at a time, of 8.00 GB available") == 1
    assert "11.4 GB" in tables.skipped(collected(line("dense", None, **skip)))
    found = collected(line("dense", 200.0, day=1), line("dense", None, day=2, **skip))
    assert columns(tables.objective(found))["dense"] == "200"
    assert "11.4 GB" not in tables.skipped(found)


def test_lines_of_one_run_and_cell_add_up():
    found = collected(
        line("dense", 200.0),
        line("torch", 5.0),
        line("torch", None, peak_bytes=21e6),
        line("dense", None, peak_bytes=294e6),
    )
    assert columns(tables.memory(found))["dense over ours"] == "14× (torch)"
    assert columns(tables.memory(found))["torch"] == "21.0 MB"
    assert columns(tables.objective(found))["torch"] == "5.00"


def test_usual_sizes_need_not_be_written():
    row = line()
    bare = {**row, "sizes": {name: row["sizes"][name] for name in "BPDK"}}
    assert cells.identity(row) == cells.identity(bare) != cells.identity(line(sizes={"H": 4}))


def test_what_no_block_is_for_is_listed():
    assert "prototype loss" in tables.rest(collected(line(case="prototype loss")))
    assert tables.rest(collected(line())) == tables.NOTHING


def test_repeats_are_of_one_commit():
    rows = [line(shape=f"s{n}", day=day, median=1 + 0.01 * day * n) for n in range(4) for day in (1, 2)]
    assert columns(tables.repeats(collected(*rows))) == {
        "machine": "a CPU, 2 threads",
        "cells measured twice": "4",
        "apart, median": "1.5 %",
        "apart, largest": "2.9 %",
        "beyond the noise": "0",
    }
    other = [{**row, "commit": str(row["date"])} for row in rows]
    assert not tables.repeats(collected(*other)).startswith("|")


def sweep_lines(day=1, largest=12544):
    rows = []
    for P in (392, 784, 1568, 3136, 6272, 12544, 25088):
        if largest >= P:
            rows.append(
                line("torch", 0.01 * P, case="scaling P", shape=f"P{P}", sizes={"P": P}, day=day, peak_bytes=5000 * P)
            )
        dense = (
            dict(median=1e-4 * P**2, peak_bytes=40 * P**2)
            if P < 6272
            else dict(median=None, skipped="it would take 9,000,000,000 bytes")
        )
        rows.append(line("dense", case="scaling P", shape=f"P{P}", sizes={"P": P}, day=day, **dense))
    return rows


def test_slopes():
    assert sweeps.slope([(2, 8.0), (4, 16.0), (16, 64.0)]) == pytest.approx(1)
    assert sweeps.slope([(2, 4.0), (8, 64.0)]) == pytest.approx(2)
    assert sweeps.slope([(2, 4.0)]) is None
    block = tables.scaling(collected(*sweep_lines(largest=25088)))
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in block.splitlines() if row.startswith("| P")]
    assert rows == [
        ["P", "torch", "392 to 25088", "7", "1.00", "1.00", ""],
        ["P", "torch", "784 to 12544", "5", "1.00", "1.00", ""],
        ["P", "dense", "392 to 3136", "4", "2.00", "2.00", "6272: it would take 9.00 GB"],
    ]


def test_a_sweep_is_of_one_run():
    """The newest of those with the most points, for every curve."""
    (sweep,) = sweeps.sweeps(
        collected(*sweep_lines(1), *sweep_lines(2), line("torch", 1.0, case="scaling P", sizes={"P": 784}, day=3))
    )
    assert {row["run"] for row in sweep.rows()} == {"run2"}


def test_pictures_say_where_a_curve_stops_and_are_the_same_twice():
    drawn = charts.charts(collected(*sweep_lines(), line("dense", 182.0), line("torch", 6.5, floor_ms=2.0)))
    assert set(drawn) == {"objective", "scaling-a-cpu-2-threads"}
    texts = [text.get_text() for axes in drawn["scaling-a-cpu-2-threads"].draw("light").axes for text in axes.texts]
    assert texts == ["× dense stops before P 6272: it would take 9.00 GB"] * 2  # time and memory
    for chart in drawn.values():
        svg = chart.svg("dark")
        assert svg == chart.svg("dark") != chart.svg("light")
        assert charts.digest_of(svg) == chart.digest


def test_first_lines_of_the_gpu():
    """Written before the form they have today."""
    found = cells.collect(results.read([BENCHMARKS / "results" / "gpu.jsonl"])[:27])
    row = columns(goals.measured(found), 3)
    assert row["triton"] == "0.0742 (4.6×)"
    assert row["dense over ours"] == "57× (triton)"
    assert row["torch + compile"] == ""
    assert "image_moments" in tables.kernels(found)
    assert "2.99 TB/s" in tables.ceilings(found)


def test_goals_are_empty_until_measured():
    assert all(row.endswith("|  |  |") for row in goals.goals({}).splitlines()[2:])
    reached = goals.goals(collected(line("dense", 182.0), line("torch", 6.5)))
    assert "torch 9× faster than dense | 28× | yes |" in reached


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "docs").mkdir()
    names = [*report.BLOCKS, "objective picture", "scaling picture"]
    block = "<!-- report: {} -->\nold\n<!-- end report -->\n"
    (tmp_path / "README.md").write_text(
        "before\n" + block.format("measured") + "between 3 | 4\n" + block.format("objective picture") + "after\n"
    )
    (tmp_path / "docs" / "performance.md").write_text("\n".join(block.format(name) for name in names))
    (tmp_path / "cpu.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*sweep_lines(), line("dense", 182.0), line()])
    )
    return tmp_path


def main(checkout, *arguments, files=("cpu.jsonl",)):
    return report.main([*(str(checkout / name) for name in files), "--root", str(checkout), *arguments])


def test_check_writes_nothing_and_names_what_would_change(checkout, capsys):
    before = {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()}
    assert main(checkout, "--check") == 1
    out = capsys.readouterr().out
    assert "would change README.md: measured" in out
    assert "would change docs/pictures/objective-dark.svg" in out
    assert before == {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()}
    assert main(checkout) == 0
    assert main(checkout, "--check") == 0
    page = (checkout / "README.md").read_text()
    assert page.startswith("before\n<!-- report: measured -->\n|")
    assert "between 3 | 4\n" in page
    assert page.endswith("<!-- end report -->\nafter\n")
    for link in re.findall(r'(?:src|srcset)="([^"]+)"', page):
        assert (checkout / link).is_file()


def test_a_number_changed_by_hand_and_a_picture_too_many_are_seen(checkout, capsys):
    main(checkout)
    page = checkout / "README.md"
    page.write_text(page.read_text().replace("182", "181"))
    stray = checkout / "docs" / "pictures" / "scaling-sold-light.svg"
    stray.write_text("<svg/>")
    capsys.readouterr()
    assert main(checkout, "--check") == 1
    assert (
        capsys.readouterr().out
        == "would change README.md: measured\nwould change docs/pictures/scaling-sold-light.svg\n"
    )
    assert main(checkout) == 0
    assert not stray.exists()


@pytest.mark.parametrize("damage", ["results", "missing results", "unknown block", "open block"])
def test_one_line_of_what_is_wrong(checkout, capsys, damage):
    page, files = checkout / "README.md", ["cpu.jsonl"]
    if damage == "results":
        (checkout / "cpu.jsonl").write_text(json.dumps(line()) + '\n{"case": "obj\n')
    elif damage == "missing results":
        files = ["none.jsonl"]
    elif damage == "unknown block":
        page.write_text(page.read_text().replace("report: measured", "report: mesured"))
    else:
        page.write_text(page.read_text().replace("<!-- end report -->", "", 1))
    assert main(checkout, files=files) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    expected = {
        "results": "cpu.jsonl:2",
        "missing results": "none.jsonl",
        "unknown block": "mesured",
        "open block": "README.md",
    }
    assert expected[damage] in error


def test_the_command_and_the_pages_of_this_checkout(tmp_path):
    """Every block of the committed pages is known. (Whether they are up to date is for `.ci/run`: results come before pages.)"""
    command = [sys.executable, str(BENCHMARKS / "report.py"), str(BENCHMARKS / "results" / "gpu.jsonl"), "--check"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "kernels" / "torch-ext")},
    )
    assert done.returncode in (0, 1), done.stderr
    assert done.stderr == ""
