"""Who measured: the processor or card, its clocks as far as they can be read, versions and commit; what every line of results carries."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import uuid
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RUN = uuid.uuid4().hex[:12]  # one process, one run: ratios are made within it


def describe(device: str = "cpu") -> dict[str, Any]:
    """`device`: "cpu" or "cuda". What cannot be read is None."""
    on_gpu = device == "cuda"
    return {
        "machine": torch.cuda.get_device_name() if on_gpu else processor(),
        "device": device,
        "driver": ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if on_gpu else host_memory(),
        "governor": None if on_gpu else first_line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "clock": ask("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader") if on_gpu else clock(),
        "load": None if on_gpu or not hasattr(os, "getloadavg") else round(os.getloadavg()[0], 2),
        "os": platform.platform(terse=True),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "triton", "numpy")},
        **revision(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "run": RUN,
    }


def revision() -> dict[str, Any]:
    """Of the checkout; SMOOSEG_COMMIT names it where the checkout came without its history."""
    named = os.environ.get("SMOOSEG_COMMIT")
    if named:
        return {"commit": named, "dirty": None}
    commit = ask("git", "rev-parse", "HEAD")
    # lines that this very run appends to results are no change of what is measured
    changes = ask("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return {"commit": commit, "dirty": None if commit is None else bool(changes)}


def ask(*command: str) -> str | None:
    """The first line that a program prints; None where it fails, "" where it prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.strip().splitlines() or [""])[0]


def version(package: str) -> str | None:
    try:
        return (
            torch.__version__ if package == "torch" else metadata.version(package)
        )  # the build, too, which the metadata leaves out
    except metadata.PackageNotFoundError:
        return None


def first_line(path: str) -> str | None:
    try:
        return Path(path).read_text().splitlines()[0]
    except (OSError, IndexError):
        return None


def cpu_facts() -> dict[str, str]:
    """/proc/cpuinfo of the first processor; empty elsewhere than on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def processor() -> str:
    return cpu_facts().get("model name") or platform.processor() or platform.machine()


def clock() -> str | None:
    megahertz = cpu_facts().get("cpu MHz")
    return None if megahertz is None else f"{float(megahertz):.0f} MHz"


def host_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
