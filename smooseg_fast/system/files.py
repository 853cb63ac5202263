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
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import WriteError

# names of temporary files: the host and the process that write them, and the suffix of the file
LEFTOVER = re.compile(r"\..*?(?:\.(?P<host>\d+))?\.(?P<process>\d+)\.part(\.[^.]*)?", re.DOTALL)
HOST = zlib.crc32(socket.gethostname().encode())
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


def write_atomic(path: str | Path, content: bytes | str | Callable[[Path], None]) -> Path:
    """Write `content` to `path` by one rename. A callable gets the temporary path and writes the file itself.

    The temporary file keeps the suffix, because image libraries choose the format by it. WriteError, naming the path,
    when the disk is full or the folder cannot be written; an earlier file at `path` is then still whole.
    """
    path = Path(path)
    # file systems take names of 255 bytes, and the temporary name must not be longer than a legal one
    temporary = path.with_name(f".{path.stem[:40]}.{HOST}.{os.getpid()}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
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
    return path


def sweep(folder: Path, *, below: bool = False, older: float = 0.0) -> None:
    """Remove temporary files of killed processes in `folder`, or anywhere `below` it.

    Those younger than `older` seconds stay, unless their process ran on this machine and is gone.
    """
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
