"""The one command for a machine with a GPU: runs the GPU tests, then times objective, assignment and energies of pairs, under nine minutes.

    python benchmarks/gpu.py                   # from a bare checkout: needs torch, Triton and pytest, no network, nothing installed
    python benchmarks/gpu.py --smoke           # the same on a CPU, in Triton's interpreter, at tiny sizes; its times mean nothing
    python benchmarks/gpu.py --out DIR         # results elsewhere than benchmarks/results/

Every timing is gated: an implementation whose values or gradients are outside the error budget gets no number, and the exit status is 1.
Inputs rotate through more memory than the cache holds. Appends one JSON object a measurement to gpu.jsonl and prints a short table last.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SMOKE = "--smoke" in sys.argv
if SMOKE:
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
sys.path.insert(0, str(Path(__file__).resolve().parent))

import floors  # noqa: E402
import machine  # noqa: E402
import measure  # noqa: E402
import problems  # noqa: E402
import summary  # noqa: E402
import torch  # noqa: E402
from problems import ROOT, PairProblem, Problem, Subject  # noqa: E402
from results import FOLDER, append  # noqa: E402

DEVICE = "cpu" if SMOKE else "cuda"
DTYPE = "float16" if SMOKE else "bfloat16"  # the interpreter has no bf16
SIZES = {"B": 2, "P": 20, "D": 20, "K": 5, "Z": 6} if SMOKE else {}
HEADS = (1, 2) if SMOKE else (1, 16)
STEP_HEADS = 2 if SMOKE else 64
PIXELS = 20 if SMOKE else 320
PAIRS = {
    name: PairProblem(B=2, P=20, D=20, Z=6) if SMOKE else size
    for name, size in {"stego_b32": PairProblem(P=121), "all_784": PairProblem()}.items()
}
TOTAL_SECONDS, TEST_SECONDS, COMPILE_SECONDS = 530, 260, 110


def problem(H: int) -> Problem:
    return problems.of_dtype(Problem(**SIZES, H=H), problems.DTYPES[DTYPE])


def shape(H: int) -> str:
    return "cityscapes_s8" if H == 1 else f"heads{H}"


class Results:
    """Measurements, written as they come: a run that is cut off keeps what it has."""

    def __init__(self, folder: Path) -> None:
        self.path, self.rows, self.machine = (
            folder / ("smoke.jsonl" if SMOKE else "gpu.jsonl"),
            [],
            machine.describe(DEVICE),
        )
        self.bytes_per_s = self.flops_per_s = 0.0

    def add(self, **row) -> None:
        row = {"dtype": DTYPE, **row}
        self.rows.append(row)
        append(self.path, {**self.machine, **row})
        print({name: round(value, 5) if isinstance(value, float) else value for name, value in row.items()}, flush=True)

    def add_ceilings(self) -> None:
        copy, product = measure.ceilings(DEVICE, problems.DTYPES[DTYPE], tiny=SMOKE)
        self.bytes_per_s, self.flops_per_s = copy["bytes_per_s"], product["flops_per_s"]
        self.add(**copy)
        self.add(**product)

    def add_timing(self, subject: Subject, run: Callable, calls: int, **row) -> None:
        timing = timed(run, calls)
        floor = floors.floor_ms(subject.floor_bytes, subject.floor_flops, self.bytes_per_s, self.flops_per_s)
        counted = {"floor_bytes": subject.floor_bytes, "floor_flops": subject.floor_flops, "floor_ms": floor}
        self.add(**row, **counted, times_floor=timing["median_ms"] / floor, **timing)


def run_tests() -> bool:
    """All tests of the Triton kernels where pytest can spread them over processes (they mostly compile), else those that need the GPU."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short"]
    files = [
        str(ROOT / "tests" / f"test_{name}.py")
        for name in (
            "triton_gpu",
            "triton_objective",
            "triton_rows",
            "triton_pair_energy",
            "triton_pair_energy_gpu",
            "trainer_gpu",
        )
    ]
    if importlib.util.find_spec("xdist") and not SMOKE:
        command += ["-n", "12", *files]
    else:
        command += ["-m", "gpu", *files]
    folders = (ROOT / "kernels" / "torch-ext", ROOT / "tests", ROOT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])}
    try:
        status = subprocess.run(command, cwd=ROOT, env=environment, timeout=TEST_SECONDS).returncode
    except subprocess.TimeoutExpired:
        print(f"the tests did not end within {TEST_SECONDS} s")
        return False
    return status == 0 or (SMOKE and status == 5)  # without a GPU every one of them is skipped


def timed(run: Callable, calls: int, seconds: float = 1.5) -> dict:
    return measure.timed(run, DEVICE, calls, seconds=0.2 if SMOKE else seconds, warm=1 if SMOKE else 3)


def subjects_beyond_the_cache(H: int, impl: str) -> list[Subject]:
    """The same call on as many inputs as the cache cannot hold; the first has passed its check."""
    size = problem(H)
    copies = 2 if SMOKE else measure.copies_beyond_cache(impl, floors.objective_floor(size), DEVICE)
    build = functools.partial(problems.objective, size, impl, "forward + backward", problems.DTYPES[DTYPE], DEVICE)
    function = problems.function_of(impl, DEVICE, quick_compile=SMOKE)
    subjects = [build(seed=i, function=function) for i in range(copies)]
    subjects[0].check(subjects[0].run())
    return subjects


def time_objective(results: Results, H: int, impl: str, failures: list[str]) -> None:
    size = problem(H)
    row = {"case": "objective", "shape": shape(H), "sizes": problems.letters(size), "impl": impl}
    time_subjects(results, lambda: subjects_beyond_the_cache(H, impl), row, failures)


def pair_subjects(size: PairProblem, impl: str) -> list[Subject]:
    """The energy of pairs on as many inputs as the cache cannot hold; the first has passed its check."""
    copies = 2 if SMOKE else measure.copies_beyond_cache(impl, floors.pairs_floor(size), DEVICE)
    function = problems.function_of(impl, DEVICE, quick_compile=SMOKE, of=problems.pair_energy_of)
    build = functools.partial(problems.pairs, size, impl, "forward + backward", problems.DTYPES[DTYPE], DEVICE)
    subjects = [build(seed=i, function=function) for i in range(copies)]
    subjects[0].check(subjects[0].run())
    return subjects


def time_pairs(results: Results, name: str, impl: str, failures: list[str]) -> None:
    size = PAIRS[name]
    row = {"case": "pairs", "shape": name, "sizes": problems.letters(size), "impl": impl}
    time_subjects(results, lambda: pair_subjects(size, impl), row, failures)


def time_subjects(results: Results, build: Callable[[], list[Subject]], row: dict, failures: list[str]) -> None:
    """Forward and backward, one by one and from a CUDA graph; of our kernels each alone too."""
    try:
        subjects = build()
        runs = [subject.run for subject in subjects]
        results.add_timing(subjects[0], measure.in_turn(runs), len(runs), **row, mode="forward + backward")
        if SMOKE:
            return
        replay, outputs = measure.captured(runs)
        replay()
        subjects[0].check(outputs)
        results.add_timing(subjects[0], replay, len(runs), **row, mode="graph")
        if row["impl"] == "triton":
            for kernel, microseconds in kernel_times(replay, len(runs)).items():
                results.add(**row, mode=f"kernel {kernel}", mean_us=microseconds)
    except Exception as error:  # a failed check, a failed compilation: no number, and the run fails at its end
        failures.append(f"{row['case']} {row['shape']} {row['impl']}: {type(error).__name__}: {str(error)[:500]}")
        print("FAILED", failures[-1], flush=True)
    finally:
        if not SMOKE:
            torch.cuda.empty_cache()


def kernel_times(run: Callable[[], None], calls: int) -> dict[str, float]:
    """Mean microseconds of each kernel in one call, from the profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(10):
            run()
        torch.cuda.synchronize()
    return {
        event.key[:60]: event.device_time_total / 10 / calls
        for event in profiled.key_averages()
        if event.device_time_total > 0
    }


def time_assignment(results: Results, failures: list[str]) -> None:
    size = problems.of_dtype(Problem(**{**SIZES, "P": 16}) if SMOKE else Problem(), problems.DTYPES[DTYPE])
    for impl in ("triton", "torch"):
        row = {
            "case": "assign",
            "shape": "cityscapes_s8",
            "sizes": problems.letters(size) | {"pixels": PIXELS},
            "impl": impl,
        }
        try:
            build = functools.partial(
                problems.assignment, size, impl, "forward", problems.DTYPES[DTYPE], DEVICE, pixels=PIXELS
            )
            subjects = [build(seed=i) for i in range(2 if SMOKE else 3)]
            subjects[0].check(subjects[0].run())
            runs = [subject.run for subject in subjects]
            results.add_timing(subjects[0], measure.in_turn(runs), len(runs), **row, mode="forward")
            if not SMOKE:
                replay, outputs = measure.captured(runs)
                replay()
                subjects[0].check(outputs)
                results.add_timing(subjects[0], replay, len(runs), **row, mode="graph")
        except Exception as error:
            failures.append(f"assign {impl}: {type(error).__name__}: {str(error)[:500]}")
            print("FAILED", failures[-1], flush=True)


def time_step(results: Results, H: int, impl: str, failures: list[str]) -> None:
    """A training step on resident features: one by one, and replayed from a CUDA graph."""
    size = problem(H)
    for mode in ("step",) if SMOKE else ("step", "captured step"):
        row = {"case": "head step", "shape": shape(H), "sizes": problems.letters(size), "impl": impl, "mode": mode}
        try:
            subject = problems.head_step(size, impl, mode, problems.DTYPES[DTYPE], DEVICE)
            subject.check(subject.run())
            results.add_timing(subject, subject.run, 1, **row)
        except Exception as error:
            failures.append(f"{mode} {shape(H)} {impl}: {type(error).__name__}: {str(error)[:500]}")
            print("FAILED", failures[-1], flush=True)
        finally:
            if not SMOKE:
                torch.cuda.empty_cache()


def raise_timeout(*_):
    raise TimeoutError("out of time")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--no-tests", action="store_true", help="timings alone")
    parser.add_argument(
        "--no-compile", action="store_true", help="without the compiled torch form, which takes minutes"
    )
    args = parser.parse_args()
    if not SMOKE and not torch.cuda.is_available():
        print("no GPU here: run on a machine with one, or with --smoke", file=sys.stderr)
        return 2
    start, failures, results = time.perf_counter(), [], Results(args.out)
    print(results.machine, flush=True)
    tests_passed = args.no_tests or run_tests()
    if not tests_passed:
        failures.append("tests")
    results.add_ceilings()
    for H in HEADS:
        for impl in ("triton", "torch", "dense"):
            time_objective(results, H, impl, failures)
    time_assignment(results, failures)
    for name in PAIRS:
        for impl in ("triton", "torch", "dense"):
            time_pairs(results, name, impl, failures)
    for H, impl in ((1, "triton"), (1, "torch"), (1, "dense"), (STEP_HEADS, "triton")):
        time_step(results, H, impl, failures)
    for H in () if args.no_compile else HEADS:
        left = TOTAL_SECONDS - (time.perf_counter() - start)
        if left < COMPILE_SECONDS / 2:
            print(f"no time left to compile for H={H}: its cell stays empty")
            continue
        signal.signal(signal.SIGALRM, raise_timeout)
        signal.alarm(int(min(left, COMPILE_SECONDS)))
        time_objective(results, H, "torch + compile", failures)
        signal.alarm(0)
    left = TOTAL_SECONDS - (time.perf_counter() - start)
    if not args.no_compile and left > COMPILE_SECONDS / 2:
        signal.signal(signal.SIGALRM, raise_timeout)
        signal.alarm(int(min(left, COMPILE_SECONDS)))
        time_pairs(results, "all_784", "dense + compile", failures)
        signal.alarm(0)
    print(*summary.table(results.rows), sep="\n")
    for failure in failures:
        print("FAILED", failure)
    print(f"{time.perf_counter() - start:.0f} s; {len(results.rows)} rows appended to {results.path}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
