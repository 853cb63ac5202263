"""Locks on files. The kernel releases them when their process dies, however it dies, so none is left behind."""

from __future__ import annotations

import contextlib
import os
import socket
import weakref
from pathlib import Path

from .files import regular

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class Lock:
    """A lock on the file at `path`: flock, which NFS passes to its server, so other machines respect it too.

    Where there is no locking, or the file can neither be made nor opened, every lock is given and `real` stays False:
    callers must be safe without it, if slower. Processes forked from this one do not hold it.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file: int | None = None

    def __del__(self) -> None:
        self._close()

    @property
    def real(self) -> bool:
        return self._file is not None

    def take(self, *, shared: bool = False) -> bool:
        """Try to take it, without waiting -> whether it was given.

        Many can hold it `shared`, or one alone. Makes the file, and the folder it is in.
        """
        for _ in range(100):
            try:
                self._file = _open(self.path)
                if fcntl is None:
                    break
                fcntl.flock(self._file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(self._file), os.stat(self.path)):
                    _held.add(self)
                    return True
            except FileNotFoundError:
                pass
            except BlockingIOError:
                self._close()
                return False
            except OSError:  # a file system without locks, or a folder that cannot be written
                break
            self._close()  # another process removed the file or its folder, and the next one would lock a new file
        self._close()
        return True

    def release(self, *, remove: bool = False) -> None:
        """Let go of it, if it is held. remove: delete the file first."""
        if self._file is None:
            return
        if remove:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
        fcntl.flock(self._file, fcntl.LOCK_UN)
        self._close()

    def sign(self) -> None:
        """Write the holder's name into the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # another user's file
                os.ftruncate(self._file, 0)
                os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)

    def signature(self) -> str:
        """Return the holder's name, for messages."""
        with contextlib.suppress(OSError):
            return regular(self.path).read_text(errors="replace") or "another process"
        return "another process"

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = None


_held: weakref.WeakSet[Lock] = weakref.WeakSet()


def _forget_all() -> None:
    """Close a child's copies of the files, which would keep the locks when the parent is killed."""
    for lock in list(_held):
        lock._close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


def _open(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except PermissionError:  # another user's file: it can be locked, but not signed
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
