"""Benchmarks run under `pytest --benchmark-only` alone, and then nothing else does; a plain `pytest` leaves them out.

    pytest --benchmark-only                   # cases that fit into ten minutes of two cores, or all that a card runs
    pytest --benchmark-only --bench-full      # the long ones too
    pytest --benchmark-only --bench-smoke     # each once at tiny sizes, checked as always; writes nothing
    pytest --benchmark-only --bench-results=FILE

Every call is checked against the oracle before it is timed, and appended to the results as one line (form: results.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import floors
import machine
import measure
import memory
import problems
import pytest
import results
import torch

from smooseg_fast.system.host import keep_freed_memory

# the most that dense P x P matrices may hold: about a second a call of two cores, with --bench-full a share of memory
DENSE_BYTES, DENSE_SHARE = 8e8, 0.8
SAMPLED_S, LEAST, MOST = 1.0, 5, 200  # seconds of samples, and how many there may be
GRAPHS = ("graph", "captured step")
BENCH = pytest.StashKey["Bench"]()


def pytest_addoption(parser):
    group = parser.getgroup("smooseg benchmarks")
    group.addoption("--bench-full", action="store_true", help="also cases beyond the default ten minutes of a CPU")
    group.addoption("--bench-smoke", action="store_true", help="tiny sizes, once each, checked; writes nothing")
    group.addoption("--bench-triton", action="store_true", help="Triton without a card, in its interpreter")
    where = "default: benchmarks/results/cpu.jsonl, or gpu.jsonl with a card"
    group.addoption("--bench-results", type=Path, metavar="FILE", help=where)


def pytest_collection_modifyitems(config, items):
    measuring = config.getoption("benchmark_only", False)
    card, triton = torch.cuda.is_available(), config.getoption("bench_triton")

    def runs(item) -> bool:
        case = item.callspec.params if hasattr(item, "callspec") else {}
        possible = card or ((triton or case.get("impl") != "triton") and case.get("mode") not in GRAPHS)
        return measuring and possible if item.path.name.startswith("bench_") else not measuring

    config.hook.pytest_deselected(items=[item for item in items if not runs(item)])
    items[:] = filter(runs, items)


class Bench:
    """One run: the machine, its ceilings (measured on first use), the lines so far, and the calls for benchmarks."""

    benchmark: Any  # the fixture of pytest-benchmark, a new one in every test

    def __init__(self, config) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = "bfloat16" if self.device == "cuda" else "float32"
        self.full, self.smoke = config.getoption("bench_full"), config.getoption("bench_smoke")
        default = "gpu.jsonl" if self.device == "cuda" else "cpu.jsonl"
        self.path = config.getoption("bench_results") or results.FOLDER / default
        self.rows: list[results.Row] = []
        self.machine = machine.describe(self.device)
        self.reached: dict[str, tuple[float, float]] = {}  # ceilings by dtype
        self.start_s = time.perf_counter()
        if self.device == "cpu":
            keep_freed_memory()  # training does so; otherwise a time depends on memory freed earlier

    def ceilings(self, dtype: str) -> tuple[float, float]:
        """Bytes a second, and operations a second in `dtype`."""
        if dtype not in self.reached:
            copy, product = rows = measure.ceilings(self.device, problems.DTYPES[dtype], tiny=self.smoke)
            for row in rows:
                self.add({"dtype": dtype, **row})
            self.reached[dtype] = copy["bytes_per_s"], product["flops_per_s"]
        return self.reached[dtype]

    def add(self, row: results.Row) -> None:
        self.rows.append(row)
        if not self.smoke:
            results.append(self.path, {**self.machine, **row})

    def time(self, subject, shape, problem, impl, mode, *, case=None, peak=False, dtype=None, **extra) -> None:
        """Checks, times and records one of problems.SUBJECTS; `peak` adds its peak memory, `extra` is the subject's."""
        dtype = dtype or self.dtype
        problem = problems.of_dtype(problems.shrunk(problem) if self.smoke else problem, problems.DTYPES[dtype])
        self.benchmark.group = f"{case or subject} {shape} {mode}"
        cell = {"case": case or subject, "shape": shape, "sizes": problems.letters(problem) | extra, "impl": impl}
        row = cell | {"mode": mode, "dtype": dtype}
        if subject in problems.FUNCTIONS:
            self.stop_where_it_must(row, problem, subject)
            extra["function"] = problems.function_of(subject, impl, self.device, quick_compile=self.smoke)
        subjects = problems.rotation(subject, problem, impl, mode, dtype, self.device, **extra)
        first, runs = subjects[0], [one.run for one in subjects]
        run = measure.in_turn(runs)
        if mode == "graph":
            run, outputs = measure.captured(run)
            run()
            first.check(outputs)
        floor = {"floor_bytes": first.floor_bytes, "floor_flops": first.floor_flops}
        floor["floor_ms"] = floors.floor_ms(*floor.values(), *self.ceilings(dtype))
        row |= self.repeat(run, len(runs)) | floor
        row["times_floor"] = row["median_ms"] / row["floor_ms"]
        if peak and not self.smoke:
            extra.pop("function", None)
            on_card = self.device == "cuda"
            job = (subject, problem, impl, mode, dtype)
            row["peak_bytes"] = memory.peak_on_card(first.run) if on_card else memory.peak_bytes(*job, **extra)
        self.add(row)
        if mode == "graph" and impl == "triton":
            for kernel, times in measure.kernel_times(run, len(runs)).items():
                self.add({**cell, "mode": f"kernel {kernel}", "dtype": dtype, **times})

    def alternating(self, case, shape, sizes, runs: dict[str, measure.Run], dtype, between: measure.Run) -> None:
        """Times all `runs` (checked before) in each of five rounds after one to warm up, since a machine drifts.

        `between` follows every run and is not timed.
        """
        self.benchmark.group = f"{case} {shape}"
        times: dict[str, list[float]] = {name: [] for name in runs}

        def once() -> None:
            for name, run in runs.items():
                times[name].append(measure.elapsed(run, self.device))
                between()

        self.benchmark.pedantic(once, rounds=1 if self.smoke else LEAST, warmup_rounds=0 if self.smoke else 1)
        for name, samples in times.items():
            row = {"case": case, "shape": shape, "sizes": sizes, "impl": name, "mode": "all images", "dtype": dtype}
            row |= measure.percentiles(samples if self.smoke else samples[1:])
            self.add({**row, "images_per_s": 1e3 * sizes["images"] / row["median_ms"]})

    def stop_where_it_must(self, row: results.Row, problem: floors.Problem, subject: str) -> None:
        if not row["impl"].startswith("dense"):
            return
        counted = memory.counted_bytes(problem, "dense", row["mode"], row["dtype"], subject)
        free = memory.available_bytes(self.device)
        reason = f"its P x P matrices take {counted:,} bytes at a time"
        if counted > DENSE_SHARE * free:
            reason += f", of {free:,} available"
        elif counted > DENSE_BYTES and self.device == "cpu" and not self.full:
            reason += f", more than {DENSE_BYTES:,.0f}: under --bench-full"
        else:
            return
        self.add(row | {"counted_bytes": counted, "skipped": reason})
        pytest.skip(reason)

    def unless_full(self, long: bool) -> None:
        """Leaves a long case out, without a line, except under --bench-full and --bench-smoke."""
        if long and not (self.full or self.smoke):
            pytest.skip("under --bench-full")

    def repeat(self, run: measure.Run, calls: int) -> dict[str, Any]:
        """Percentiles by the device's own clock; pytest-benchmark runs the rounds and prints the wall clock."""
        rounds, times = 1, []
        if not self.smoke:
            rounds = min(MOST, max(LEAST, int(SAMPLED_S * 1e3 / measure.elapsed(run, self.device))))
        self.benchmark.pedantic(lambda: times.append(measure.elapsed(run, self.device) / calls), rounds=rounds)
        return measure.percentiles(times, calls)


@pytest.fixture
def bench(benchmark, request) -> Iterator[Bench]:
    bench = request.config.stash.setdefault(BENCH, None) or Bench(request.config)
    request.config.stash[BENCH], bench.benchmark = bench, benchmark
    yield bench
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the next benchmark asks how much is free


def pytest_terminal_summary(terminalreporter, config):
    bench = config.stash.get(BENCH, None)
    if bench is None:
        return
    written = f"{time.perf_counter() - bench.start_s:.0f} s; {len(bench.rows)} lines appended to {bench.path}"
    if bench.smoke:
        written = "smoke form: the times mean nothing, no line was written"
    terminalreporter.section("smooseg benchmarks")
    terminalreporter.write_line("\n".join([*results.summary(bench.rows), written]))
