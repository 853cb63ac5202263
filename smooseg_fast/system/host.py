"""Settings of the process on its machine: memory that stays, and operations that rerun bit for bit."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # options of glibc's mallopt
LARGEST_BYTES = 2**31 - 1  # a C int


def keep_freed_memory() -> None:
    """Keep the memory of large tensors that come and go every step, instead of returning it to the system each time.

    glibc maps and unmaps blocks beyond 32 MB, and every page of a new map costs a fault: a step of 32 squares on 2
    cores took 189 ms with them, and 137 without. Does nothing without glibc, or when the environment sets its limits.
    """
    tuned_by_user = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if platform.libc_ver()[0] == "glibc" and not tuned_by_user:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, LARGEST_BYTES)


def return_freed_memory() -> None:
    """Return the memory of what was freed to the system: glibc keeps it in pieces between others, and takes new memory
    for what fits into none of them. Takes milliseconds; does nothing without glibc."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def plain_torch() -> Iterator[None]:
    """Give PyTorch its usual state inside, whatever a caller's is: float32 by default, on the CPU, with gradients,
    outside of inference mode and autocast."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with ExitStack() as stack:
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            if torch.get_default_device().type != "cpu":  # else it would only slow every call
                stack.enter_context(torch.device("cpu"))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Make PyTorch's operations take their deterministic form inside, and raise where they have none."""
    before = torch.are_deterministic_algorithms_enabled()
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
