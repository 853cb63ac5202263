"""Who measured: processor or card, clocks, versions and commit; every line of results carries this."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import uuid
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
# ratios are taken within one run: one process, or all those that gpu.py starts
RUN = os.environ.get("SMOOSEG_RUN") or uuid.uuid4().hex[:12]


def describe(device: str = "cpu") -> dict[str, Any]:
    """`device`: "cpu" or "cuda". Values that cannot be read are None."""
    card = device == "cuda"
    return {
        "machine": torch.cuda.get_device_name() if card else cpu_figure("model name") or platform.machine(),
        "device": device,
        "driver": card_figure("driver_version") if card else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": card_figure("clocks.sm,clocks.mem") if card else cpu_figure("cpu MHz"),  # a processor's in MHz
        "load": None if card or not hasattr(os, "getloadavg") else round(os.getloadavg()[0], 2),
        "os": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,  # the build too, which the metadata leaves out
        "triton": metadata.version("triton") if util.find_spec("triton") else None,
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


def card_figure(fields: str) -> str | None:
    return ask("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")


def cpu_figure(name: str) -> str | None:
    """A line of the first processor on Linux."""
    line = ask("grep", "-m1", name, "/proc/cpuinfo")
    return line and line.partition(":")[2].strip()
