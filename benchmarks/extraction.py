"""Features of a folder of JPEGs: from files to a store, next to the backbone alone, on photographs made up for it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import problems  # noqa: F401  # puts this checkout first
import torch
from PIL import Image
from torch import Tensor

from smooseg_fast.backbones import Backbone, load_backbone
from smooseg_fast.datasets import open_dataset
from smooseg_fast.datasets.images import Crops, cut_squares, read_image
from smooseg_fast.features.extract import open_or_extract
from smooseg_fast.features.job import FeatureOptions
from smooseg_fast.features.store import to_storage

BATCH, DISTINCT, QUALITY = 16, 16, 90  # files beyond DISTINCT repeat earlier ones


@dataclass(frozen=True)
class Photos:
    """Sizes of the files, and the side of the squares cut from them."""

    images: int
    height: int = 512
    width: int = 1024
    pixels: int = 224

    def shrunk(self) -> Photos:
        return Photos(3, 48, 96, 32)

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        for number in range(self.images):
            path, first = folder / f"{number:05d}.jpg", folder / f"{number % DISTINCT:05d}.jpg"
            if path == first:
                Image.fromarray(photo(number, self.height, self.width)).save(path, quality=QUALITY)
            else:
                path.write_bytes(first.read_bytes())


def photo(seed: int, height: int, width: int) -> np.ndarray:
    """uint8 [H,W,3] whose JPEG is as large as a camera's: amplitudes of natural images (1/f^1.1), a border, grain."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    amplitude = np.maximum(frequency, 1 / width) ** -1.1

    def field() -> np.ndarray:
        values = np.fft.irfft2(amplitude * np.exp(2j * np.pi * rng.random(amplitude.shape)), (height, width))
        return (values - values.mean()) / values.std()

    light, warm, cold = field(), field(), field()
    light = np.where(field() > 0.3, 0.6 * light + 1, light)
    colours = np.stack([light + 0.3 * warm, light, light + 0.3 * cold], -1)
    return (45 * colours + 120 + rng.normal(0, 2, (height, width, 1))).clip(0, 255).astype(np.uint8)


class Pooled(Backbone):
    """Mean colours: costs next to nothing, so that the pipeline's own speed shows."""

    def __init__(self, device: str) -> None:
        super().__init__(name="mean colours", digest="mean colours", patch=8, dim=3, device=device)

    def extract(self, images: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(images, 8).flatten(2).mT


def random_vit(folder: Path, device: str, dtype: str, tiny: bool) -> Backbone:
    """ViT-S/8 in DINO's shape, with random weights."""
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
    """Two ways over the same photos, each taking all of them once; AssertionError where their features differ."""

    def __init__(self, place: Path, photos: Photos, backbone: Backbone, crops: Crops = "center"):
        self.place, self.photos, self.backbone, self.crops = place, photos, backbone, crops
        photos.write(place / "photos")
        self.dataset = open_dataset(place / "photos", "train")
        cut = [cut_squares(read_image(path), photos.pixels, crops) for path in self.dataset.images]
        squares = np.stack([square for one in cut for _, square in one])
        batches = torch.from_numpy(squares).permute(0, 3, 1, 2).split(BATCH)
        self.batches = [batch.contiguous().to(backbone.device) for batch in batches]
        self.caches = iter(range(10**9))
        by_hand = to_storage(torch.cat([features.cpu() for features in self.backbone_alone()]))
        assert torch.equal(self.whole(), by_hand), "the store differs from the backbone called by hand"
        self.tidy()

    def backbone_alone(self) -> list[Tensor]:
        """The same batches from memory; features stay on the device."""
        features = [self.backbone(batch)[0] for batch in self.batches]
        if self.backbone.device.type == "cuda":
            torch.cuda.synchronize()
        return features

    def whole(self) -> Tensor:
        """From files into a new cache."""
        cache = self.place / f"cache {next(self.caches)}"
        options = FeatureOptions(
            size=self.photos.pixels, crops=self.crops, batch_size=BATCH, progress=False, cache=cache
        )
        return open_or_extract(self.dataset, self.backbone, options).load()

    def tidy(self) -> None:
        for cache in self.place.glob("cache *"):
            shutil.rmtree(cache)
