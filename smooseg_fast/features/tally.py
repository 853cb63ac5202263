"""Where the time of an extraction goes: seconds of each stage, and the lines that tell it."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

MAIN = ("backbone", "copy", "write")  # one after another in the thread that runs the backbone
BESIDE = ("read", "decode", "resize")  # in the threads that make squares of files, while the backbone runs


class Tally:
    """Seconds by stage and what was made in them, from several threads.

    Stages of MAIN are on the clock. Of BESIDE, reading is, since it waits for the disk; decoding and resizing are processor time, which
    waiting for a core does not count into.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.squares = self.images = self.threads = 0
        self._lock = threading.Lock()

    def add(self, stage: str, seconds: float) -> None:
        with self._lock:
            self.seconds[stage] += seconds

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - start)

    def shares(self) -> dict[str, float]:
        """Of each stage in the `whole`: those of MAIN and "waiting" (for squares, and what little is left) add up to 1; those of BESIDE
        are of the time that their threads have, and reach 1 together where it is they that hold everything up."""
        whole = self.seconds["whole"] or 1.0
        shares = {stage: self.seconds[stage] / whole for stage in MAIN}
        shares["waiting"] = max(0.0, 1.0 - sum(shares.values()))
        return shares | {stage: self.seconds[stage] / (whole * max(1, self.threads)) for stage in BESIDE}

    def lines(self, how: str) -> list[str]:
        """Throughput, and what it was spent on; `how` in a few words."""
        whole, share = (
            self.seconds["whole"] or 1.0,
            {stage: f"{100 * part:.1f} %" for stage, part in self.shares().items()},
        )
        main = ", ".join(f"{stage} {share[stage]}" for stage in MAIN)
        beside = ", ".join(f"{stage} {share[stage]}" for stage in BESIDE)
        return [
            f"extracted  {self.squares} squares of {self.images} images in {whole:.1f} s: {self.squares / whole:.1f} squares/s, "
            f"{self.images / whole:.1f} images/s, {how}",
            f"time       {main}, waiting for images {share['waiting']}; beside it, of {self.threads} threads: {beside}",
        ]
