"""Files that note how long the thread that reads them spends in it, so that reading and decoding can be told apart."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


class Spent(NamedTuple):
    """Seconds so far of one thread in reads: on the clock, and of them those of the processor."""

    clock: float = 0.0
    processor: float = 0.0


def spent() -> Spent:
    """Of this thread."""
    return getattr(_here, "spent", Spent())


def opened(path: Path | str) -> io.BufferedReader:
    return io.BufferedReader(_Timed(path))


_here = threading.local()


@contextmanager
def _noted() -> Iterator[None]:
    clock, processor = time.perf_counter(), time.thread_time()
    try:
        yield
    finally:
        before = spent()
        _here.spent = Spent(
            before.clock + time.perf_counter() - clock, before.processor + time.thread_time() - processor
        )


class _Timed(io.FileIO):
    def readinto(self, buffer: bytearray) -> int | None:
        with _noted():
            return super().readinto(buffer)

    def readall(self) -> bytes:
        with _noted():
            return super().readall()
