"""Write files whole or not at all: to a temporary file in the same folder, which is then renamed."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import socket
import stat
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..errors import UserError, WriteError
from .stores import File, Remote, bytes_of, is_url, open_store, place, put

# names of temporary files: the host and the process that write them, and the suffix of the file
LEFTOVER = re.compile(r"\..*?(?:\.(?P<host>\d+))?\.(?P<process>\d+)\.part(\.[^.]*)?", re.DOTALL)
HOST = zlib.crc32(socket.gethostname().encode())
SENT_BYTES = 2**26  # from which on a file goes to a store from the disk, in parts
ABANDONED_S = 3600.0  # age at which a temporary file is nobody's, where neither a lock nor its process says so


def regular(path: str | Path) -> Path:
    """`path`, unless opening it could wait without end: OSError for a named pipe, a socket or a device.

    A folder passes, because opening it fails by itself.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return Path(path)
    kind = "a named pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
    raise OSError(errno.EINVAL, f"is {kind}, no file", str(path))


def open_binary(path: str | Path, *, sparse: bool = False) -> BinaryIO:
    """Open a local file, or a file in a store, for reading. OSError when it cannot be opened or could wait without end.

    Files of a store are fetched whole into memory, unless they are large. sparse: little of the file will be read.
    """
    if isinstance(path, Path) or not is_url(path):
        return open(regular(path), "rb")
    file = place(path)
    return open_store(file, sparse=sparse) if isinstance(file, Remote) else open(regular(file), "rb")


def read_text(path: File, errors: str = "strict") -> str:
    """The UTF-8 text of a file. OSError as of `open_binary`; UnicodeDecodeError, but for errors="replace"."""
    with open_binary(path) as file:
        return file.read().decode("utf-8", errors)


def size_of(path: str | Path) -> int:
    """Bytes of a file. OSError when it cannot be read."""
    file = place(path) if is_url(path) else path
    if isinstance(file, Remote):
        return bytes_of(file)
    return os.stat(file).st_size


def state_of(path: str | Path) -> tuple[int | None, int | str] | None:
    """(bytes, time of the last change or what stands for it in a store), which tell a file that changed; None when it
    is gone."""
    if isinstance(path, Remote):
        return path.size, path.stamp
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def write_atomic(path: str | Path, content: bytes | str | Callable[[Path], None], sync: bool = True) -> Path:
    """Write `content` to `path` by one rename. A callable gets the temporary path and writes the file itself.

    The temporary file keeps the suffix, because image libraries choose the format by it. WriteError, naming the path,
    when the disk is full or the folder cannot be written; an earlier file at `path` is then still whole. A store gets
    the whole file in one request, and shows it once all of it is there. Without `sync` a power cut may leave the name
    on an empty file: for what is checked or drawn again by the next command.
    """
    if isinstance(path, Remote):
        _put(path, content)
        return cast(Path, path)
    _write(Path(path), content, sync)
    return Path(path)


def _put(file: Remote, content: bytes | str | Callable[[Path], None]) -> None:
    if callable(content):
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder, f"file{file.suffix}")
            content(temporary)
            if temporary.stat().st_size > SENT_BYTES:
                put(file, temporary)
                return
            content = temporary.read_bytes()
    put(file, content.encode() if isinstance(content, str) else content)


def _write(path: Path, content: bytes | str | Callable[[Path], None], sync: bool) -> None:
    # file systems take names of 255 bytes, and the temporary name must not be longer than a legal one
    temporary = path.with_name(f".{path.stem[:40]}.{HOST}.{os.getpid()}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        if sync:
            with open(temporary, "rb") as handle:
                os.fsync(handle.fileno())  # without it a power cut may leave the new name on an empty file
        os.replace(temporary, path)
    except OSError as error:
        raise WriteError(
            f"{path}: cannot be written ({error.strerror or error}); free some space or choose another folder"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def sweep(folder: File, *, below: bool = False, older: float = 0.0) -> None:
    """Remove temporary files of killed processes in `folder`, or anywhere `below` it.

    Those younger than `older` seconds stay, unless their process ran on this machine and is gone. A store has none.
    """
    if isinstance(folder, Remote):
        return
    for path in folder.glob("**/.*.part*" if below else ".*.part*"):
        with contextlib.suppress(OSError):
            name = LEFTOVER.fullmatch(path.name)
            if name and (time.time() - path.lstat().st_mtime >= older or _is_gone(name)):
                path.unlink()


def _is_gone(name: re.Match[str]) -> bool:
    if name["host"] != str(HOST):
        return False
    try:
        os.kill(int(name["process"]), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        pass
    return False


def write_json(path: str | Path, value: Any) -> Path:
    """Write `value` as indented JSON; NaN and infinity, which JSON lacks, become null."""
    text = json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n"
    # a file name may hold bytes that are not text; Python's escape for them is also JSON's
    return write_atomic(path, text.encode("utf-8", "backslashreplace"))


def finite(value: Any) -> Any:
    """`value` with every NaN and infinity replaced by None, so that any JSON reader takes it."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def default_cache() -> Path:
    """The folder of everything that may be computed again: $XDG_CACHE_HOME/smooseg_fast or ~/.cache/smooseg_fast."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base) / "smooseg_fast"
    try:
        return Path.home() / ".cache" / "smooseg_fast"
    except RuntimeError as error:  # as in a container
        raise UserError("--cache: missing; HOME is not set, and this user has no home folder: give one") from error
