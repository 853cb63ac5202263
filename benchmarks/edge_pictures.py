"""docs/pictures/edges.jpg: crops of pictures whose labels follow the edges in every way, side by side.

    pip download --no-deps scikit-image && unzip scikit_image-*.whl "skimage/data/*"
    python benchmarks/edge_pictures.py skimage/data

coffee.png (Rachel Michetti) is CC0 and rocket.jpg (SpaceX) in the public domain; the third picture is the embedded
demo's. Seven groups of four photos, learnt with efficientnet-lite0; the demo with its own preset.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import smooseg_fast  # noqa: E402
from smooseg_fast.datasets.mosaic import Mosaic  # noqa: E402
from smooseg_fast.segment.colours import palette  # noqa: E402
from smooseg_fast.segment.segmenter import Segmenter  # noqa: E402
from smooseg_fast.show.lettering import font_for  # noqa: E402
from smooseg_fast.show.overlays import overlay  # noqa: E402

WAYS = ("none", "guided", "joint", "crf")
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
CROPS = {"coffee.png": (170, 290), "rocket.jpg": (150, 170)}  # top and left
CELL, GAP, HEAD = 220, 6, 26  # pixels


def main(folder: Path) -> None:
    arrays = [np.array(Image.open(folder / name).convert("RGB")) for name in PHOTOS]
    options = {"progress": False, "say": print, "seed": 0}
    photos = smooseg_fast.fit(arrays, crops="slide", groups=7, backbone="efficientnet-lite0", **options)
    drawn = Mosaic("train", count=64)
    demo = smooseg_fast.fit([drawn.picture(n).pixels for n in range(64)], preset_name="demo", **options)
    rows = [row(photos, arrays[PHOTOS.index(name)], place) for name, place in CROPS.items()]
    rows.append(row(demo, Mosaic("val", count=1).picture(0).pixels, (0, 0)))
    sheet = Image.new("RGB", (rows[0].width, HEAD + sum(part.height + GAP for part in rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(("image", *WAYS)):
        draw.text((column * (CELL + GAP) + 4, 4), title, "black", font_for(title, 16))
    for number, part in enumerate(rows):
        sheet.paste(part, (0, HEAD + number * (CELL + GAP)))
    sheet.save(ROOT / "docs/pictures/edges.jpg", quality=82)


def row(segmenter: Segmenter, image: np.ndarray, place: tuple[int, int]) -> Image.Image:
    """A crop of a picture, and its labels in every way over it."""
    part = tuple(slice(start, start + CELL) for start in place)
    shown = [image] + [overlay(image, segmenter.predict(image, refine=way), palette(256)) for way in WAYS]
    strip = Image.new("RGB", (len(shown) * (CELL + GAP) - GAP, CELL), "white")
    for number, picture in enumerate(shown):
        strip.paste(Image.fromarray(np.asarray(picture)[part]), (number * (CELL + GAP), 0))
    return strip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
