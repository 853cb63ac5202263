"""The one command for a machine with a CUDA card: GPU tests, then the benchmarks that matter there, in nine minutes.

    python benchmarks/gpu.py             # from a bare checkout: torch, Triton, pytest and pytest-benchmark
    python benchmarks/gpu.py --smoke     # on a CPU in Triton's interpreter, tiny sizes; its times mean nothing
    python benchmarks/gpu.py --out DIR   # results elsewhere than benchmarks/results/

An implementation whose values or gradients are outside the error budget gets no number, and the exit status is 1. Every
line is appended to gpu.jsonl as soon as it is measured, so a run that is cut off keeps its lines.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (ROOT, ROOT / "kernels" / "torch-ext", ROOT / "tests")
TESTS = ("triton_gpu", "triton_objective", "triton_rows", "triton_pair_energy", "triton_pair_energy_gpu", "trainer_gpu")
TOTAL_S, TESTS_S, COMPILE_S = 530, 260, 110
# cases that pytest takes (-k), and the seconds they may take; compiled forms take minutes and come last
CASES = {
    "function and objective and (cityscapes_s8 or heads16)": TOTAL_S,
    "assign and eval320": TOTAL_S,
    "function and (stego_b32 or all_784)": TOTAL_S,
    "head_step and (cityscapes_s8 or heads)": TOTAL_S,
    "compiled and heads16 and torch": COMPILE_S,
    "compiled and cityscapes_s8 and torch": COMPILE_S,
    "compiled and all_784 and dense": COMPILE_S,
}


def pytest(arguments: list[str], seconds: float, **variables: str) -> bool:
    """Runs pytest with this checkout's packages; False where it fails or takes longer than `seconds`."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", *arguments]
    path = os.pathsep.join([*map(str, FOLDERS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    try:
        status = subprocess.run(command, cwd=ROOT, env=environment, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        print(f"stopped after {seconds:.0f} s: {' '.join(arguments)}", flush=True)
        return False
    return status in (0, 5)  # 5: nothing was selected, as the GPU tests are on a CPU


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--no-tests", action="store_true", help="timings alone")
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        print("no GPU here: run on a machine with one, or with --smoke", file=sys.stderr)
        return 2
    start_s, failed = time.perf_counter(), []
    # all tests of the Triton kernels where xdist can spread them (they mostly compile), else those marked gpu
    selection = ["-n", "12"] if importlib.util.find_spec("xdist") and not args.smoke else ["-m", "gpu"]
    if not (args.no_tests or pytest([*selection, *(f"tests/test_{name}.py" for name in TESTS)], TESTS_S)):
        failed.append("tests")
    options = ["--benchmark-only", "--benchmark-quiet", "--bench-results", str(args.out.resolve() / "gpu.jsonl")]
    variables = {"SMOOSEG_RUN": uuid.uuid4().hex[:12]}
    if args.smoke:
        options += ["--bench-smoke", "--bench-triton"]
        variables["TRITON_INTERPRET"] = "1"
    for cases, limit_s in CASES.items():
        left_s = min(limit_s, TOTAL_S - (time.perf_counter() - start_s))
        if left_s < COMPILE_S / 2:
            print(f"no time left for {cases}: its cells stay empty", flush=True)
        elif not pytest(["benchmarks/bench_operators.py", "-k", cases, *options], left_s, **variables):
            failed.append(cases)
    print("\n".join([*(f"FAILED {what}" for what in failed), f"{time.perf_counter() - start_s:.0f} s"]))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
