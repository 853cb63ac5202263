"""The error of one image that cannot be used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..errors import UserError
from ..system.files import open_binary
from ..system.patience import StoreError, remedy
from ..system.stores import Remote, is_url

DEFAULT_ADVICE = "copy it again, export it as 8-bit PNG or JPEG, or take it out"


class ImageError(UserError):
    """One image that cannot be used: its `path`, the `reason` and `advice`. A run may skip the image."""

    def __init__(self, path: Path | str, reason: str, advice: str = DEFAULT_ADVICE):
        super().__init__(f"{path}: {reason}; {advice}")
        self.path = Remote(path) if isinstance(path, str) and is_url(path) else Path(path)
        self.reason, self.advice = reason, advice

    def __reduce__(self) -> tuple:  # so that processes can hand it on
        return ImageError, (self.path, self.reason, self.advice)


def open_image(path: Path | str, *, sparse: bool = False) -> BinaryIO:
    """Open the file of an image for reading. ImageError when a store does not give it; OSError for a local file.

    sparse: little of it will be read.
    """
    try:
        return open_binary(path, sparse=sparse)
    except (StoreError, FileNotFoundError, PermissionError) as error:
        if not is_url(path):
            raise
        if isinstance(error, FileNotFoundError):
            raise ImageError(path, "is gone since the files were listed", "run the command again") from error
        raise not_fetched(path, error) from error


def not_fetched(path: Path | str, error: Exception) -> ImageError:
    """The error of an image that a store does not give."""
    return ImageError(
        path, f"cannot be fetched ({reason(error)})", f"{remedy(str(path), error)}, and run the command again"
    )


def reason(error: Exception) -> str:
    """Say in one line why a file cannot be decoded."""
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]


def undecodable(path: Path | str, error: Exception) -> ImageError:
    """The ImageError for a file at which a decoder raised `error`."""
    if isinstance(error, FileNotFoundError):
        return ImageError(path, "no such file", "check the path")
    if isinstance(error, IsADirectoryError):
        return ImageError(path, "is a folder", "give an image in it")
    return ImageError(path, f"cannot be decoded ({reason(error)})")


@contextmanager
def decoding(path: Path | str) -> Iterator[None]:
    """Raise whatever goes wrong inside as ImageError: a damaged file makes decoders raise nearly anything."""
    try:
        yield
    except ImageError:
        raise
    except StoreError as error:
        raise not_fetched(path, error) from error
    except Exception as error:
        raise undecodable(path, error) from error


def require_bands(asked: int, bands: int, path: Path | str) -> None:
    """ImageError when a file has less than the `asked` bands."""
    if asked > bands:
        how_many = f"{bands} band{'s' * (bands > 1)}"
        raise ImageError(path, f"has {how_many}, no band {asked}", "give --bands that every image has, or take it out")
