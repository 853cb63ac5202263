"""Pictures of two textures, an obvious segmentation."""

import numpy as np
from PIL import Image


def draw(seed, height=72, width=96):
    """Two textures side by side, and where they are."""
    rng = np.random.default_rng(seed)
    label = np.zeros((height, width), np.uint8)
    label[:, width // 2 + int(rng.integers(-10, 10)) :] = 1
    stripes = 90 + 80 * np.sin(np.arange(width) / 1.5)[None].repeat(height, 0)
    image = np.where(label == 1, stripes, 60)[..., None] + rng.normal(0, 8, (height, width, 3))
    return image.clip(0, 255).astype(np.uint8), label


def make_photos(folder):
    """Six pictures in two folders."""
    for number in range(6):
        (folder / "sub").mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw(number)[0]).save(folder / ("sub" if number % 2 else ".") / f"{number}.png")
    return folder
