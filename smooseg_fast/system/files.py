"""Write files whole or not at all: to a temporary file in the same folder, which is then renamed."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import WriteError

LEFTOVER = re.compile(r"\..+\.\d+\.part(\.\w+)?")  # names of temporary files


def write_atomic(path: str | Path, content: bytes | str | Callable[[Path], None]) -> Path:
    """Write `content` to `path` by one rename. A callable gets the temporary path and writes the file itself.

    The temporary file keeps the suffix, because image libraries choose the format by it. WriteError, naming the path,
    when the disk is full or the folder cannot be written; an earlier file at `path` is then still whole.
    """
    path = Path(path)
    # file systems take names of 255 bytes, and the temporary name must not be longer than a legal one
    temporary = path.with_name(f".{path.stem[:40]}.{os.getpid()}.part{path.suffix}")
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
    """Remove temporary files of killed processes in `folder`, or anywhere `below` it, that are `older` seconds old."""
    for path in folder.glob("**/.*.part*" if below else ".*.part*"):
        with contextlib.suppress(OSError):
            if LEFTOVER.fullmatch(path.name) and time.time() - path.stat().st_mtime >= older:
                path.unlink()


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
