"""Verdicts of compare.py: rates over simulated timings, and files that do not compare."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import compare  # noqa: E402

# log-normal spreads of a run's median in one cell, of the machine's slow drift and of calls; how often other work
# stretches some of a run's calls by 10 to 40 %, and how often a run is unlucky in one cell (memory layout) by 3 to 8 %
MACHINES = {
    "quiet": dict(run=0.008, drift=0.01, calls=0.015, bursts=0.03, unlucky=0.02),
    "shared": dict(run=0.015, drift=0.02, calls=0.04, bursts=0.15, unlucky=0.03),
}
CELLS, PLANTED = 60, range(0, 60, 10)


def line(cell="s0", median=1.0, spread=0.01, **others):
    row = dict(
        case="objective",
        shape=cell,
        impl="torch",
        mode="forward + backward",
        dtype="float32",
        device="cpu",
        machine="one",
        threads=2,
    )
    row |= dict(commit="a", run="a0", date="2026-01-01T00:00:00", n=15, median_ms=median)
    return row | dict(p20_ms=median * (1 - spread), p80_ms=median * (1 + spread)) | others


def simulated(seed, machine, rounds, planted=()):
    """Lines of A and B, measured in turn; the cells of `planted` take 20 % longer in B."""
    rng, noise = np.random.default_rng(seed), MACHINES[machine]
    truth, counts = 10 ** rng.uniform(-1, 2.5, CELLS), rng.choice([7, 15, 30], CELLS)
    drift, lines = 0.0, {"A": [], "B": []}
    for number, side in ((number, side) for number in range(rounds) for side in "AB"):
        for cell, n in enumerate(counts.tolist()):
            drift = 0.97 * drift + rng.normal(0, noise["drift"] * (1 - 0.97**2) ** 0.5)
            offset = drift + rng.normal(0, noise["run"]) + (rng.random() < noise["unlucky"]) * rng.uniform(0.03, 0.08)
            calls = rng.normal(0, noise["calls"], n) + rng.exponential(noise["calls"] / 2, n)
            times = truth[cell] * np.exp(offset + calls) * (1.2 if side == "B" and cell in planted else 1)
            if rng.random() < noise["bursts"]:
                times[: int(n * rng.uniform(0.2, 0.5))] *= rng.uniform(1.1, 1.4)
            p20, median, p80 = np.percentile(times, [20, 50, 80]).tolist()
            run = dict(commit=side, run=f"{side}{number}", date=f"2026-01-01T00:0{number}:00", n=n)
            lines[side].append(line(f"s{cell}", median, **run, p20_ms=p20, p80_ms=p80))
    return lines["A"], lines["B"]


def changes(a, b):
    return compare.compare(compare.sides(a), compare.sides(b))


@pytest.mark.parametrize(
    ("machine", "rounds", "alarms", "detected"),
    [("quiet", 1, 0.03, 0.90), ("quiet", 2, 0.06, 0.99), ("shared", 2, 0.08, 0.80), ("shared", 3, 0.08, 0.93)],
)
def test_silent_on_none_and_finds_twenty_percent(machine, rounds, alarms, detected):
    """Bounds a few standard errors beyond the rates that compare.py states, which are of 400 seeds."""
    seeds = 100
    false = sum(any(change.beyond for change in changes(*simulated(seed, machine, rounds))) for seed in range(seeds))
    assert false / seeds <= alarms
    found = [change for seed in range(seeds) for change in changes(*simulated(10_000 + seed, machine, rounds, PLANTED))]
    slower = sum(change.beyond > 0 for change in found if int(change.cell[2][1:]) in PLANTED)
    assert slower / (seeds * len(PLANTED)) >= detected


def test_a_slowdown_of_everything_is_no_noise():
    for seed in range(20):
        found = changes(*simulated(seed, "quiet", 2, planted=range(CELLS)))
        assert sum(change.beyond > 0 for change in found) >= CELLS - 2


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def main(*arguments):
    return compare.main([str(argument) for argument in arguments])


def test_files(tmp_path, capsys):
    skipped = {**line("s3"), "median_ms": None, "skipped": "too large"}
    a = write(tmp_path / "a.jsonl", [line("s0"), line("s1"), line("s2", 2.0), line("only A"), skipped])
    b = write(tmp_path / "b.jsonl", [line("s0", 1.2), line("s1", 1.01), line("s2", 1.0)])
    assert main(a, b) == 1
    out = capsys.readouterr().out
    slower, faster, counts = out.splitlines()
    assert slower.startswith("slower         1 ->       1.2 ms  x 1.200")
    assert faster.startswith("faster         2 ->         1 ms  x 0.500")
    assert "cpu objective s0 torch" in slower
    assert counts == "1 slower, 1 faster, 1 within noise"
    assert main(b, a) == 1
    assert main(a, a) == 0
    assert "0 slower, 0 faster, 4 within noise" in capsys.readouterr().out
    assert main(a, a, "--all") == 0
    assert "only A" in capsys.readouterr().out


def test_runs_of_an_earlier_commit_in_the_same_file_do_not_count(tmp_path):
    old = line(median=5.0, commit="old", run="old0", date="2025-01-01T00:00:00")
    a, b = write(tmp_path / "a.jsonl", [line(), old]), write(tmp_path / "b.jsonl", [line(median=1.02)])
    assert main(a, b) == 0
    assert main(b, a) == 0


def test_a_moved_ceiling_is_the_machine(tmp_path, capsys):
    ceiling = dict(case="ceiling", impl="copy", shape="")
    a, b = (
        write(tmp_path / name, [line(), line(median=median, **ceiling)])
        for name, median in (("a.jsonl", 1.0), ("b.jsonl", 1.5))
    )
    assert main(a, b) == 0
    assert "the machine itself moved" in capsys.readouterr().out


@pytest.mark.parametrize("other", [{"machine": "two"}, {"threads": 4}])
def test_other_machines_are_refused(tmp_path, capsys, other):
    a, b = write(tmp_path / "a.jsonl", [line()]), write(tmp_path / "b.jsonl", [line(**other)])
    assert main(a, b) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(a, b, "--across-machines") == 0


def test_one_line_of_what_is_wrong(tmp_path, capsys):
    good, damaged = write(tmp_path / "a.jsonl", [line()]), tmp_path / "b.jsonl"
    damaged.write_text('{"case": "objec')
    elsewhere = write(tmp_path / "c.jsonl", [line("another shape")])
    wanted = {"none.jsonl": "none.jsonl", str(damaged): "b.jsonl:1", elsewhere: "no cell was measured on both sides"}
    for other, words in wanted.items():
        assert main(good, other) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
