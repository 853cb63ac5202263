"""Benchmarks run under `pytest --benchmark-only` alone, and then nothing else does: a plain `pytest` leaves them out.

    pytest --benchmark-only                   # every case that fits into ten minutes of two cores, or everything that a card runs
    pytest --benchmark-only --bench-full      # the long ones too
    pytest --benchmark-only --bench-smoke     # each once, at tiny sizes: are they right, do they run; writes nothing
    pytest --benchmark-only --bench-results=FILE

A measurement is checked against the oracle, timed, and appended to the results as one line (results.py has its form).
"""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

import floors
import keops_form
import machine
import measure
import memory
import own_process
import problems
import pytest
import results
import summary
import torch

from smooseg_fast.system.host import keep_freed_memory

# what a dense form may hold in its P x P matrices: without --bench-full about a second a call of two cores, with it most of the memory
DENSE_BYTES, DENSE_SHARE = 8e8, 0.8
SECONDS, LEAST, MOST = 1.0, 5, 200
FUNCTIONS = {"objective": problems.total_of, "pairs": problems.pair_energy_of}  # what torch.compile gets
SESSION = pytest.StashKey["Session"]()


def pytest_addoption(parser):
    group = parser.getgroup("smooseg benchmarks")
    group.addoption(
        "--bench-full", action="store_true", help="the cases too that take a CPU longer than the default ten minutes"
    )
    group.addoption(
        "--bench-smoke", action="store_true", help="tiny sizes, once each, checked as always; no line is written"
    )
    group.addoption(
        "--bench-results",
        type=Path,
        metavar="FILE",
        help="default: benchmarks/results/cpu.jsonl, or gpu.jsonl with a card",
    )


def pytest_collection_modifyitems(config, items):
    measuring = config.getoption("benchmark_only", False)
    others = [item for item in items if item.path.name.startswith("bench_") != measuring]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]


class Session:
    """One run: the machine, its ceilings (measured when first asked for), and the lines so far."""

    def __init__(self, config) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = "bfloat16" if self.device == "cuda" else "float32"
        self.full, self.smoke = config.getoption("bench_full"), config.getoption("bench_smoke")
        self.path = config.getoption("bench_results") or results.FOLDER / (
            "gpu.jsonl" if self.device == "cuda" else "cpu.jsonl"
        )
        self.rows: list[results.Row] = []
        self.reached: dict[str, tuple[float, float]] = {}  # ceilings
        self.start = time.perf_counter()
        if self.device == "cpu":
            keep_freed_memory()  # as training does; else a time depends on what the process has freed before

    @functools.cached_property
    def machine(self) -> dict[str, Any]:
        return machine.describe(self.device)

    def ceilings(self, dtype: str) -> tuple[float, float]:
        """Bytes a second and operations a second in `dtype`, measured when first asked for."""
        if dtype not in self.reached:
            copy, product = measure.ceilings(self.device, problems.DTYPES[dtype], tiny=self.smoke)
            for row in (copy, product):
                self.add({"dtype": dtype, **row})
            self.reached[dtype] = copy["bytes_per_s"], product["flops_per_s"]
        return self.reached[dtype]

    def add(self, row: results.Row) -> None:
        self.rows.append(row)
        if not self.smoke:
            results.append(self.path, {**self.machine, **row})


class Bench:
    """What a benchmark calls, with the `benchmark` fixture of its test."""

    def __init__(self, session: Session, benchmark) -> None:
        self.session, self.benchmark = session, benchmark
        self.full, self.smoke, self.device = session.full, session.smoke, session.device

    def sized(self, problem: floors.Problem, dtype: str | None = None) -> floors.Problem:
        problem = problems.shrunk(problem) if self.smoke else problem
        return problems.of_dtype(problem, problems.DTYPES[dtype or self.session.dtype])

    def time(
        self,
        subject,
        shape,
        problem,
        impl,
        mode,
        case: str | None = None,
        peak: bool = False,
        dtype: str | None = None,
        **extra,
    ) -> None:
        """Checks, times and records one call of problems.SUBJECTS; `peak` adds its peak memory, from a process of its own."""
        session, dtype = self.session, dtype or self.session.dtype
        problem = self.sized(problem, dtype)
        row = self.row(case or subject, shape, problem, impl, mode, extra) | {"dtype": dtype}
        if subject in FUNCTIONS:
            self.stop_where_it_must(row, problem, subject)
            extra = {
                **extra,
                "function": problems.function_of(impl, self.device, quick_compile=self.smoke, of=FUNCTIONS[subject]),
            }
        build = functools.partial(
            problems.SUBJECTS[subject], problem, impl, mode, problems.DTYPES[dtype], self.device, **extra
        )
        first = build()
        first.check(first.run())
        runs = [
            first.run,
            *(build(seed=i).run for i in range(1, measure.copies_beyond_cache(impl, first.floor_bytes, self.device))),
        ]
        run = measure.in_turn(runs)
        if mode == "graph":
            run, outputs = measure.captured(runs)
            run()
            first.check(outputs)
        timing = self.repeat(run, len(runs))
        bytes_per_s, flops_per_s = session.ceilings(dtype)
        floor = floors.floor_ms(first.floor_bytes, first.floor_flops, bytes_per_s, flops_per_s)
        row |= timing
        row |= {"floor_bytes": first.floor_bytes, "floor_flops": first.floor_flops, "floor_ms": floor}
        row["times_floor"] = row["median_ms"] / floor
        if peak and not self.smoke:
            extra.pop("function", None)
            row["peak_bytes"] = memory.peak_bytes(subject, problem, impl, mode, dtype, self.device, **extra)
        self.add(row)

    def time_as_shipped(self, subject, shape, problem, impl, mode, dtype: str) -> None:
        """The same in a process of its own, whose allocator is as PyTorch comes with it. The line's impl says so."""
        problem = self.sized(problem, dtype)
        row = self.row(subject, shape, problem, f"{impl}, own process", mode, {}) | {"dtype": dtype}
        rounds = 1 if self.smoke else LEAST
        arguments = (subject, problem, impl, mode, dtype, rounds)
        row |= measure.percentiles(self.benchmark.pedantic(own_process.times, arguments, rounds=1))
        self.add(row)

    def alternating(
        self, case, shape, sizes, runs: dict[str, measure.Run], dtype, rounds: int, between: measure.Run
    ) -> None:
        """Times every one of `runs` (checked before) in every round, so that a drift of the machine meets all; a line for each.

        `between` follows every run and is not timed.
        """
        self.benchmark.group = f"{case} {shape}"
        times: dict[str, list[float]] = {name: [] for name in runs}

        def once() -> None:
            for name, run in runs.items():
                times[name].append(measure.elapsed(run, self.device))
                between()

        self.benchmark.pedantic(once, rounds=1 if self.smoke else rounds, warmup_rounds=0 if self.smoke else 1)
        for name, taken in times.items():
            row = {"case": case, "shape": shape, "sizes": sizes, "impl": name, "mode": "all images", "dtype": dtype}
            taken = taken if self.smoke else taken[1:]
            self.add(
                {
                    **row,
                    **measure.percentiles(taken),
                    "images_per_s": 1e3 * sizes["images"] / measure.percentiles(taken)["median_ms"],
                }
            )

    def memory(self, shape: str, problem: floors.Problem, impl: str) -> None:
        """Peak memory of the objective, forward and backward, without a time; the bytes counted from shapes beside it."""
        problem, mode = self.sized(problem), "forward + backward"
        row = self.row("memory objective", shape, problem, impl, mode, {})
        self.stop_where_it_must(row, problem)
        if impl in ("dense", "torch"):
            row["counted_bytes"] = memory.counted_bytes(problem, impl, mode, self.session.dtype)
        arguments = ("objective", problem, impl, mode, self.session.dtype, self.device)
        row["peak_bytes"] = self.benchmark.pedantic(memory.peak_bytes, arguments, rounds=1)
        self.add(row)

    def row(self, case, shape, problem, impl, mode, extra) -> results.Row:
        sizes = problems.letters(problem) | extra
        self.benchmark.group = f"{case} {shape} {mode}"
        return {"case": case, "shape": shape, "sizes": sizes, "impl": impl, "mode": mode, "dtype": self.session.dtype}

    def stop_where_it_must(self, row: results.Row, problem: floors.Problem, subject: str = "objective") -> None:
        if row["impl"] == "keops" and not keops_form.is_installed():
            self.skip(row, "pykeops is not installed")
        if not row["impl"].startswith("dense"):
            return
        counted = memory.counted_bytes(problem, "dense", row["mode"], self.session.dtype, subject)
        reason = f"its P x P matrices take {counted:,} bytes at a time"
        free = memory.available_bytes(self.device)
        if counted > DENSE_SHARE * free:
            self.skip(row | {"counted_bytes": counted}, f"{reason}, of {free:,} available")
        if counted > DENSE_BYTES and self.device == "cpu" and not self.full:
            self.skip(row | {"counted_bytes": counted}, f"{reason}, more than {DENSE_BYTES:,.0f}: under --bench-full")

    def skip(self, row: results.Row, reason: str) -> None:
        self.session.add(row | {"skipped": reason})
        pytest.skip(reason)

    def unless_full(self, needed: bool) -> None:
        """Leaves a long case out, without a line, unless it was asked for; in smoke form it runs."""
        if needed and not (self.full or self.smoke):
            pytest.skip("under --bench-full")

    def repeat(self, run: measure.Run, calls: int) -> dict[str, Any]:
        """Percentiles by the device's own clock; pytest-benchmark makes the rounds, and its table has the wall clock around them."""
        rounds, times = 1, []
        if not self.smoke:
            rounds = min(MOST, max(LEAST, int(SECONDS * 1e3 / measure.elapsed(run, self.device))))
        self.benchmark.pedantic(lambda: times.append(measure.elapsed(run, self.device) / calls), rounds=rounds)
        return measure.percentiles(times, calls)

    def add(self, row: results.Row) -> None:
        names = ("n", "p20_ms", "median_ms", "p80_ms", "times_floor", "peak_bytes")
        self.benchmark.extra_info.update({name: row[name] for name in names if name in row})
        self.session.add(row)


@pytest.fixture
def bench(benchmark, request) -> Bench:
    stash = request.config.stash
    if SESSION not in stash:
        stash[SESSION] = Session(request.config)
    return Bench(stash[SESSION], benchmark)


def pytest_terminal_summary(terminalreporter, config):
    session = config.stash.get(SESSION, None)
    if session is None:
        return
    terminalreporter.section("smooseg benchmarks")
    for line in summary.table(session.rows):
        terminalreporter.write_line(line)
    if session.smoke:
        terminalreporter.write_line("smoke form: the times mean nothing, no line was written")
        return
    for line in summary.slopes(session.rows):
        terminalreporter.write_line(line)
    took = time.perf_counter() - session.start
    terminalreporter.write_line(f"{took:.0f} s; {len(session.rows)} lines appended to {session.path}")
