"""Files are written whole or not at all: to a neighbour of the same folder, then renamed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import WriteError

LEFTOVER = re.compile(r"\..+\.\d+\.part(\.\w+)?")  # the names that write_atomic gives to what is not whole yet


def write_atomic(path: str | Path, content: bytes | str | Callable[[Path], None]) -> Path:
    """Write `content` to `path` by one rename; a callable is given the temporary path and writes it itself.

    The temporary keeps the suffix, because image libraries choose the format by it. Raises WriteError naming the path when the disk
    is full or the folder cannot be written; whatever stood at `path` before is then still whole.
    """
    path = Path(path)
    # file systems take names of 255 bytes: the temporary must not be longer than what it stands for may be
    temporary = path.with_name(f".{path.stem[:40]}.{os.getpid()}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())  # else a power cut may leave the new name on an empty file
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
    """Remove what processes killed while writing left in `folder`, or anywhere `below` it, when it is `older` seconds old."""
    for path in folder.glob("**/.*.part*" if below else ".*.part*"):
        with contextlib.suppress(OSError):
            if LEFTOVER.fullmatch(path.name) and time.time() - path.stat().st_mtime >= older:
                path.unlink()


def write_json(path: str | Path, value: Any) -> Path:
    """`value` as indented JSON; numbers that JSON has no word for (nan, inf) become null."""
    text = json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n"
    # a file name may hold bytes that are no text; the escape that Python writes for them is also JSON's
    return write_atomic(path, text.encode("utf-8", "backslashreplace"))


def finite(value: Any) -> Any:
    """`value` with every nan and infinity replaced by None, so that any JSON reader takes it."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
