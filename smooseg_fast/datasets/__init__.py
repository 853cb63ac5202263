"""Datasets as they lie on disk: folders of images in any nesting, and the layouts of those who publish benchmarks."""

from __future__ import annotations

from pathlib import Path

from .arrays import ArrayDataset
from .base import IGNORE, Dataset, Layout, Split
from .folder import ImageFolder, open_folder, open_folder_splits

__all__ = ["IGNORE", "ArrayDataset", "Dataset", "ImageFolder", "Layout", "Split", "open_dataset", "open_splits"]


def open_dataset(path: Path | str, split: Split) -> Dataset:
    return open_folder(path, split)


def open_splits(path: Path | str) -> tuple[Dataset, Dataset | None]:
    """(training images, the images of `path` to take figures on): the latter where either of the two has labels, else None.

    Errors are those of `open_dataset`.
    """
    return open_folder_splits(path)
