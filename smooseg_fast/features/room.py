"""How much room features will take before there are any, and how a dataset is cut up when that is more than the cache may hold."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..datasets import Dataset
from ..datasets.images import ImageError
from ..errors import UserError
from ..system.sizes import readable
from .cachefolder import CacheFolder
from .job import job_of

if TYPE_CHECKING:
    from ..backbones.base import Backbone

COUNTED = 128  # images whose squares are counted, for the number in the others
MARGIN = 1.05  # for the others having more squares, and for headers


@dataclass(frozen=True)
class Expected:
    """What the features of a dataset take. squares: of an image, on average over COUNTED of them. square_bytes: of one. there: already."""

    images: int
    squares: float
    square_bytes: int
    there: bool

    @property
    def nbytes(self) -> int:
        return math.ceil(MARGIN * self.images * self.squares * self.square_bytes)


@dataclass(frozen=True)
class Windows:
    """count: equal parts of a dataset, of which one is in the cache at a time. steps: of training in each."""

    count: int
    steps: int


def expected(dataset: Dataset, backbone: Backbone, **options: Any) -> Expected:
    """options: of `open_or_extract`, which would make these features. Of several processes all get what the first finds."""
    job = job_of(dataset, backbone, **options)
    N = len(dataset)
    there = CacheFolder(options.get("cache")).store(job.key()).images() == N
    counted = [] if there else [job.decode(k * N // min(COUNTED, N)) for k in range(min(COUNTED, N))]
    squares = sum(0 if isinstance(found, ImageError) else len(found) for found in counted) / max(1, len(counted))
    return job.processes.all(Expected(N, squares, 2 * job.grid[0] * job.grid[1] * backbone.dim, there))[0]


def require_room(dataset: Dataset, backbone: Backbone, *, stores: int = 1, **options: Any) -> None:
    """UserError when features that are needed all at once will not fit the limit, as often as `stores` says."""
    if options.get("limit") is None:
        return
    found = expected(dataset, backbone, **options)
    if not found.there and stores * found.nbytes > options["limit"]:
        raise UserError(
            f"--cache-limit {readable(options['limit'])}: the features of {dataset.name} take about {readable(stores * found.nbytes)}, and "
            "figures need them all; give at least that"
        )


def windows_of(found: Expected, limit: int, in_use: int, batch_size: int) -> Windows | None:
    """None when everything fits below `limit` beside the `in_use` bytes; UserError when not even windows of one batch would."""
    free = limit - in_use
    if found.there or found.nbytes <= free:
        return None
    free -= sample_bytes(found)
    count = math.ceil(found.nbytes / max(1, free))
    most = max(1, int(min(found.images, found.images * found.squares / batch_size)))  # a window has a batch at least
    if count > most:
        least = in_use + sample_bytes(found) + math.ceil(found.nbytes / most)
        raise UserError(
            f"--cache-limit {readable(limit)}: too small; what has to be at hand at once takes at least {readable(least)}, all features "
            f"{readable(in_use + found.nbytes)}, and the more there is room for the better batches are mixed"
        )
    return Windows(count, max(1, round(found.images * found.squares / count / batch_size)))


def sampled(images: int) -> int:
    """Images of a sample that stands for all: as many as the start looks at, and of a small set a part."""
    return min(images, 128, max(2, images // 16))


def sample_bytes(found: Expected) -> int:
    return math.ceil(found.nbytes * sampled(found.images) / found.images)
