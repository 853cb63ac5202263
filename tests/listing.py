"""The photos that a scan of a folder finds, as files."""

from pathlib import Path

from smooseg_fast.datasets.scan import scan


def find_images(path: Path, argument: str = "--data") -> list[Path]:
    found = scan(path, argument)
    return [found.folder / photo for photo in found.photos]
