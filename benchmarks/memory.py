"""Peak memory of one call beyond its inputs: a card's allocator says it, on a CPU the memory of a fresh process."""

from __future__ import annotations

import gc
import multiprocessing
import os
from pathlib import Path
from unittest import mock

import counting
import problems
import torch
from floors import PairProblem, Problem

TIMEOUT_S = 300
# every block past 64 KiB becomes a mapping of its own, which leaves resident memory when it is freed
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def peak_bytes(case: str, problem: Problem | PairProblem, impl: str, mode: str, dtype: str, **extra: object) -> int:
    """Resident memory, measured in a fresh process."""
    job = (problems.SUBJECTS[case], problem, impl, mode, problems.DTYPES[dtype], extra)
    with mock.patch.dict(os.environ, ALLOCATOR), multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply_async(resident_peak, job).get(TIMEOUT_S)


def resident_peak(build, problem: Problem | PairProblem, impl: str, mode: str, dtype: torch.dtype, extra) -> int:
    build(problems.shrunk(problem), impl, mode, dtype, "cpu").run()  # loads libraries, starts threads
    subject = build(problem, impl, mode, dtype, "cpu", **extra)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the high-water mark
    # getrusage's mark would include the process that started this one
    before = kernel_figure("/proc/self/status", "VmHWM")
    subject.run()
    return kernel_figure("/proc/self/status", "VmHWM") - before


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
