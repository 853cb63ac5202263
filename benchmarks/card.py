"""The parts of a run on a card (gpu.py), each in a process of its own: what it measures, line by line.

A measurement that fails becomes a line with its error, and the part goes on. `device` is "cpu" in the smoke form: tiny
sizes in Triton's interpreter, no graphs, nothing compiled, and times that mean nothing.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_crf
import bench_losses
import floors
import machine
import measure
import problems
import results
import torch
import triton
import triton.language as tl
import tuning
from floors import PairProblem, Problem

from smooseg_kernels.triton import launch as launching

SAMPLED_S = 0.3
EMPTY_LAUNCHES = 1000
READ_BYTES = 16 << 20  # stays in a card's L2
TUNED = ("objective H=1", "objective H=16", "pairs")
STEPS, STEPS_A_SAMPLE = 200, 20
SETTINGS = 60  # timed for each of TUNED
CLOCKS_A_MS = 1.9e6
FORWARD = ("assign", "gaussian sums")
CASES_OF_FAMILY = [case for case in bench_losses.LOSSES if case != "crf energy"]


class Card:
    """The lines of one part: what every line carries, the ceilings of this run, and the time that is left."""

    def __init__(self, out: Path, device: str, stop_s: float):
        self.out, self.device, self.stop_s = out, device, stop_s
        self.path, self.machine = out / "gpu.jsonl", machine.describe(device)
        self.tiny = device == "cpu"

    def add(self, row: results.Row) -> None:
        results.append(self.path, {**self.machine, **row})
        print(*results.summary([row]), flush=True)

    def guarded(self, cell: results.Row, run: Callable[[], Any]) -> Any:
        """`run`, or a line that says why there is none: no time is left, or its error."""
        if time.perf_counter() > self.stop_s:
            self.add({**cell, "error": "no time left"})
            return None
        try:
            return run()
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {error}"[:500]
            self.add({**cell, "error": f"{text} ({Path(place.filename).name}:{place.lineno})"})
            return None

    @functools.cached_property
    def ceilings(self) -> tuple[float, float]:
        """Bytes and operations a second, as the first part of this run measured them."""
        rows = [row for row in results.read([self.path]) if row.get("run") == machine.RUN and row["case"] == "ceiling"]
        reached = {name: row[name] for row in rows for name in ("bytes_per_s", "flops_per_s") if name in row}
        return reached["bytes_per_s"], reached["flops_per_s"]

    def graph(self, run: measure.Run) -> tuple[measure.Run, Any]:
        """A replay of the call from a graph, and its outputs; without a card the call itself."""
        return measure.captured(run) if self.device == "cuda" else (run, run())

    def times(self, run: measure.Run, calls: int = 1) -> dict[str, Any]:
        if self.tiny:
            return measure.percentiles([measure.elapsed(run, self.device) / calls], calls)
        return measure.timed(run, self.device, calls, seconds=SAMPLED_S)

    def kernels(self, cell: results.Row, run: measure.Run, calls: int = 1, most: int = 20) -> None:
        """A line for each kernel of a call, the longest first."""
        if self.tiny:
            return
        times = sorted(measure.kernel_times(run, calls).items(), key=lambda item: -item[1]["mean_us"])
        for name, figures in times[:most]:
            self.add({**cell, "mode": f"kernel {name}", **figures})


@triton.jit
def empty_kernel(out_ptr):
    pass


@triton.jit
def read_kernel(in_ptr, out_ptr, count, BLOCK: tl.constexpr):
    """Adds up every BLOCK-th block of numbers, so that nothing but reading takes time."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
        total += tl.load(in_ptr + start + lane)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, 0))


def ceilings(card: Card) -> None:
    """Copy and matrix product, the cost of a graph's node, and what is read from L2 in a second."""
    cell = {"case": "ceiling", "impl": "copy", "mode": "eager"}
    rows = card.guarded(cell, lambda: measure.ceilings(card.device, torch.bfloat16, tiny=card.tiny, seconds=SAMPLED_S))
    for row in rows or []:
        card.add({"dtype": "bfloat16", **row})
    launches = 4 if card.tiny else EMPTY_LAUNCHES
    out = torch.empty(4096, device=card.device)

    def empty() -> None:
        for _ in range(launches):
            empty_kernel[(1,)](out)

    cell = {"case": "ceiling", "impl": "empty launch", "mode": "graph"}
    card.guarded(cell, lambda: card.add({**cell, **card.times(card.graph(empty)[0], launches)}))
    numbers = torch.randn((READ_BYTES >> 10 if card.tiny else READ_BYTES) // 4, device=card.device)
    programs = 2 if card.tiny else 8 * torch.cuda.get_device_properties(0).multi_processor_count

    def read() -> None:
        read_kernel[(programs,)](numbers, out, numbers.numel(), BLOCK=1024)

    def rate() -> None:
        calls = 1 if card.tiny else 50
        times = card.times(card.graph(measure.in_turn([read] * calls))[0], calls)
        card.add({**cell, **times, "bytes_per_s": 1e3 * numbers.nbytes / times["p20_ms"]})

    cell = {"case": "ceiling", "impl": "read of L2", "mode": "graph"}
    card.guarded(cell, rate)


def gates(card: Card) -> None:
    """Every output and gradient in bf16 where all memory was NaN before; further runs must be equal to the bit."""
    for job in [name for name in tuning.JOBS if name.startswith("gate")]:
        cell = {"case": job, "impl": "triton", "mode": "forward + backward", "dtype": "bfloat16"}
        card.guarded(cell, lambda job=job, cell=cell: gate(card, job, cell))


def gate(card: Card, job: str, cell: results.Row) -> None:
    subject = tuning.subject(job, card.device, tiny=card.tiny)
    subject.run()  # compiles, which may not be done where memory is filled
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        got = subject.run()
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
    subject.check(got)
    for again in (subject.run() for _ in range(1 if card.tiny else 3)):
        for part in ("values", "gradients"):
            for name, value in getattr(got, part).items():
                assert torch.equal(value, getattr(again, part)[name]), f"{name} of a second run is another"
    card.add({**cell, "passed": True})


def timed_cell(
    card: Card,
    subject: str,
    shape: str,
    problem: Problem | PairProblem,
    *,
    impl="triton",
    dtype="bfloat16",
    **extra: Any,
) -> None:
    """A call from a graph, checked, with a line for each of its kernels."""
    problem = problems.shrunk(problem) if card.tiny else problem
    kind = "forward" if subject in FORWARD else "forward + backward"
    cell = {"case": subject, "shape": shape, "sizes": problems.letters(problem) | extra, "impl": impl, "dtype": dtype}

    def run() -> None:
        if card.tiny:
            subjects = [problems.SUBJECTS[subject](problem, impl, kind, problems.DTYPES[dtype], "cpu", **extra)]
            subjects[0].check(subjects[0].run())
        else:
            subjects = problems.rotation(subject, problem, impl, kind, dtype, card.device, **extra)
        first, calls = subjects[0], len(subjects)
        replay, outputs = card.graph(measure.in_turn([one.run for one in subjects]))
        replay()
        first.check(outputs)
        floor = {"floor_bytes": first.floor_bytes, "floor_flops": first.floor_flops}
        floor["floor_ms"] = floors.floor_ms(*floor.values(), *card.ceilings)
        times = card.times(replay, calls)
        card.add({**cell, "mode": "graph", **times, **floor, "times_floor": times["median_ms"] / floor["floor_ms"]})
        if impl == "triton":
            card.kernels(cell, replay, calls)

    card.guarded({**cell, "mode": "graph"}, run)


def shipped(card: Card) -> None:
    """The objective with one and with sixteen heads, in total and by kernel."""
    timed_cell(card, "objective", "cityscapes_s8", Problem())
    timed_cell(card, "objective", "heads16", Problem(H=16))


def others(card: Card) -> None:
    """Assignment of pixels, and energies of all pairs of patches."""
    pixels = 20 if card.tiny else 320
    timed_cell(card, "assign", "cityscapes_s8", Problem(), pixels=pixels)
    timed_cell(card, "pairs", "all_784", PairProblem())
    timed_cell(card, "assign", "eval320", Problem(P=1600), pixels=pixels)
    timed_cell(card, "pairs", "stego_b32", PairProblem(P=121))


def wide(card: Card) -> None:
    """Many prototypes, wide rows and fp32, whose kernels have settings of their own."""
    timed_cell(card, "objective", "k100_h4", Problem(K=100, H=4))
    if card.tiny:
        return
    timed_cell(card, "objective", "k100_h1", Problem(K=100))
    for Z in (70, 256):
        timed_cell(card, "pairs", f"d768_z{Z}", PairProblem(B=16, D=768, Z=Z))
    for H in (1, 4):
        timed_cell(card, "objective", f"fp32_h{H}", Problem(H=H, element=4), dtype="float32")
    timed_cell(card, "pairs", "all_784", PairProblem(element=4), dtype="float32")


def family(card: Card) -> None:
    """Losses of other trainers, and in the same run the formulas that those compute."""
    dtype = "float32" if card.tiny else "bfloat16"  # few channels: 16 bits would take some patches over the threshold
    for shape in ("b16_p784", "b32_p1600")[: 1 if card.tiny else None]:
        for case, impl in itertools.product(CASES_OF_FAMILY, ("triton", "dense")):
            timed_cell(card, case, shape, bench_losses.SHAPES[shape], impl=impl, dtype=dtype)
    for impl in ("triton", "dense"):
        timed_cell(card, "crf energy", "n1000", bench_losses.CRF["n1000"], impl=impl, dtype=dtype)


def edges(card: Card) -> None:
    """The dense CRF by all pairs of pixels and by the lattice, over the sizes between which one must choose."""
    for side, iterations in ((8, 1),) if card.tiny else ((192, 10), (256, 10), (320, 10), (512, 10), (1024, 1)):
        problem = bench_crf.pixels(side)
        if iterations > 1 or card.tiny:
            timed_cell(card, "gaussian sums", f"{side}px", problem, dtype="float32")
        for method in ("exact", "lattice"):
            crf_cell(card, f"{side}px", problem, method=method, iterations=iterations)


def crf_cell(card: Card, shape: str, problem: Problem, **options: Any) -> None:
    """Refines a picture as a caller does, without a graph: the kernels are long."""
    sizes = problems.letters(problem) | options
    cell = {"case": "dense crf", "shape": shape, "sizes": sizes, "impl": "auto", "mode": "forward", "dtype": "float32"}

    def run() -> None:
        subject = bench_crf.crf(problem, "auto", "forward", torch.float32, card.device, **options)
        subject.check(subject.run())
        card.add({**cell, **card.times(subject.run)})

    card.guarded(cell, run)


def steps(card: Card) -> None:
    """The captured step with all patches and with a quarter of them: on the wall's clock, and the card's work alone.

    "triton" projects in fused kernels, which "auto" leaves to PyTorch.
    """
    for impl, patches in itertools.product(
        ("triton",) if card.tiny else ("auto", "triton"), (None, 12 if card.tiny else 196)
    ):
        problem = problems.shrunk(Problem()) if card.tiny else Problem()
        sizes = problems.letters(problem) | ({} if patches is None else {"patches": patches})
        cell = {"case": "head step", "shape": "cityscapes_s8", "sizes": sizes, "impl": impl, "dtype": "bfloat16"}
        cell["mode"] = "captured step"
        card.guarded(cell, functools.partial(step, card, cell, problem, patches))


def step(card: Card, cell: results.Row, problem: Problem, patches: int | None) -> None:
    mode = "step" if card.tiny else "captured step"
    subject = problems.head_step(problem, cell["impl"], mode, torch.bfloat16, card.device, patches=patches)
    subject.check(subject.run())
    if (reason := getattr(subject.loop, "not_captured", None)) and not card.tiny:
        raise RuntimeError(f"not captured: {reason}")
    count, samples = (1, 1) if card.tiny else (STEPS_A_SAMPLE, STEPS // STEPS_A_SAMPLE)
    wait = torch.cuda.synchronize if card.device == "cuda" else lambda: None
    times = []
    for _ in range(samples + 1):  # the first warms up
        wait()
        start_s = time.perf_counter()
        for _ in range(count):
            subject.run()
        wait()
        times.append((time.perf_counter() - start_s) * 1e3 / count)
    floor = {"floor_bytes": subject.floor_bytes, "floor_flops": subject.floor_flops}
    floor["floor_ms"] = floors.floor_ms(*floor.values(), *card.ceilings)
    row = {**cell, **measure.percentiles(times[1:], count), **floor}
    card.add({**row, "times_floor": row["median_ms"] / floor["floor_ms"]})
    if card.tiny:
        return
    wall_ms = row["median_ms"]
    alone = measure.percentiles([device_ms(subject.run, count, wall_ms) for _ in range(samples)], count)
    card.add({**cell, "mode": "captured step, GPU", **alone, **floor})
    card.kernels(cell, subject.run, most=15)


def device_ms(run: measure.Run, count: int, wall_ms: float) -> float:
    """The card's time of one of `count` calls that are all queued before the first starts, behind an idle kernel."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(int(CLOCKS_A_MS * (5 + 1.5 * count * wall_ms)))
    start.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / count


def settings(card: Card, compiler: tuning.Compiler | None) -> None:
    """Coordinate descent over the settings of the objective's kernels, then of the pairs'."""
    for job, stop_s in tuning.shares(TUNED[:1] if card.tiny else TUNED, card.stop_s):
        most = 4 if card.tiny else SETTINGS

        def run(job: str = job, stop_s: float = stop_s, most: int = most) -> None:
            tuning.Tuner(job, card.device, card.out, compiler, stop_s=stop_s, most=most).run()

        card.guarded({"case": "settings", "impl": "triton", "mode": job}, run)


def compiler_for(card: Card) -> tuning.Compiler | None:
    """Worker processes that compile ahead, where kernels are compiled at all."""
    if launching.INTERPRETED:
        return None
    compiler = tuning.Compiler(launching.family(torch.device("cuda")), card.out)
    card.stop_s = math.inf
    card.guarded({"case": "settings", "impl": "triton", "mode": "compile"}, lambda: compiler.start(TUNED))
    return compiler


def once(card: Card, heads: int) -> None:
    """The objective's kernels three times without a graph, for a profiler that replays them."""
    subject = tuning.subject(f"objective H={heads}", card.device, tiny=card.tiny)
    for _ in range(3):
        subject.run()


# in the order of a run
PARTS: dict[str, Callable[[Card], None]] = {
    "ceilings": ceilings,
    "gates": gates,
    "shipped": shipped,
    "others": others,
    "wide": wide,
    "family": family,
    "edges": edges,
    "steps": steps,  # late, when compiling no longer takes the host's time
}


def main(part: str, out: Path, device: str) -> None:
    """Runs one part when its turn comes: a line with its seconds on the standard input. Loading takes place before."""
    card = Card(out, device, 0.0)
    compiler = compiler_for(card) if part == "settings" else None
    if device == "cuda":
        torch.cuda.init()
    line = sys.stdin.readline()  # when the part before has ended
    card.stop_s = time.perf_counter() + float(line or 0)
    if part.startswith("once "):
        return once(card, int(part.removeprefix("once ")))
    if part == "settings":
        settings(card, compiler)
    else:
        PARTS[part](card)
    if compiler is not None:
        compiler.close()
    sys.stdout.flush()
    os._exit(0)  # the end of a process with a card and workers takes seconds
