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
REPEATED_S = 25.0  # an attempt of this length was repeated by its package already, as gcsfs does in 31 s
# errors of their packages that another try does not change
SETTINGS = {
    "NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ConfigParseError", "ParamValidationError",
    "InvalidRegionError", "DefaultCredentialsError", "RefreshError",
}  # fmt: skip
# how to log in, by protocol
LOGINS = {
    "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or renew them (aws sso login), or for a "
    "public bucket FSSPEC_S3_ANON=true",
    "gs": "run gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS to a key file",
    "hf": "run hf auth login, or set HF_TOKEN",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
LOGINS |= {"s3a": LOGINS["s3"], "gcs": LOGINS["gs"], "abfs": LOGINS["az"], "abfss": LOGINS["az"]}

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


def remedy(url: str, error: BaseException) -> str:
    """Say what to do about an error of a store: log in, name the region, or check the address."""
    protocol, cause, names = url.partition("://")[0].lower(), error, {type(error).__name__}
    while cause.__cause__ is not None:
        cause = cause.__cause__
        names.add(type(cause).__name__)
    text, status = reason(error), status_of(error)
    if protocol in ("s3", "s3a") and (status == 301 or "region" in text or "InvalidRegionError" in names):
        return "set AWS_DEFAULT_REGION to the region of the bucket"
    if protocol in ("s3", "s3a") and "endpoint" in text.lower():
        return "check AWS_ENDPOINT_URL, which begins with https:// or http://, and the connection"
    denied = status in (400, 401, 403) or "PermissionError" in names or names & SETTINGS or "credentials" in text
    plain = "check the address, the connection and your rights"
    return LOGINS.get(protocol, plain) if denied else plain


def tried(action: Callable[[], Result]) -> Result:
    """The result of `action`, which is repeated up to TRIES times within PATIENCE_S where a connection breaks.

    FileNotFoundError, PermissionError and ImportError at once; StoreError, an OSError too, when it fails for good.
    """
    started = time.monotonic()
    for attempt in range(1, TRIES + 1):
        began = time.monotonic()
        try:
            return action()
        except (FileNotFoundError, PermissionError, ImportError, UserError):
            raise
        except (ValueError, NotImplementedError, BadZipFile, TarError):  # asking again is useless
            raise
        except Exception as error:  # each store has errors of its own
            status, took, kind = status_of(error), time.monotonic() - began, type(error).__name__
            refused = kind in SETTINGS or (300 <= status < 502 and status not in (408, 429, 500))
            repeated = took > REPEATED_S and "Timeout" not in kind
            if refused or repeated or attempt == TRIES or time.monotonic() - started > PATIENCE_S:
                times = f", {attempt} times" if attempt > 1 else ""
                raise StoreError(errno.EIO, f"{reason(error)}{times}") from error
            time.sleep(WAIT_S * 2 ** (attempt - 1))
    raise AssertionError("unreachable")


def status_of(error: BaseException | None) -> int:
    """The HTTP status of an error or of what caused it; 0 without one."""
    while error is not None:
        if reason(error).startswith("Forbidden: "):  # gcsfs, which gives no number
            return 403
        answer = getattr(error, "response", None)
        known = [getattr(error, "status", None), getattr(error, "code", None), getattr(answer, "status_code", None)]
        if isinstance(answer, dict):  # of botocore
            known.append(answer.get("ResponseMetadata", {}).get("HTTPStatusCode"))
        if status := next((number for number in known if isinstance(number, int)), 0):
            return status
        error = error.__cause__
    return 0
