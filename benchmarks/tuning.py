"""Picks the settings of kernels on a card by coordinate descent over those that compile without a fault.

A setting's neighbours halve or double one of its numbers. Worker processes compile them into Triton's cache while the
card measures: they run the job on CPU tensors and hand every launch to Triton's own launcher (aot_report.py), so that
the card's launches find their binaries there. A setting must pass the error budget before it is timed.
"""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import measure
import problems
import results
import torch
from floors import PairProblem, Problem

from smooseg_kernels.triton import launch as launching

Setting = dict[str, int]
BOUNDS = {"num_warps": (1, 8), "num_stages": (1, 5), "BLOCK_P": (16, 256), "HEADS": (1, 8), "TILES": (1, 12)}
ANY_BOUNDS = 1, 2048
REGISTER_LIMITS = 128, 168  # three or four programs of four warps on a multiprocessor
GAIN = 0.99  # a better setting takes at most this share of the time
SAMPLE_S = 0.1
COMPILE_S = 20  # to wait for one setting
# name: (a subject of problems.py, its problem, further arguments)
JOBS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "objective H=1": ("objective", Problem(), {}),
    "objective H=16": ("objective", Problem(H=16), {}),
    "pairs": ("pairs", PairProblem(), {}),
    "assign": ("assign", Problem(), {"mode": "forward"}),
    "head step": ("head step", Problem(), {"mode": "step"}),
    "head step, 196 patches": ("head step", Problem(), {"mode": "step", "patches": 196}),
    "gate H=1": ("gate", Problem(B=4, P=196), {}),
    "gate H=2": ("gate", Problem(B=4, P=196, H=2), {}),
    "gate H=2, every option": ("gate", Problem(B=4, P=196, H=2, T=3), {}),
}
TUNABLE = list(JOBS)[:4]
SMOKE: dict[str, dict[str, Any]] = {"assign": {"pixels": 20}}


def subject(job: str, device: str, seed: int = 0, tiny: bool = False) -> problems.Subject:
    kind, problem, extra = JOBS[job]
    problem, extra = (problems.shrunk(problem), extra | SMOKE.get(kind, {})) if tiny else (problem, extra)
    options = {"mode": "forward + backward", "dtype": torch.bfloat16, **extra}
    return problems.SUBJECTS[kind](problem, "triton", device=device, seed=seed, **options)


def heads_of(job: str) -> int:
    return getattr(JOBS[job][1], "H", 1)


def neighbours(setting: Setting) -> list[Setting]:
    """Settings that differ in one number, or in the rows of a tile together with its warps."""
    changes: list[Setting] = []
    for name, value in setting.items():
        steps = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
        changes += [{name: step} for step in steps if name != "maxnreg"]
    if {"BLOCK_P", "num_warps"} <= set(setting):
        changes += [{name: int(setting[name] * by) for name in ("BLOCK_P", "num_warps")} for by in (0.5, 2)]
    changes += [{"maxnreg": limit} for limit in REGISTER_LIMITS if limit != setting.get("maxnreg")]
    return [{**setting, **change} for change in changes if all(map(allowed, change, change.values()))]


def allowed(name: str, value: int) -> bool:
    least, most = BOUNDS.get(name, ANY_BOUNDS)
    return least <= value <= most


class Asked(dict):
    """Settings that go before the data files, which remembers for which kernels they were asked."""

    def __init__(self, settings: dict[str, Setting]):
        super().__init__(settings)
        self.names: dict[str, None] = {}

    def get(self, name, default=None):
        self.names[name] = None
        return super().get(name, default)


def settings_asked(run: measure.Run, device: str, heads: int) -> dict[str, Setting]:
    """The settings that a call takes for 16 bits, by kernel."""
    launching.OVERRIDES, before = Asked({}), launching.OVERRIDES
    try:
        run()
        names = list(launching.OVERRIDES.names)
    finally:
        launching.OVERRIDES = before
    like = torch.empty(0, dtype=torch.bfloat16, device=device)
    settings = {name: launching.config(name, like, heads) for name in names}
    return {name: setting for name, setting in settings.items() if setting}


class Compiled(NamedTuple):
    settings: dict[str, Setting]  # of every kernel of the job
    binaries: list[tuple[str, int]]  # hash and programs of every launch
    faults: dict[str, str]  # by hash: what keeps a binary from being timed


# in worker processes


@functools.cache
def subject_on_cpu(job: str) -> problems.Subject:
    return subject(job, "cpu")


@functools.cache
def recorder():
    """aot_report.py, and the launches of what runs from now on in this process, which has no card and needs none."""
    import aot_report

    import smooseg_kernels.triton as package

    torch.set_num_threads(1)
    for module in (launching, package):
        module.require_interpreter = lambda: None
    launches: list[tuple] = []

    def keep(kernel, grid, *, settings, **arguments) -> None:
        options = {name: value for name, value in settings.items() if name != "PROGRAMS"}
        launches.append((kernel, tuple(map(int, grid)), {**arguments, **options}))

    for module in aot_report.LAUNCHERS:
        module.launch = keep
    return aot_report, launches, {}


def compiled(job: str, target: str, overrides: dict[str, Setting], path: Path) -> Compiled:
    """Compiles every launch of a job and writes the figures of new binaries to `path`."""
    aot_report, launches, known = recorder()
    launching.family = lambda device: target
    launching.OVERRIDES = overrides
    launches.clear()
    subject_on_cpu(job).run()
    out = Compiled({}, [], {})
    for kernel, grid, arguments in list(launches):
        name, programs = kernel.__name__.removesuffix("_kernel"), math.prod(grid)
        try:
            binary = aot_report.compiled_launch(kernel, grid, arguments, target)
            if binary.hash not in known:
                row = {"case": job, "kernel": name, "programs": programs}
                row |= aot_report.figures(binary, grid, arguments, target)
                row["faults"] = known[binary.hash] = "; ".join(aot_report.faults(row))
                results.append(path, row | {"settings": overrides})
            hash_ = binary.hash
        except Exception as error:  # of the compiler
            hash_ = f"{name} {overrides}"
            known[hash_] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[-1]}"[:200]
        out.binaries.append((hash_, programs))
        if known[hash_]:
            out.faults[hash_] = known[hash_]
    settings = settings_asked(subject_on_cpu(job).run, "cpu", heads_of(job)) if not overrides else {}
    return out._replace(settings=settings)


def hide_cards() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


class Compiler:
    """A pool of processes that compile settings for `target`, each once, and write figures to aot.jsonl in `out`."""

    def __init__(self, target: str, out: Path, processes: int = 14):
        self.pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=hide_cards)
        self.target, self.path, self.futures = target, out / "aot.jsonl", {}

    def submit(self, job: str, overrides: dict[str, Setting]) -> Future:
        key = job, json.dumps(overrides, sort_keys=True)
        if key not in self.futures:
            self.futures[key] = self.pool.submit(compiled, job, self.target, overrides, self.path)
        return self.futures[key]

    def start(self, jobs: Iterable[str]) -> None:
        """Compiles all JOBS as shipped, then the neighbours of the settings of `jobs`."""
        shipped = {job: self.submit(job, {}) for job in dict.fromkeys([*jobs, *JOBS])}
        for job in jobs:
            for kernel, setting in shipped[job].result().settings.items():
                for neighbour in neighbours(setting):
                    self.submit(job, {kernel: neighbour})

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


# in the process that measures


class Tuner:
    """Coordinate descent for one of JOBS.

    Args:
        device: "cuda", or "cpu" for the smoke form.
        out: the folder of settings.jsonl and best.json.
        compiler: None where nothing can be compiled, as in the interpreter.
        stop_s: when to end, on the clock of time.perf_counter.
        most: how many settings to time.
    """

    def __init__(self, job: str, device: str, out: Path, compiler: Compiler | None, stop_s: float, most: int):
        self.job, self.device, self.out, self.compiler = job, device, out, compiler
        self.stop_s = self.kernel_stop_s = stop_s
        self.most = most
        first, tiny = subject(job, device, tiny=device == "cpu"), device == "cpu"
        copies = measure.copies_beyond_cache("triton", first.floor_bytes, device)
        self.subjects = [first, *(subject(job, device, seed, tiny) for seed in range(1, copies))]
        self.shipped = settings_asked(first.run, device, heads_of(job))
        self.best, self.timed = dict(self.shipped), 0

    def run(self, kernels: Iterable[str] | None = None) -> None:
        """Tunes the kernels in equal shares of the time that is left; best.json has the best so far at any time."""
        shipped_ms = best_ms = self.milliseconds({})
        self.keep(shipped_ms, best_ms)
        if self.compiler is not None:
            try:
                shipped = self.compiler.submit(self.job, {}).result(COMPILE_S)
                self.seen, self.shipped_faults = {tuple(shipped.binaries)}, set(shipped.faults)
            except Exception as error:
                print(f"settings are not compiled ahead: {type(error).__name__}: {error}", flush=True)
                self.compiler = None
        for kernel, stop_s in shares(kernels or self.shipped, self.stop_s):
            self.kernel_stop_s, improved = stop_s, True
            while improved and not self.over():
                improved = False
                for setting in neighbours(self.best[kernel]):
                    overrides = self.changed(kernel, setting)
                    row = {"case": self.job, "kernel": kernel, "settings": overrides, **self.measured(overrides)}
                    if row.get("median_ms", math.inf) < GAIN * best_ms:
                        best_ms, better, improved = row["median_ms"], setting, True
                    results.append(self.out / "settings.jsonl", row | {"best_ms": best_ms, "shipped_ms": shipped_ms})
                    if self.over():
                        break
                if improved:
                    self.best[kernel] = better
                    self.keep(shipped_ms, best_ms)

    def over(self) -> bool:
        return time.perf_counter() > self.kernel_stop_s or self.timed >= self.most

    def changed(self, kernel: str, setting: Setting) -> dict[str, Setting]:
        """Returns the settings that differ from the shipped ones."""
        settings = {**self.best, kernel: setting}
        return {name: value for name, value in settings.items() if value != self.shipped[name]}

    def measured(self, overrides: dict[str, Setting]) -> dict[str, Any]:
        """The time of the whole job, or why it is not taken."""
        try:
            if self.compiler is not None:
                left_s = max(0.1, min(COMPILE_S, self.stop_s - time.perf_counter()))
                binaries = self.compiler.submit(self.job, overrides).result(left_s)
                launched = tuple(binaries.binaries)
                if launched in self.seen:
                    return {"refused": "the same programs as before"}
                self.seen.add(launched)
                new = [text for hash_, text in binaries.faults.items() if hash_ not in self.shipped_faults]
                if new:  # shipped kernels run whatever their faults
                    return {"refused": new[0]}
            return {"median_ms": self.milliseconds(overrides)}
        except Exception as error:  # wrong, or more than the card has
            return {"refused": f"{type(error).__name__}: {str(error)[:200]}"}

    def milliseconds(self, overrides: dict[str, Setting]) -> float:
        """AssertionError where the outputs are wrong."""
        self.timed += 1
        launching.OVERRIDES = overrides
        try:
            self.subjects[0].check(self.subjects[0].run())
            run = measure.in_turn([one.run for one in self.subjects])
            if self.device == "cpu":
                return measure.elapsed(run, self.device)
            replay, _ = measure.captured(run)
            return measure.timed(replay, self.device, len(self.subjects), seconds=SAMPLE_S)["median_ms"]
        finally:
            launching.OVERRIDES = {}

    def keep(self, shipped_ms: float, best_ms: float) -> None:
        path = self.out / "best.json"
        best: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        best[self.job] = {"shipped_ms": shipped_ms, "median_ms": best_ms, "settings": self.best}
        results.write(path, json.dumps(best, indent=1))


def shares(jobs: Iterable[str], stop_s: float) -> Iterator[tuple[str, float]]:
    """Each job and when it must end: equal shares of the time that is left when its turn comes."""
    jobs = list(jobs)
    for number, job in enumerate(jobs):
        now_s = time.perf_counter()
        yield job, now_s + (stop_s - now_s) / (len(jobs) - number)
