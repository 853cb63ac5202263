"""What this process asks of the machine it runs on."""

from __future__ import annotations

import ctypes
import os
import platform

import torch

# of glibc's mallopt
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 2**31 - 1  # what it takes: a C int


def keep_freed_memory() -> None:
    """Large tensors that come and go every step stay with the process instead of going back to the system each time.

    glibc maps and unmaps blocks beyond 32 MB, and every page of a new map costs a fault: a step of 32 squares on 2 cores took 189 ms, and
    137 without. Only glibc, and only where the user has not set its limits in the environment; harmless elsewhere.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST)
    libc.mallopt(M_TRIM_THRESHOLD, LARGEST)


def make_deterministic() -> None:
    """Operations of PyTorch without a deterministic form raise from here on; matrix products on a GPU get a workspace of their own."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
