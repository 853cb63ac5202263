"""Features of a folder of JPEGs: the whole way from files to a store, and its parts alone."""

from __future__ import annotations

import functools
import multiprocessing
import shutil
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import problems  # noqa: F401  # puts this checkout first
import torch
from photos import make_photos
from torch import Tensor

from smooseg_fast.backbones import Backbone, load_backbone
from smooseg_fast.datasets import open_dataset
from smooseg_fast.datasets.images import Crops, cut_squares, read_image
from smooseg_fast.features.extract import open_or_extract
from smooseg_fast.features.job import FeatureOptions
from smooseg_fast.features.store import to_storage

BATCH = 16


@dataclass(frozen=True)
class Photos:
    """Which files, and which square of each."""

    images: int
    height: int = 512
    width: int = 1024
    pixels: int = 224

    def shrunk(self) -> Photos:
        return Photos(3, 48, 96, 32)


class Pooled(Backbone):
    """Mean colours of patches: a backbone that costs next to nothing."""

    def __init__(self, device: str) -> None:
        super().__init__(name="mean colours", digest="mean colours", patch=8, dim=3, device=device)

    def extract(self, images: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(images, 8).flatten(2).mT


def random_vit(folder: Path, device: str, dtype: str, tiny: bool) -> Backbone:
    """ViT-S/8 as DINO has it, with random weights."""
    import transformers

    sizes = dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536)
    if tiny:
        sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    if not folder.exists():
        torch.manual_seed(0)
        config = transformers.ViTConfig(**sizes, image_size=224, patch_size=8)
        transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    return load_backbone(str(folder), device, dtype)


class Extraction:
    """Runs over the same photos: each takes all of them once."""

    def __init__(self, place: Path, photos: Photos, backbone: Backbone, crops: Crops = "center"):
        self.place, self.photos, self.backbone, self.crops = place, photos, backbone, crops
        self.folder = place / f"{photos.images} photos"
        if not self.folder.exists():
            make_photos(self.folder, photos.images, photos.height, photos.width)
        self.dataset = open_dataset(self.folder, "train")
        squares = np.stack(
            [
                square
                for path in self.dataset.images
                for _, square in cut_squares(read_image(path), photos.pixels, crops)
            ]
        )
        batches = torch.from_numpy(squares).permute(0, 3, 1, 2).split(BATCH)
        self.batches = [batch.contiguous().to(backbone.device) for batch in batches]
        self.caches = iter(range(10**9))

    def backbone_alone(self) -> list[Tensor]:
        """The same batches, from memory; what it gives stays where it is."""
        found = [self.backbone(batch)[0] for batch in self.batches]
        if self.backbone.device.type == "cuda":
            torch.cuda.synchronize()
        return found

    def whole(self) -> Tensor:
        """Into a cache of its own."""
        cache = self.place / f"cache {next(self.caches)}"
        options = FeatureOptions(
            size=self.photos.pixels, crops=self.crops, batch_size=BATCH, progress=False, cache=cache
        )
        return open_or_extract(self.dataset, self.backbone, options).load()

    def check(self) -> None:
        """AssertionError unless the store has what the backbone gives by hand. Caches are removed."""
        wanted = to_storage(torch.cat([features.cpu() for features in self.backbone_alone()]))
        assert torch.equal(self.whole(), wanted), "the store differs from the backbone called by hand"
        self.tidy()

    def tidy(self) -> None:
        for cache in self.place.glob("cache *"):
            shutil.rmtree(cache)


def first_square(path: Path, pixels: int) -> np.ndarray:
    return cut_squares(read_image(path), pixels, "center")[0][1]


class Decoding:
    """Files to squares and nothing else, by one thread, several, or several processes, as many as there are cores."""

    def __init__(self, extraction: Extraction, workers: int):
        self.paths, self.pixels, self.workers = extraction.dataset.images, extraction.photos.pixels, workers

    def one_thread(self) -> None:
        for path in self.paths:
            first_square(path, self.pixels)

    def pool(self, kind: Callable[[int], Executor]) -> tuple[Executor, Callable[[], None]]:
        """The workers, warm, and the run."""
        executor = kind(self.workers)
        list(executor.map(first_square, self.paths[: 4 * self.workers], [self.pixels] * 4 * self.workers))
        return executor, lambda: list(executor.map(first_square, self.paths, [self.pixels] * len(self.paths))) and None


# a fork of a process with threads may hang
POOLS = {
    "threads": ThreadPoolExecutor,
    "processes": functools.partial(ProcessPoolExecutor, mp_context=multiprocessing.get_context("spawn")),
}
