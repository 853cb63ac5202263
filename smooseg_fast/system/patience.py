"""How often a store is asked again, how long it is waited for, and the errors that this leaves."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from tarfile import TarError
from typing import Any, TypeVar
from zipfile import BadZipFile

from ..errors import UserError

TRIES, WAIT_S = 4, 0.5  # the pauses double
PATIENCE_S = 120.0  # after which nothing is tried again
S3_TRIES = 2  # of s3fs itself, in place of its 5 in 5: `tried` tries, too
CONNECT_S, READ_S = 20.0, 60.0  # of a server that says nothing
# errors of their packages that another try does not change
SETTINGS = {
    "NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ConfigParseError", "ParamValidationError",
    "InvalidRegionError", "DefaultCredentialsError", "RefreshError",
}  # fmt: skip

Result = TypeVar("Result")


class StoreError(OSError):
    """A store does not give a file, or does not take it, after TRIES."""


def patience(protocol: str) -> dict[str, Any]:
    """How long the package of a protocol waits and how often it tries, because `tried` tries, too. The user's own
    settings in ~/.config/fsspec win."""
    from fsspec.config import conf

    if protocol in ("http", "https"):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=READ_S)
        options: dict[str, Any] = {"client_kwargs": {"timeout": timeout}}
    elif protocol in ("s3", "s3a"):
        config = {"connect_timeout": CONNECT_S, "read_timeout": READ_S, "retries": {"max_attempts": 0}}
        options = {"config_kwargs": config}
    else:
        options = {}
    return {name: value for name, value in options.items() if name not in conf.get(protocol, {})}


def reason(error: BaseException) -> str:
    """Says in one line what went wrong."""
    text = " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
    return text if len(text) <= 200 else text[:197] + "..."


def tried(action: Callable[[], Result]) -> Result:
    """The result of `action`, which is repeated up to TRIES times within PATIENCE_S where a connection breaks.

    FileNotFoundError, PermissionError and ImportError at once; StoreError, an OSError too, when it fails for good.
    """
    started = time.monotonic()
    for attempt in range(1, TRIES + 1):
        try:
            return action()
        except (FileNotFoundError, PermissionError, ImportError, UserError):
            raise
        except (ValueError, NotImplementedError, BadZipFile, TarError):  # asking again is useless
            raise
        except Exception as error:  # each store has errors of its own
            status = status_of(error)
            refused = type(error).__name__ in SETTINGS or (400 <= status < 502 and status not in (408, 429, 500))
            if refused or attempt == TRIES or time.monotonic() - started > PATIENCE_S:
                times = f", {attempt} times" if attempt > 1 else ""
                raise StoreError(errno.EIO, f"{reason(error)}{times}") from error
            time.sleep(WAIT_S * 2 ** (attempt - 1))
    raise AssertionError("unreachable")


def status_of(error: BaseException | None) -> int:
    """The HTTP status of an error or of what caused it; 0 without one."""
    while error is not None:
        answer = getattr(error, "response", None)
        known = [getattr(error, "status", None), getattr(error, "code", None), getattr(answer, "status_code", None)]
        if isinstance(answer, dict):  # of botocore
            known.append(answer.get("ResponseMetadata", {}).get("HTTPStatusCode"))
        if status := next((number for number in known if isinstance(number, int)), 0):
            return status
        error = error.__cause__
    return 0
