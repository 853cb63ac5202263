"""`smooseg predict`: masks, overlays, shares and a contact sheet for any image or folder of images."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from tqdm import tqdm

from .command import load_segmenter, printable, run
from .config import Backbone, BackbonePrecision, Device
from .datasets import recognise
from .datasets.images import ImageError, find_images, read_image, read_label
from .errors import UserError
from .system.commandline import parse
from .system.fields import Bounds, Group, Value
from .system.files import write_json
from .system.outfolder import Journal, OutFolder
from .system.progress import Bar
from .system.signals import Interrupted, StopRequest

if TYPE_CHECKING:
    from .segment.segmenter import Segmenter
    from .show.sheet import Shown

SHEET_IMAGES = 24
RUN, DONE, MASKS, OVERLAYS, SHARES, SHEET = (
    "predict.json",
    "done.jsonl",
    "masks",
    "overlays",
    "shares.json",
    "sheet.jpg",
)

Shares = dict[str, float]  # group -> share of an image's pixels


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Segment images of any size with a checkpoint. The same command on the same --out resumes where it was stopped."""

    images: Annotated[str, Group("data"), Value("PATH", usual=True)]
    """An image, or a folder of images in any nesting."""
    checkpoint: Annotated[str, Value("FILE")]
    """The checkpoint.safetensors that training wrote, or a published SmooSeg .ckpt."""
    short_side: Annotated[int | None, Bounds(1, 1 << 16, " pixels")] = None
    """Size in pixels to which the short side of an image is brought before features are taken [the checkpoint's];
    larger sees finer detail."""
    mirror: bool = True
    """Take each image once, which halves the time, instead of averaging its codes with those of its mirror image as the
    paper does."""

    backbone: Annotated[Backbone | None, Group("features")] = None
    """Needed when the checkpoint was trained on a module:callable [the one that the checkpoint names]."""
    backbone_precision: BackbonePrecision = "auto"
    """Number format of a ViT backbone; auto takes one in which the device is fast."""
    device: Device = "auto"
    """cpu, cuda, cuda:1, mps, or auto: a GPU if there is one."""

    out: Annotated[str, Group("output"), Value("FOLDER")]
    """Folder for masks/ (8-bit palette PNG of the image's own size), overlays/, shares.json and sheet.jpg, all of one
    checkpoint."""


@dataclass(frozen=True)
class Item:
    """One image to segment."""

    file: Path
    name: str  # path relative to --images, posix
    stem: str  # of what is written for it, in the folders below --out

    def stamp(self) -> list[str | int] | None:
        """[place, bytes, modification time in ns]: with another stamp it is another image. None when it is gone:
        reading it says so."""
        try:
            status = self.file.stat()
        except OSError:
            return None
        # the place too: sizes and times of uncompressed tiles from an archive are all alike
        return [str(self.file.absolute()), status.st_size, status.st_mtime_ns]


class Predictions(OutFolder):
    """The masks and overlays of one checkpoint and one set of settings, and which images are done. UserError when
    `path` is another's.

    An image's line of done.jsonl comes after its mask and overlay, so what a line names is there whole. The last line
    of a stem counts: the files of that name may have been another image's before.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        super().__init__(path, settings, record=RUN, made=(MASKS, OVERLAYS, SHARES, SHEET), below=(MASKS, OVERLAYS))
        self._journal = Journal(path / DONE)
        self._done = {record.get("stem"): record for record in self._journal.read()}
        self._claimed = False

    def mask(self, item: Item) -> Path:
        return self.path / MASKS / f"{item.stem}.png"

    def overlay(self, item: Item) -> Path:
        return self.path / OVERLAYS / f"{item.stem}.jpg"

    def shares(self, item: Item) -> Shares | None:
        """Of an image that is done and has not changed since; None when it has to be segmented."""
        record = self._done.get(item.stem, {})
        whole = record.get("stamp") == item.stamp() and self.mask(item).is_file() and self.overlay(item).is_file()
        return record.get("shares") if whole else None

    def write(
        self, item: Item, stamp: list[str | int] | None, image: np.ndarray, labels: np.ndarray, colours: np.ndarray
    ) -> Shares:
        """`image` uint8 [H,W,3] with labels uint8 [H,W] is done; `stamp` is from before it was read."""
        from .show import pictures

        if not self._claimed:
            self.claim()
            self._journal.rewrite(self._done.values())
            self._claimed = True
        pictures.save(self.overlay(item), pictures.overlay(image, labels, colours))
        pictures.write_mask(self.mask(item), labels, colours)
        shares = {str(k): round(float(n) / labels.size, 6) for k, n in enumerate(np.bincount(labels.ravel())) if n}
        self._journal.append({"stem": item.stem, "stamp": stamp, "shares": shares})
        return shares


def main(args: Sequence[str]) -> None:
    config = parse(PredictConfig, args, "predict")
    segmenter = load_segmenter(config.checkpoint, config.backbone, config.device, config.backbone_precision)
    root, out = Path(config.images).expanduser(), Path(config.out).expanduser()
    items = items_below(root)
    made = Predictions(out, settings(config, segmenter))
    shares = {item.name: found for item in items if (found := made.shares(item)) is not None}
    if shares:
        print(f"{len(shares)} of {len(items)} images are done in {out}, by this checkpoint and with these settings")
    skipped, stopped = segment(segmenter, config, items, made, shares)
    count = f"{len(shares)} of {len(items)} images" + (f", {len(skipped)} could not be used" if skipped else "")
    if not shares:
        if stopped is not None:
            raise Interrupted(stopped, "no image was done yet")
        name, reason = next(iter(skipped.items()))
        first = f"first: {name}: {reason}"
        raise UserError(
            f"--images {root}: none of the {len(items)} images can be used ({first}); give images that open"
        )

    done = [item for item in items if item.name in shares]
    images = {item.name: shares[item.name] for item in done}
    mean = mean_shares(images.values())
    summary = {
        "groups": segmenter.groups,
        "mean": mean,
        "images": images,
        "skipped": skipped,
        "model": {"checkpoint": config.checkpoint, **segmenter.about()},
    }
    write_json(out / SHARES, summary)
    draw_sheet(out / SHEET, done, made, segmenter, mean)
    if stopped is not None:
        raise Interrupted(stopped, f"{count} are done, in {out}")
    print(f"segmented {count}")
    print(f"masks {out / MASKS}, overlays {out / OVERLAYS}, shares of each group {out / SHARES}")
    print(f"look at {out / SHEET}")


def settings(config: PredictConfig, segmenter: Segmenter) -> dict[str, Any]:
    """What decides the labels of an image."""
    return {
        "checkpoint": f"step {segmenter.checkpoint.step}, {segmenter.digest[:16]}",
        "backbone": segmenter.backbone.digest[:16],
        "mirror": config.mirror,
        "short_side": segmenter.config.eval_size if config.short_side is None else config.short_side,
    }


def segment(
    segmenter: Segmenter, config: PredictConfig, items: Sequence[Item], made: Predictions, shares: dict[str, Shares]
) -> tuple[dict[str, str], int | None]:
    """Everything that is not in `shares` by name, into `made` and `shares`.

    -> (reasons of the images that were skipped, by name; the number of the signal that stopped it, None when all are
    through).
    """
    from .show import pictures

    skipped: dict[str, str] = {}
    colours = pictures.palette(segmenter.groups)
    todo = [item for item in items if item.name not in shares]
    bar = Bar(total=len(items), initial=len(items) - len(todo), desc="predict", unit="image")
    with bar, StopRequest() as stop:
        for item in todo:
            if stop.number is not None:
                return skipped, stop.number
            try:
                stamp, image = item.stamp(), segmenter.pixels(item.file)
                labels = segmenter.predict(image, mirror=config.mirror, short_side=config.short_side).astype(np.uint8)
            except ImageError as error:
                skipped[item.name] = error.reason
                tqdm.write(printable(f"skipped: {item.file}: {error.reason}; {error.advice}"), file=sys.stderr)
            else:
                shares[item.name] = made.write(item, stamp, image, labels, colours)
            bar.update()
    return skipped, None


def mean_shares(shares: Collection[Shares]) -> Shares:
    """Over the images, whatever their sizes."""
    whole: Counter[str] = Counter()
    for each in shares:
        whole.update(each)
    return {k: round(whole[k] / len(shares), 6) for k in sorted(whole, key=int)}


def draw_sheet(path: Path, done: Sequence[Item], made: Predictions, segmenter: Segmenter, mean: Shares) -> None:
    """Of images evenly spaced over all that are done, read back: also those that were done by an earlier command."""
    from .features.sample import spread
    from .show import pictures
    from .show.sheet import groups_sheet

    def shown() -> Iterator[Shown]:
        for place in spread(len(done), SHEET_IMAGES).tolist():
            try:
                image, labels = read_image(done[place].file), read_label(made.mask(done[place]))
            except ImageError:  # gone since
                continue
            yield done[place].name, image, labels

    title = f"{min(len(done), SHEET_IMAGES)} of {len(done)} images, {len(mean)} groups"
    shares = {int(k): share for k, share in mean.items()}
    pictures.save(path, groups_sheet(shown(), pictures.palette(segmenter.groups), shares, title))


def items_below(root: Path) -> list[Item]:
    """The images at or below `root`, without the masks of a labelled layout. UserError when none is left."""
    layout = recognise(root)
    if layout is not None:  # its label files are images too
        advice = "the pictures alone" if layout.pictures is None else str(layout.pictures)
        raise UserError(f"--images {root}: is {layout.title}, which holds more than pictures; give {advice}")
    found = find_images(root, "--images")
    top = root if root.is_dir() else root.parent
    names = [file.relative_to(top) for file in found if not is_label(file, root)]
    if not names:
        raise UserError(
            f"--images {root}: all {len(found)} image files in it are masks, below a labels/ that stands beside an "
            "images/; give the folder that holds the pictures"
        )
    return [Item(top / name, name.as_posix(), stem) for name, stem in zip(names, output_stems(names))]


def is_label(file: Path, root: Path) -> bool:
    """Whether a file is a mask of the labelled layout: below a labels/ that stands beside an images/."""
    inside = [parent for parent in file.parents if parent != root and root in parent.parents]
    return any(parent.name == "labels" and (parent.parent / "images").is_dir() for parent in inside)


def output_stems(files: Sequence[Path]) -> list[str]:
    """Names without suffix for what is written, no two alike, also where capitals make no difference; a.jpg and a.png
    keep theirs."""
    whole = {file.as_posix().casefold() for file in files}
    stems = [file.with_suffix("").as_posix() for file in files]
    count = Counter(stem.casefold() for stem in stems)
    taken = whole | {stem for stem in count if count[stem] > 1}
    return [file.as_posix() if stem.casefold() in taken else stem for file, stem in zip(files, stems)]


if __name__ == "__main__":
    sys.exit(run(main))
