"""Every shipped configuration compiles for its target: no spills, enough shared memory, matrix instructions."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")
REPORT = Path(__file__).parent.parent / "benchmarks" / "aot_report.py"
TARGETS = ["sm_90", "sm_80", "sm_86", "sm_100", "gfx942"]  # the longest first


def report(target, folder):
    """In its own process, as the interpreter cannot compile: all cases for one target, a training step for the rest."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(REPORT), "--target", target, "--csv", str(folder / f"{target}.csv")]
    command += [] if target == "sm_90" else ["--quick"]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("aot")


@pytest.fixture(scope="module")
def reports(request, folder):
    """Reports of the selected targets, two at a time."""
    selected = {item.callspec.params["target"] for item in request.session.items if item.path == request.path}
    targets = [target for target in TARGETS if target in selected]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(targets, pool.map(lambda target: report(target, folder), targets)))


@pytest.mark.parametrize("target", TARGETS)
def test_shipped_configurations(target, reports, folder):
    done = reports[target]
    assert done.returncode == 0, done.stdout + done.stderr
    with (folder / f"{target}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {"image_moments", "pair_sums", "energy_gradient"} <= {row["kernel"] for row in rows}
    assert all(row["faults"] == "" and int(row["spills"]) == 0 and int(row["registers"]) > 0 for row in rows)
    assert all(0 <= int(row["shared"]) <= int(row["shared_limit"]) for row in rows)
