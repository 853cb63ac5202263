"""Peak memory of one call beyond its inputs: the allocator's on a card, resident memory of a separate process on a CPU.

python benchmarks/memory.py '{"case": "objective", "impl": "torch", "mode": "forward + backward", "dtype": "float32",
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

import counting
import problems
import torch
from floors import PairProblem, Problem

TIMEOUT_S = 300
# every block past 64 KiB becomes a mapping of its own, which leaves resident memory when it is freed
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def peak_bytes(case: str, problem: Problem | PairProblem, impl: str, mode: str, dtype: str, **extra: object) -> int:
    """Resident memory, measured by this file run as a program; RuntimeError with its last line where it fails."""
    job = {"case": case, "problem": asdict(problem), "impl": impl, "mode": mode, "dtype": dtype, "extra": extra}
    command = [sys.executable, str(Path(__file__).resolve()), json.dumps(job)]
    environment = {**os.environ, **ALLOCATOR}
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise RuntimeError(f"no peak of {impl} at {problem}: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])["peak_bytes"]


def peak_on_card(run) -> int:
    """The allocator's peak over one call. Call `run` once before, so that it is compiled and its workspaces exist."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def counted_bytes(problem: Problem | PairProblem, impl: str, mode: str, dtype: str, case: str = "objective") -> int:
    """Bytes of the tensors of one call that live at one time, from shapes alone."""
    return counting.count(problems.SUBJECTS[case](problem, impl, mode, problems.DTYPES[dtype], "meta").run).peak_bytes


def available_bytes(device: str) -> int:
    return torch.cuda.mem_get_info()[0] if device == "cuda" else kernel_figure("/proc/meminfo", "MemAvailable")


def kernel_figure(path: str, name: str) -> int:
    """Bytes of a line "NAME: n kB"."""
    for line in Path(path).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {name} in {path}: memory is measured on Linux")


def main() -> int:
    job = json.loads(sys.argv[1])
    build, arguments = problems.SUBJECTS[job["case"]], (job["impl"], job["mode"], problems.DTYPES[job["dtype"]], "cpu")
    problem = (PairProblem if job["case"] == "pairs" else Problem)(**job["problem"])
    build(problems.shrunk(problem), *arguments).run()  # loads libraries, starts threads
    subject = build(problem, *arguments, **job.get("extra", {}))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the high-water mark
    # getrusage's mark would include the process that started this one
    before = kernel_figure("/proc/self/status", "VmHWM")
    subject.run()
    print(json.dumps({"peak_bytes": kernel_figure("/proc/self/status", "VmHWM") - before}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
