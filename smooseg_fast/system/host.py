"""What this process asks of the machine it runs on."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# of glibc's mallopt
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 2**31 - 1  # what it takes: a C int


def keep_freed_memory() -> None:
    """Large tensors that come and go every step stay with the process instead of going back to the system each time.

    glibc maps and unmaps blocks beyond 32 MB, and every page of a new map costs a fault: a step of 32 squares on 2 cores took 189 ms, and
    137 without. Only glibc, and only where the user has not set its limits in the environment; harmless elsewhere.
    """
    if platform.libc_ver()[0] != "glibc" or any(
        name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ
    ):
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST)
    libc.mallopt(M_TRIM_THRESHOLD, LARGEST)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Within it operations of PyTorch take their deterministic form, and raise where they have none."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
