"""How the threads of a computation wait for each other. Imports no PyTorch: its OpenMP reads this while it loads."""

from __future__ import annotations

import os
import sys

POLICIES = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}  # what OpenMP libraries read


def wait_asleep() -> None:
    """Make PyTorch's threads sleep while they wait for each other.

    By default they spin for milliseconds, on a busy machine often on the very core that the awaited thread needs: next
    to one other busy process a step on two cores took 580 ms instead of 7, and takes 12 with threads that sleep. Does
    nothing in a process that has PyTorch already, or where the environment says how to wait.
    """
    if "torch" not in sys.modules and not POLICIES & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "passive"
