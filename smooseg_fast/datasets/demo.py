"""Open the images that a configuration asks for; without a folder, the embedded demo."""

from __future__ import annotations

from ..config import FIT, TrainConfig
from . import Dataset, open_splits
from .mosaic import Mosaic
from .reading import Reading
from .survey import settle
from .windows import with_note_of_maps, with_windows


def demo_datasets() -> tuple[Mosaic, Mosaic]:
    """Return the (training, held-out) images of the embedded demo."""
    return Mosaic("train", count=128), Mosaic("val", count=48)


def datasets_of(config: TrainConfig) -> tuple[Dataset, Dataset | None]:
    """Return (training images, labelled images to evaluate on, or None).

    Maps are taken in windows, unless the scale brings every image to one size.
    """
    if config.data is None:
        return demo_datasets()
    train, val = settle(*open_splits(config.data, config.ignore), Reading.of(config))
    if config.scale == (FIT,):
        return with_note_of_maps(train), val
    return with_windows(train), None if val is None else with_windows(val)
