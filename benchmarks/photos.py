"""Made-up photographs on disk: smooth shapes with edges and grain, whose JPEGs are as large as those of a camera."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

DISTINCT = 16  # pictures that are drawn; files beyond that repeat them
QUALITY = 90


def photo(seed: int, height: int, width: int) -> np.ndarray:
    """uint8 [H,W,3]: amplitudes that fall with frequency as in natural images (1/f^1.1), two layers of light with a border, grain."""
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


def make_photos(folder: Path, count: int, height: int, width: int) -> Path:
    folder.mkdir(parents=True)
    first = [folder / f"{number:05d}.jpg" for number in range(min(count, DISTINCT))]
    for number, path in enumerate(first):
        Image.fromarray(photo(number, height, width)).save(path, quality=QUALITY)
    for number in range(len(first), count):
        (folder / f"{number:05d}.jpg").write_bytes(first[number % len(first)].read_bytes())
    return folder
