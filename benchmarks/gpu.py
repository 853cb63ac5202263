"""The one command for a machine with a GPU: runs the GPU tests, then times the objective and the assignment, under nine minutes.

    python benchmarks/gpu.py                   # from a bare checkout: needs torch, Triton and pytest, no network, nothing installed
    python benchmarks/gpu.py --smoke           # the same on a CPU, in Triton's interpreter, at tiny sizes; its times mean nothing
    python benchmarks/gpu.py --out DIR         # results elsewhere than benchmarks/results/

Every timing is gated: an implementation whose values or gradients are outside the error budget gets no number, and the exit status is 1.
Inputs rotate through more memory than the cache holds. Appends one JSON object a measurement to gpu.jsonl and prints a short table last.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "kernels" / "torch-ext"), str(ROOT / "tests"), str(ROOT / "benchmarks")]
SMOKE = "--smoke" in sys.argv
if SMOKE:
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

import floors  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from triton_cases import EPS, Case, check, evaluate, gradient_term_size, make_case, term_size  # noqa: E402

from smooseg_kernels import assign, smooseg_loss  # noqa: E402

DEVICE = "cpu" if SMOKE else "cuda"
SIZES = dict(B=2, P=20, D=20, K=5, Z=6) if SMOKE else dict(B=32, P=784, D=384, K=27, Z=64)
HEADS = (1, 2) if SMOKE else (1, 16)
DTYPE = torch.float16 if SMOKE else torch.bfloat16  # the interpreter has no bf16
TOTAL_SECONDS, TEST_SECONDS, COMPILE_SECONDS = 530, 260, 110


class Results:
    """Measurements, written as they come: a run that is cut off keeps what it has."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.rows, self.machine = folder / ("smoke.jsonl" if SMOKE else "gpu.jsonl"), [], machine()

    def add(self, **row) -> None:
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps({**self.machine, **row}) + "\n")
        print({name: round(value, 5) if isinstance(value, float) else value for name, value in row.items()}, flush=True)


def machine() -> dict:
    def ask(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT).stdout.strip().splitlines()[0]
        except (OSError, IndexError, subprocess.TimeoutExpired):
            return "unknown"

    return {
        "gpu": platform.processor() or platform.machine() if SMOKE else torch.cuda.get_device_name(),
        "driver": "none" if SMOKE else ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": os.environ.get("SMOOSEG_COMMIT") or ask("git", "rev-parse", "HEAD"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def run_tests() -> bool:
    """All tests of the Triton kernels where pytest can spread them over processes (they mostly compile), else those that need the GPU."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short"]
    files = [str(ROOT / "tests" / f"test_{name}.py") for name in ("triton_gpu", "triton_objective", "triton_rows", "trainer_gpu")]
    if importlib.util.find_spec("xdist") and not SMOKE:
        command += ["-n", "12", *files]
    else:
        command += ["-m", "gpu", *files]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path[:2], str(ROOT), os.environ.get("PYTHONPATH", "")])}
    try:
        status = subprocess.run(command, cwd=ROOT, env=environment, timeout=TEST_SECONDS).returncode
    except subprocess.TimeoutExpired:
        print(f"the tests did not end within {TEST_SECONDS} s")
        return False
    return status == 0 or (SMOKE and status == 5)  # without a GPU every one of them is skipped


def synchronize() -> None:
    if not SMOKE:
        torch.cuda.synchronize()


def elapsed(run: Callable[[], None]) -> float:
    """Milliseconds of one call, on the device's own clock."""
    if SMOKE:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measure(run: Callable[[], None], calls: int, seconds: float = 1.5) -> dict:
    """Percentiles of the time of one of the `calls` that `run` makes."""
    for _ in range(1 if SMOKE else 3):
        run()
    synchronize()
    times, stop = [], time.perf_counter() + (0.2 if SMOKE else seconds)
    while len(times) < 3 or (time.perf_counter() < stop and len(times) < 200):
        times.append(elapsed(run) / calls)
    p20, median, p80 = (statistics.quantiles(times, n=10, method="inclusive")[i] for i in (1, 4, 7))
    return {"n": len(times), "calls": calls, "median_ms": median, "p20_ms": p20, "p80_ms": p80}


def captured(runs: list[Callable[[], object]]) -> Callable[[], None]:
    """One graph of all the calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for run in runs:
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return graph.replay


def in_turn(runs: list[Callable[[], object]]) -> Callable[[], None]:
    def call() -> None:
        for run in runs:
            run()

    return call


def loss_of(impl: str, features, codes, student, teacher, partners, thresholds):
    return smooseg_loss(features, codes, student, teacher, partners, thresholds, impl=impl).total


def objective_run(case: Case, impl: str, function: Callable = loss_of) -> Callable[[], object]:
    """Forward and backward; the upstream gradient is given, so that none is made."""
    codes, student = case.codes.detach().requires_grad_(), case.student.detach().requires_grad_()
    ones = torch.ones(case.codes.shape[:-3], device=DEVICE)

    def run():
        total = function(impl, case.features, codes, student, case.teacher, case.partners, case.thresholds)
        return torch.autograd.grad(total, [codes, student], ones)

    return run


def cases_beyond_the_cache(H: int) -> list[Case]:
    copies = 2 if SMOKE else max(2, math.ceil(3 * torch.cuda.get_device_properties(0).L2_cache_size / floors.objective_floor(problem(H))))
    return [make_case(**SIZES, H=None if H == 1 else H, dtype=DTYPE, device=DEVICE, seed=i) for i in range(copies)]


def problem(H: int) -> floors.Problem:
    return floors.Problem(**SIZES, H=H, element=2)


def gate(case: Case, impl: str) -> None:
    """Against the moment form in float64."""
    oracle, same = evaluate(case.to(torch.float64), "torch"), evaluate(case, "torch")
    check(evaluate(case, impl), same, oracle, EPS[DTYPE], term_size(case), gradient_term_size(case))


def gate_compiled(case: Case, run: Callable[[], tuple]) -> None:
    oracle = evaluate(case.to(torch.float64), "torch", {"total": torch.ones(case.codes.shape[:-3], device=DEVICE)})
    for name, got in zip(("codes", "student"), run()):
        truth = oracle.gradients[name]
        assert (got.double() - truth).norm() <= 8 * EPS[DTYPE] * truth.norm(), f"gradient of {name}"


def time_ceilings(results: Results) -> float:
    """Bytes a second of a large copy (read and written) and the rate of a large matrix product."""
    size = 1 << (20 if SMOKE else 31)
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE).random_(0, 255)
    target = torch.empty_like(source)
    timing = measure(lambda: target.copy_(source), 1)
    bandwidth = 2 * size / timing["median_ms"] * 1e3
    results.add(case="ceiling", impl="copy", mode="eager", bytes_per_s=bandwidth, **timing)
    n = 64 if SMOKE else 8192
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.float32 if SMOKE else torch.bfloat16) for _ in "ab")
    timing = measure(lambda: a @ b, 1)
    results.add(case="ceiling", impl="matmul", mode="eager", flops_per_s=2 * n**3 / timing["median_ms"] * 1e3, **timing)
    return bandwidth


def time_objective(results: Results, bandwidth: float, H: int, impl: str, failures: list[str], compiled: bool = False) -> None:
    label = f"{impl} compiled" if compiled else impl
    common = {"case": f"objective H={H}", "impl": label, "dtype": str(DTYPE), "sizes": SIZES}
    try:
        cases = cases_beyond_the_cache(H)
        if impl == "dense":
            cases = cases[:2]  # what it writes is many times the cache
        if compiled:
            torch.compiler.reset()
            options = {"backend": "aot_eager"} if SMOKE else {"mode": "max-autotune-no-cudagraphs"}
            runs = [objective_run(case, impl, torch.compile(loss_of, **options)) for case in cases]
            gate_compiled(cases[0], runs[0])
        else:
            gate(cases[0], impl)
            runs = [objective_run(case, impl) for case in cases]
        floor = floors.objective_floor(problem(H))
        floor_ms = floor / bandwidth * 1e3
        modes = {"eager": in_turn(runs)}
        if not SMOKE:
            modes["graph"] = captured(runs)
        for mode, run in modes.items():
            timing = measure(run, len(runs))
            results.add(**common, mode=mode, floor_bytes=floor, floor_ms=floor_ms, times_floor=timing["median_ms"] / floor_ms, **timing)
        if impl == "triton" and not SMOKE:
            for kernel, microseconds in kernel_times(modes["graph"], len(runs)).items():
                results.add(case=f"objective H={H}", impl="triton", mode=f"kernel {kernel}", mean_us=microseconds)
    except Exception as error:  # a failed gate, a failed compilation: no number, and the run fails at its end
        failures.append(f"{common['case']} {label}: {type(error).__name__}: {str(error)[:500]}")
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
    return {event.key[:60]: event.device_time_total / 10 / calls for event in profiled.key_averages() if event.device_time_total > 0}


def time_assignment(results: Results, bandwidth: float, failures: list[str]) -> None:
    grid, size, B = ((4, 5), (16, 20), 2) if SMOKE else ((28, 28), (320, 320), 32)
    for impl in ("triton", "torch"):
        try:
            copies = 2 if SMOKE else 3
            cases = [make_case(**{**SIZES, "D": 1, "B": B}, dtype=DTYPE, device=DEVICE, seed=i) for i in range(copies)]
            labels = torch.randint(0, 27, (B, *size), dtype=torch.uint8, device=DEVICE)

            def run_of(case, impl=impl, labels=labels):
                return lambda: assign(case.codes, case.teacher, grid=grid, size=size, labels=labels, classes=27, impl=impl)

            want, _ = assign(
                cases[0].codes.double(), cases[0].teacher.double(), grid=grid, size=size, labels=labels, classes=27, impl="torch"
            )
            assigned, counts = run_of(cases[0])()
            wrong = (assigned != want).float().mean().item()
            assert wrong < 1e-4, f"{wrong:.2%} of the pixels differ from float64"
            assert counts.sum() == labels.numel()
            floor = floors.assignment_floor(B, SIZES["P"], SIZES["Z"], *size, 2, 1)
            floor_ms = floor / bandwidth * 1e3
            runs = [run_of(case) for case in cases]
            for mode, run in {"eager": in_turn(runs), **({} if SMOKE else {"graph": captured(runs)})}.items():
                timing = measure(run, len(runs))
                row = {"case": f"assign {size[0]}x{size[1]}", "impl": impl, "mode": mode, "floor_bytes": floor, "floor_ms": floor_ms}
                results.add(**row, times_floor=timing["median_ms"] / floor_ms, **timing)
        except Exception as error:
            failures.append(f"assign {impl}: {type(error).__name__}: {str(error)[:500]}")
            print("FAILED", failures[-1], flush=True)


def raise_timeout(*_):
    raise TimeoutError("out of time")


def print_table(rows: list[dict]) -> None:
    print(f"\n{'case':18s} {'implementation':16s} {'mode':34s} {'median us':>10s} {'p20':>9s} {'p80':>9s} {'n':>4s} {'x floor':>8s}")
    for row in rows:
        if "mean_us" in row:
            print(f"{row['case']:18s} {row['impl']:16s} {row['mode'][:34]:34s} {row['mean_us']:10.1f}")
            continue
        times = "".join(f" {row[name] * 1e3:9.1f}" for name in ("median_ms", "p20_ms", "p80_ms"))
        ratio = (
            f"{row['times_floor']:8.2f}" if "times_floor" in row else f"{row.get('bytes_per_s', row.get('flops_per_s', 0)) / 1e12:6.2f} T"
        )
        print(f"{row['case']:18s} {row['impl']:16s} {row['mode'][:34]:34s} {times} {row['n']:4d} {ratio}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--no-tests", action="store_true", help="timings alone")
    parser.add_argument("--no-compile", action="store_true", help="without the compiled torch form, which takes minutes")
    args = parser.parse_args()
    if not SMOKE and not torch.cuda.is_available():
        print("no GPU here: run on a machine with one, or with --smoke", file=sys.stderr)
        return 2
    start, failures, results = time.perf_counter(), [], Results(args.out)
    print(results.machine, flush=True)
    tests_passed = args.no_tests or run_tests()
    if not tests_passed:
        failures.append("tests")
    bandwidth = time_ceilings(results)
    for H in HEADS:
        for impl in ("triton", "torch", "dense"):
            time_objective(results, bandwidth, H, impl, failures)
    time_assignment(results, bandwidth, failures)
    for H in () if args.no_compile else HEADS:
        left = TOTAL_SECONDS - (time.perf_counter() - start)
        if left < COMPILE_SECONDS / 2:
            print(f"no time left to compile for H={H}: its cell stays empty")
            continue
        signal.signal(signal.SIGALRM, raise_timeout)
        signal.alarm(int(min(left, COMPILE_SECONDS)))
        time_objective(results, bandwidth, H, "torch", failures, compiled=True)
        signal.alarm(0)
    print_table(results.rows)
    for failure in failures:
        print("FAILED", failure)
    print(f"{time.perf_counter() - start:.0f} s; {len(results.rows)} rows appended to {results.path}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
