"""Foretell how much room features will take, and cut a dataset into windows where the cache may hold less."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..datasets import Dataset
from ..datasets.images import ImageError
from ..errors import UserError
from ..system.progress import announced
from ..system.sizes import readable
from .job import FeatureOptions, Job

if TYPE_CHECKING:
    from ..backbones.base import Backbone

COUNTED = 128  # images whose squares are counted, to foretell the number in the others
MARGIN = 1.05  # for headers, and because the other images may have more squares


@dataclass(frozen=True)
class Expected:
    """How much the features of a dataset take on disk."""

    images: int
    squares: float  # of an image, the mean over COUNTED images
    square_bytes: int  # of the features of one square

    @property
    def nbytes(self) -> int:
        return math.ceil(MARGIN * self.images * self.squares * self.square_bytes)


@dataclass(frozen=True)
class Windows:
    """Equal parts of a dataset, one of which is in the cache at a time."""

    count: int
    steps: int  # training steps per window


def expected(dataset: Dataset, backbone: Backbone, options: FeatureOptions) -> Expected | None:
    """Foretell what `open_or_extract` would make; None without a limit, and where all is on disk already.

    All processes get the first one's answer.
    """
    if options.limit is None:
        return None
    job, forecast = Job(dataset, backbone, options), None
    if not job.on_disk:
        images = len(dataset)
        counted = min(COUNTED, images)
        what = f"squares in {counted} images of {dataset.name}, to foretell how much their features take"
        with announced(f"counting   {what}"):
            cut = [job.squares(number * images // counted) for number in range(counted)]
        squares = sum(len(result) for result in cut if not isinstance(result, ImageError))
        forecast = Expected(images, squares / counted, job.square_bytes)
    return options.processes.all(forecast)[0]


def require_room(
    dataset: Dataset, backbone: Backbone, options: FeatureOptions, *, stores: int = 1, in_use: int = 0
) -> None:
    """UserError when features that are needed all at once, in as many `stores`, will not fit below `options.limit`.

    in_use: bytes of the cache that have to stay.
    """
    limit, forecast = options.limit, expected(dataset, backbone, options)
    if limit is not None and forecast is not None and stores * forecast.nbytes + in_use > limit:
        raise UserError(
            f"--cache-limit {readable(limit)}: the features of {dataset.name} take about "
            f"{readable(stores * forecast.nbytes)} and are needed all at once; "
            f"give at least {readable(stores * forecast.nbytes + in_use)}"
        )


def windows_of(forecast: Expected, limit: int, in_use: int, batch_size: int) -> Windows | None:
    """The fewest windows that fit below `limit` next to the `in_use` bytes and a sample; None when everything fits.

    UserError when not even windows of one batch would fit.
    """
    free = limit - in_use
    if forecast.nbytes <= free:
        return None
    sample = math.ceil(forecast.nbytes * sampled(forecast.images) / forecast.images)
    free -= sample
    count = math.ceil(forecast.nbytes / max(1, free))
    batches = forecast.images * forecast.squares / batch_size
    most = max(1, int(min(forecast.images, batches)))  # a window has at least one batch
    if count > most:
        least = in_use + sample + math.ceil(forecast.nbytes / most)
        raise UserError(
            f"--cache-limit {readable(limit)}: too small; a run needs at least {readable(least)} at a time, and all "
            f"features take {readable(in_use + forecast.nbytes)}; more room mixes batches better"
        )
    return Windows(count, max(1, round(batches / count)))


def sampled(images: int) -> int:
    """Images in a sample that stands for all `images`: as many as the start looks at, fewer for a small set."""
    return min(images, 128, max(2, images // 16))
