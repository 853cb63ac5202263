"""Every shipped configuration compiles for its target: no spills, enough shared memory, matrix instructions."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")
REPORT = Path(__file__).parent.parent / "benchmarks" / "aot_report.py"
TARGETS = ["sm_90", "sm_80", "sm_86", "sm_100", "gfx942"]  # the longest first


def report(target):
    """In its own process, as the interpreter cannot compile: all cases for one target, a training step for the rest."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(REPORT), "--target", target, *([] if target == "sm_90" else ["--quick"])]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def reports(request):
    """Reports of the selected targets, two at a time."""
    wanted = {item.callspec.params["target"] for item in request.session.items if item.path == request.path}
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(found := [t for t in TARGETS if t in wanted], pool.map(report, found)))


@pytest.mark.parametrize("target", TARGETS)
def test_shipped_configurations(target, reports):
    done = reports[target]
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith(target)]
    assert {"image_moments", "pair_sums", "energy_gradient"} <= {name for row in rows for name in row.split()}
