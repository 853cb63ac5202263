"""Who measured: processor or card, clocks, versions and commit; every line of results carries this."""

from __future__ import annotations

import contextlib
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
# ratios are taken within one run: one process, or all those that gpu.py starts
RUN = os.environ.get("SMOOSEG_RUN") or uuid.uuid4().hex[:12]


def describe(device: str = "cpu") -> dict[str, Any]:
    """`device`: "cpu" or "cuda". Values that cannot be read are None."""
    card, cpu = device == "cuda", {} if device == "cuda" else cpu_facts()
    return {
        "machine": torch.cuda.get_device_name() if card else cpu.get("model name") or platform.machine(),
        "device": device,
        "driver": query("driver_version") if card else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if card else host_memory(),
        "governor": None if card else ask("cat", "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "clock": query("clocks.sm,clocks.mem") if card else cpu.get("cpu MHz") and f"{float(cpu['cpu MHz']):.0f} MHz",
        "load": None if card or not hasattr(os, "getloadavg") else round(os.getloadavg()[0], 2),
        "os": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,  # the build too, which the metadata leaves out
        **{name: version(name) for name in ("triton", "numpy")},
        **revision(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "run": RUN,
    }


def revision() -> dict[str, Any]:
    """Commit of this checkout; SMOOSEG_COMMIT gives it for a checkout without its history."""
    if commit := os.environ.get("SMOOSEG_COMMIT"):
        return {"commit": commit, "dirty": None}
    commit = ask("git", "rev-parse", "HEAD")
    # a run appends to results, which does not change the code that it measures
    changes = ask("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return {"commit": commit, "dirty": None if commit is None else bool(changes)}


def ask(*command: str) -> str | None:
    """The first line that a program prints; None where it fails, "" where it prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.strip().splitlines() or [""])[0]


def query(fields: str) -> str | None:
    return ask("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")


def version(package: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)


def cpu_facts() -> dict[str, str]:
    """/proc/cpuinfo of the first processor; empty on systems other than Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def host_memory() -> int | None:
    with contextlib.suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
