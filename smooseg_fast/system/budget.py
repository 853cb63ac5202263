"""A number of bytes that the threads of this process share: those who would exceed it wait for each other."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Budget:
    """At most `limit` bytes are taken at once; what is larger than all of it goes alone."""

    def __init__(self, limit: int):
        self.limit, self.taken = limit, 0
        self._changed = threading.Condition()

    @contextmanager
    def take(self, nbytes: int) -> Iterator[None]:
        """Wait until `nbytes` more fit, or nobody else has any, and hold them. Not for a thread that holds some."""
        with self._changed:
            self._changed.wait_for(lambda: not self.taken or self.taken + nbytes <= self.limit)
            self.taken += nbytes
        try:
            yield
        finally:
            with self._changed:
                self.taken -= nbytes
                self._changed.notify_all()
