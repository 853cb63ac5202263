"""What compare.py calls slower: rates over simulated timings, files that do not compare, commits in a repository of their own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import compare  # noqa: E402

# log-normal spreads of a run's median in one cell, of the machine's slow drift and of calls; how often other work stretches some of a run's
# calls by 10 to 40 %, and how often a run is unlucky in one cell (memory layout) by 3 to 8 %
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
    assert (
        sum(change.beyond > 0 for change in found if int(change.cell.shape[1:]) in PLANTED) / (seeds * len(PLANTED))
        >= detected
    )


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
    assert [row.split()[:4] for row in out.splitlines()[1:3]] == [
        ["slower", "cpu", "objective", "s0"],
        ["faster", "cpu", "objective", "s2"],
    ]
    assert "1 slower, 1 faster, 1 within noise" in out
    assert "1 on A alone, 0 on B alone" in out
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
    wanted = {
        ("no such thing", "HEAD"): "neither a results file nor a commit",
        (good, "HEAD"): "one is a file and one is not",
        (good, str(damaged)): "b.jsonl:1",
        (good, elsewhere): "no cell was measured on both sides",
    }
    for arguments, words in wanted.items():
        assert main(*arguments) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1


BENCH = """
import json, time, package, pytest
def bench_one(benchmark, request):
    benchmark.pedantic(lambda: None, rounds=1)
    now = str(time.time_ns())
    who = dict(case="objective", impl="torch", mode="step", device="cpu", machine="one", threads=1, commit=package.NAME, run=now, date=now)
    rows = [{**who, "shape": name, "n": 9, "median_ms": ms, "p20_ms": ms, "p80_ms": ms} for name, ms in package.TIMES.items()]
    with open(request.config.getoption("--bench-results"), "a") as file:
        file.writelines(json.dumps(row) + "\\n" for row in rows)
    with open(package.LOG, "a") as log:
        log.write(package.NAME)
    time.sleep(package.SLEEP)
"""


@pytest.fixture
def repository(tmp_path):
    """compare.py in a repository whose benchmark reports what its package says: branch "base", and "slow" with one cell 20 % slower."""
    root = tmp_path / "repository"
    (root / "benchmarks").mkdir(parents=True)
    (root / "kernels" / "torch-ext" / "package").mkdir(parents=True)
    for name in ("compare", "cells", "results"):
        shutil.copy(BENCHMARKS / f"{name}.py", root / "benchmarks")
    git(root, "init", "-q")
    (root / "pyproject.toml").write_text(
        '[tool.pytest.ini_options]\npython_files = ["bench_*.py"]\npython_functions = ["bench_*"]\n'
    )
    git(root, "checkout", "-q", "-b", "ancient")
    commit(root, "ancient", {}, 0)
    (root / "benchmarks" / "bench_one.py").write_text(BENCH)
    (root / "benchmarks" / "conftest.py").write_text(
        "def pytest_addoption(parser):\n    parser.addoption('--bench-results')\n"
    )
    for name, times, sleep in (("base", [1.0, 1.0], 0), ("slow", [1.0, 1.2], 0), ("endless", [1.0, 1.0], 60)):
        git(root, "checkout", "-q", "-b", name)
        commit(root, name, {f"s{number}": ms for number, ms in enumerate(times)}, sleep)
    return root


def git(root, *command):
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *identity, *command], cwd=root, check=True, capture_output=True, text=True).stdout


def commit(root, name, times, sleep):
    module = root / "kernels" / "torch-ext" / "package" / "__init__.py"
    module.write_text(f"NAME, TIMES, SLEEP, LOG = {name!r}, {times!r}, {sleep!r}, {str(root.parent / 'log')!r}\n")
    git(root, "add", "--all")
    git(root, "commit", "-q", "-m", name)


def start(root, *arguments):
    command = [sys.executable, "benchmarks/compare.py", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV"))}
    return subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_commits_are_measured_in_turn_from_their_own_trees(repository):
    process = start(repository, "base", "slow", "--out", "kept", "--", "-q")
    out, error = process.communicate(timeout=120)
    assert process.returncode == 1, out + error
    assert (repository.parent / "log").read_text() == "baseslowbaseslow"
    assert "1 slower, 0 faster, 1 within noise" in out
    assert len((repository / "kept" / "A.jsonl").read_text().splitlines()) == 4
    assert len(git(repository, "worktree", "list").splitlines()) == 1


def test_a_commit_from_before_the_suite_is_refused(repository):
    process = start(repository, "ancient", "base")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error.count("\n") == 1
    assert "too old to know --bench-results" in error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_leaves_no_worktree(repository, number):
    process = start(repository, "endless", "base")
    deadline = time.monotonic() + 60
    while not (repository.parent / "log").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(git(repository, "worktree", "list").splitlines()) == 3
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert len(git(repository, "worktree", "list").splitlines()) == 1
