"""`python -m smooseg_fast.predict`: masks, overlays, shares and a contact sheet for any image or folder of images."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm

from . import pictures
from .command import load_segmenter, parse, run
from .errors import UserError
from .files import write_json
from .images import ImageError, find_images
from .signals import Interrupted, StopRequest

SHEET_IMAGES = 24
THUMBNAIL = 640  # pixels of the long side of what the sheet keeps of an image


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Segment images of any size with a checkpoint."""

    checkpoint: str
    """The checkpoint.safetensors that training wrote."""
    images: str
    """An image, or a folder of images in any nesting."""
    out: str
    """Folder for masks/ (8-bit palette PNG of the image's own size), overlays/, shares.json and sheet.jpg."""
    mirror: Annotated[bool, tyro.conf.FlagCreatePairsOff] = True
    """Average the codes of an image with those of its mirror image, as the paper does; --no-mirror takes half the time."""
    short_side: int | None = None
    """Pixels that an image's short side is brought to before features are taken [the checkpoint's]; larger sees finer detail."""
    backbone: str | None = None
    """Needed where the checkpoint was trained on a module:callable; else the one it names."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps or auto."""


def main(args: Sequence[str]) -> None:
    config = parse(PredictConfig, args, prog="python -m smooseg_fast.predict")
    segmenter = load_segmenter(config.checkpoint, config.backbone, config.device)
    root = Path(config.images).expanduser()
    files = images_below(root)
    top = root if root.is_dir() else root.parent
    out = Path(config.out).expanduser()
    colours = pictures.palette(segmenter.groups)
    names = output_names([file.relative_to(top) for file in files])
    shares: dict[str, dict[str, float]] = {}
    skipped: dict[str, str] = {}
    sheet: list[tuple[str, np.ndarray, np.ndarray, np.ndarray]] = []
    wanted = set(np.linspace(0, len(files) - 1, min(len(files), SHEET_IMAGES)).round().astype(int).tolist())

    with tqdm(total=len(files), desc="predict", unit="image", dynamic_ncols=True) as bar, StopRequest() as stop:
        for place, (file, name) in enumerate(zip(files, names)):
            if stop.number is not None:
                break
            try:
                image = segmenter.pixels(file)
                labels = segmenter.predict(image, mirror=config.mirror, short_side=config.short_side).astype(np.uint8)
            except ImageError as error:
                skipped[file.relative_to(top).as_posix()] = error.reason
                tqdm.write(f"skipped: {error}", file=sys.stderr)
                bar.update()
                continue
            pictures.write_mask(out / "masks" / f"{name}.png", labels, colours)
            over = pictures.overlay(image, labels, colours)
            pictures.save(out / "overlays" / f"{name}.jpg", over)
            counts = np.bincount(labels.ravel(), minlength=segmenter.groups)
            shares[file.relative_to(top).as_posix()] = {str(k): round(float(n) / labels.size, 6) for k, n in enumerate(counts) if n}
            if place in wanted:
                flat = pictures.overlay(image, labels, colours, 1.0)
                sheet.append((file.relative_to(top).as_posix(), *map(thumbnail, (image, over, flat))))
            bar.update()
    if not shares and stop.number is None:
        raise UserError(
            f"--images {root}: none of the {len(files)} images can be used; first {next(iter(skipped))}: {next(iter(skipped.values()))}"
        )

    whole = Counter()
    for each in shares.values():
        whole.update(each)
    mean = {k: round(whole[k] / max(1, len(shares)), 6) for k in sorted(whole, key=int)}
    described = {"checkpoint": config.checkpoint, **segmenter.describe()}
    write_json(out / "shares.json", {"groups": segmenter.groups, "mean": mean, "images": shares, "skipped": skipped, "model": described})
    if sheet:
        pictures.save(out / "sheet.jpg", draw_sheet(sheet, colours, mean))
    done = f"{len(shares)} of {len(files)} images" + (f", {len(skipped)} could not be used" if skipped else "")
    if stop.number is not None:
        print(f"interrupted after {done}; what is done is in {out}")
        raise Interrupted(stop.number)
    print(f"segmented {done}")
    print(f"masks {out / 'masks'}, overlays {out / 'overlays'}, shares of each group {out / 'shares.json'}")
    print(f"look at {out / 'sheet.jpg'}")


def images_below(root: Path) -> list[Path]:
    """The image files at or below `root`, without the masks of a labelled layout. UserError when none is left."""
    found = find_images(root, "--images")
    files = [file for file in found if not is_label(file, root)]
    if not files:
        raise UserError(
            f"--images {root}: all {len(found)} image files in it are masks, below a labels/ that stands beside an images/; "
            "give the folder that holds the pictures"
        )
    return files


def is_label(file: Path, root: Path) -> bool:
    """Whether a file is a mask of the labelled layout: below a labels/ that stands beside an images/."""
    inside = [parent for parent in file.parents if parent != root and root in parent.parents]
    return any(parent.name == "labels" and (parent.parent / "images").is_dir() for parent in inside)


def output_names(files: list[Path]) -> list[str]:
    """Names without suffix for what is written; a.jpg and a.png beside each other keep theirs."""
    stems = Counter(file.with_suffix("").as_posix() for file in files)
    return [file.as_posix() if stems[file.with_suffix("").as_posix()] > 1 else file.with_suffix("").as_posix() for file in files]


def thumbnail(image: np.ndarray) -> np.ndarray:
    small = Image.fromarray(image)
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return np.asarray(small)


def draw_sheet(shown: list, colours: np.ndarray, mean: dict[str, float]) -> Image.Image:
    legend = [(tuple(colours[int(k)]), f"{k}  {100 * share:.0f} %") for k, share in mean.items() if share >= 0.005]
    half = (len(shown) + 1) // 2 if len(shown) > 3 else len(shown)
    left, right = shown[:half], shown[half:]
    rows = [[*a[1:], *(right[i][1:] if i < len(right) else ())] for i, a in enumerate(left)]
    titles = ["   |   ".join([a[0]] + ([right[i][0]] if i < len(right) else [])) for i, a in enumerate(left)]
    columns = ["image", "groups over it", "groups"] * (2 if right else 1)
    return pictures.contact_sheet(rows, columns, titles, legend, f"{len(shown)} images, {len(mean)} groups")


if __name__ == "__main__":
    sys.exit(run(main))
