"""The embedded demo, and the images that a configuration asks for."""

from __future__ import annotations

from ..config import TrainConfig
from . import Dataset, open_splits
from .mosaic import Mosaic


def demo_datasets() -> tuple[Mosaic, Mosaic]:
    """(train, held out) of the embedded demo."""
    return Mosaic("train", count=128), Mosaic("val", count=48)


def datasets_of(config: TrainConfig) -> tuple[Dataset, Dataset | None]:
    """(training images, labelled images to take figures on or None)."""
    if config.data is None:
        return demo_datasets()
    return open_splits(config.data)
