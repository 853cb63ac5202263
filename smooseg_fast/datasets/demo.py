"""Open the images that a configuration asks for; without a folder, the embedded demo."""

from __future__ import annotations

from ..config import TrainConfig
from . import Dataset, open_splits
from .mosaic import Mosaic
from .reading import Reading
from .survey import settle


def demo_datasets() -> tuple[Mosaic, Mosaic]:
    """Return the (training, held-out) images of the embedded demo."""
    return Mosaic("train", count=128), Mosaic("val", count=48)


def datasets_of(config: TrainConfig) -> tuple[Dataset, Dataset | None]:
    """Return (training images, labelled images to evaluate on, or None)."""
    if config.data is None:
        return demo_datasets()
    return settle(*open_splits(config.data, config.ignore), Reading.of(config))
