"""Peak memory of one call beyond its inputs, in a process of its own: resident memory on a CPU, the allocator's on a card.

python benchmarks/memory.py '{"case": "objective", "impl": "torch", "mode": "forward + backward", "dtype": "float32", "device": "cpu",
                              "problem": {"B": 1, "P": 16384}}'
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import counting
import problems
import torch
from floors import PairProblem, Problem

SECONDS = 300
# every block past 64 KiB is a mapping of its own, which leaves resident memory when it is freed
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def peak_bytes(
    case: str, problem: Problem | PairProblem, impl: str, mode: str, dtype: str, device: str, **extra: Any
) -> int:
    """Starts this file as a program and reads what it prints. RuntimeError with its last line where it fails."""
    job = {
        "case": case,
        "problem": asdict(problem),
        "impl": impl,
        "mode": mode,
        "dtype": dtype,
        "device": device,
        "extra": extra,
    }
    environment = {**os.environ, **ALLOCATOR}
    command = [sys.executable, str(Path(__file__).resolve()), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment)
    if done.returncode:
        raise RuntimeError(
            f"no peak of {impl} at {problem}: {(done.stderr.strip().splitlines() or [f'status {done.returncode}'])[-1]}"
        )
    return json.loads(done.stdout.strip().splitlines()[-1])["peak_bytes"]


def counted_bytes(problem: Problem | PairProblem, impl: str, mode: str, dtype: str, case: str = "objective") -> int:
    """Bytes of tensors of one forward and backward that live at one time, from shapes alone."""
    return counting.count(problems.SUBJECTS[case](problem, impl, mode, problems.DTYPES[dtype], "meta").run).peak_bytes


def available_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no MemAvailable in /proc/meminfo")


def resident_high_water() -> int:
    """Of this program alone: getrusage's mark also keeps that of the process which started it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status: peak memory is measured on Linux")


def forget_high_water() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def growth(run, device: str) -> int:
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    forget_high_water()
    before = resident_high_water()
    run()
    return resident_high_water() - before


def main() -> int:
    job = json.loads(sys.argv[1])
    build, arguments = (
        problems.SUBJECTS[job["case"]],
        (job["impl"], job["mode"], problems.DTYPES[job["dtype"]], job["device"]),
    )
    problem, extra = (PairProblem if job["case"] == "pairs" else Problem)(**job["problem"]), job.get("extra", {})
    build(problems.shrunk(problem), *arguments).run()  # libraries loaded, threads started
    subject = build(problem, *arguments, **extra)
    if job["device"] == "cuda" or "compile" in job["impl"]:
        subject.run()  # compiled, workspaces made
    print(json.dumps({"peak_bytes": growth(subject.run, job["device"])}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
