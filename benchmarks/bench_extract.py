"""Features of 1024 x 512 JPEGs: extraction next to the backbone alone, for a ViT and a backbone without cost."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import problems  # noqa: F401  # puts this checkout first
import pytest
import torch
from PIL import Image
from torch import Tensor

from smooseg_fast.backbones import Backbone, load_backbone
from smooseg_fast.datasets import open_dataset
from smooseg_fast.datasets.images import cut_squares, read_image
from smooseg_fast.features.extract import open_or_extract
from smooseg_fast.features.job import FeatureOptions
from smooseg_fast.features.store import to_storage

BATCH, DISTINCT, QUALITY = 16, 16, 90  # files beyond DISTINCT repeat earlier ones
SMOKE = {"images": 3, "height": 48, "width": 96, "pixels": 32}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("crops", "images"), [("center", 32), ("slide", 6)])  # one square a photo, five that slide
def bench_extraction_with_a_vit(crops, images, dtype, bench, tmp_path):
    backbone = random_vit(tmp_path / "vit", bench.device, dtype, bench.smoke)
    alternate(bench, "vit_s8" if crops == "center" else f"vit_s8_{crops}", images, backbone, dtype, tmp_path, crops)


def bench_extraction_with_a_trivial_backbone(bench, tmp_path):
    alternate(bench, "mean_colours", 256, Pooled(bench.device), "float32", tmp_path)


def alternate(bench, shape, images, backbone, dtype, place, crops="center"):
    """Times both ways over the same photos; AssertionError where their features differ."""
    sizes = SMOKE if bench.smoke else {"images": images, "height": 512, "width": 1024, "pixels": 224}
    write_photos(place / "photos", sizes)
    dataset = open_dataset(place / "photos", "train")
    cut = [cut_squares(read_image(path), sizes["pixels"], crops) for path in dataset.images]
    squares = torch.from_numpy(np.stack([square for one in cut for _, square in one])).permute(0, 3, 1, 2)
    batches = [batch.contiguous().to(backbone.device) for batch in squares.split(BATCH)]
    cache = place / "cache"
    options = FeatureOptions(size=sizes["pixels"], crops=crops, batch_size=BATCH, progress=False, cache=cache)

    def backbone_alone() -> list[Tensor]:
        """The same batches from memory; features stay on the device."""
        features = [backbone(batch)[0] for batch in batches]
        if backbone.device.type == "cuda":
            torch.cuda.synchronize()
        return features

    def extraction() -> Tensor:
        """From files into a new cache."""
        return open_or_extract(dataset, backbone, options).load()

    def tidy() -> None:
        shutil.rmtree(cache, ignore_errors=True)

    by_hand = to_storage(torch.cat([features.cpu() for features in backbone_alone()]))
    assert torch.equal(extraction(), by_hand), "the store differs from the backbone called by hand"
    tidy()
    runs = {"backbone alone": backbone_alone, "extraction": extraction}
    bench.alternating("extract", shape, sizes, runs, dtype, between=tidy)


def write_photos(folder: Path, sizes: dict[str, int]) -> None:
    folder.mkdir(parents=True)
    for number in range(sizes["images"]):
        path, first = folder / f"{number:05d}.jpg", folder / f"{number % DISTINCT:05d}.jpg"
        if path == first:
            Image.fromarray(photo(number, sizes["height"], sizes["width"])).save(path, quality=QUALITY)
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
