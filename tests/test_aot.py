"""Every shipped configuration compiles for its target without spills, within its shared memory, with matrix instructions where a dot is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
REPORT = Path(__file__).parent.parent / "benchmarks" / "aot_report.py"


@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_90", "sm_100", "gfx942"])
def test_shipped_configurations(target):
    """In a process of its own: the interpreter cannot compile. The whole set for one target, a training step's launches for the rest."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(REPORT), "--target", target, *([] if target == "sm_90" else ["--quick"])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith(target)]
    assert {"image_moments", "pair_sums", "energy_gradient"} <= {name for row in rows for name in row.split()}
