"""Locks on files. The kernel releases them when their process dies, however it dies, so none is left behind."""

from __future__ import annotations

import contextlib
import os
import socket
import weakref
from pathlib import Path

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
        self.path, self.real = path, False
        self._close: weakref.finalize | None = None

    def take(self, *, shared: bool = False) -> bool:
        """Try to take it, without waiting -> whether it was given.

        Many can hold it `shared`, or one alone. Makes the file, and the folder it is in.
        """
        missing = 0
        while True:
            try:
                file = _open(self.path)
            except FileNotFoundError:  # another process removed the folder, or it can never be made
                missing += 1
                if missing == 100:
                    return True
                continue
            except OSError:
                return True
            try:
                if fcntl is None:
                    raise OSError("no locks here")
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                return False
            except OSError:  # a file system without locks
                os.close(file)
                return True
            if _is_at(file, self.path):
                break
            os.close(file)  # its last holder deleted the file, and the next process would lock a new one
        self.real, self._file = True, file
        self._close = weakref.finalize(self, os.close, file)
        _held.add(self)
        return True

    def release(self, *, remove: bool = False) -> None:
        """Let go of it, if it is held. remove: delete the file first."""
        if self._close is None:
            return
        if remove:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
        fcntl.flock(self._file, fcntl.LOCK_UN)
        self._forget()

    def sign(self) -> None:
        """Write the holder's name into the file."""
        if self.real:
            with contextlib.suppress(OSError):  # another user's file
                os.ftruncate(self._file, 0)
                os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)

    def signature(self) -> str:
        """The holder's name, for messages."""
        try:
            return self.path.read_text(errors="replace") or "another process"
        except OSError:
            return "another process"

    def _forget(self) -> None:
        if self._close is not None:
            self._close()
        self.real, self._close = False, None


_held: weakref.WeakSet[Lock] = weakref.WeakSet()


def _forget_all() -> None:
    """Close a child's copies of the files, which would keep the locks when the parent is killed."""
    for lock in list(_held):
        lock._forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


def _open(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except PermissionError as error:  # another user's file: it can be locked, but not signed
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # it does not exist, and trying again would not help
            raise error from None


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except OSError:
        return False
