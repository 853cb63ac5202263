"""`python -m smooseg_fast.predict`: masks, overlays, shares and a contact sheet for any image or folder of images."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from .command import load_segmenter, parse, printable, run
from .datasets import recognise
from .datasets.images import ImageError, find_images, read_image, read_label
from .errors import UserError
from .features.sample import spread
from .segment.segmenter import Segmenter, pick_device
from .show import pictures
from .show.sheet import Shown, groups_sheet
from .system.files import write_json
from .system.outfolder import Journal, OutFolder
from .system.processes import ALONE, Processes
from .system.progress import Bar, announced, say
from .system.signals import Interrupted, StopRequest

SHEET_IMAGES = 24
RUN, DONE, MASKS, OVERLAYS = "predict.json", "done.jsonl", "masks", "overlays"
SHARES, SHEET = "shares.json", "sheet.jpg"
PART = re.compile(r"done-\d+\.jsonl")  # the journal of another process than the first

Shares = dict[str, float]  # group -> share of an image's pixels


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Segment images of any size with a checkpoint. The same command on the same --out goes on where it was stopped."""

    checkpoint: str
    """The checkpoint.safetensors that training wrote, or a published SmooSeg .ckpt."""
    images: str
    """An image, or a folder of images in any nesting."""
    out: str
    """Folder for masks/ (8-bit palette PNG of the image's own size), overlays/, shares.json, sheet.jpg, all of one checkpoint."""
    mirror: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint="")] = True
    """Take each image once, which halves the time, instead of averaging its codes with those of its mirror image as the paper does."""
    short_side: int | None = None
    """Pixels that an image's short side is brought to before features are taken [the checkpoint's]; larger sees finer detail."""
    backbone: str | None = None
    """Needed where the checkpoint was trained on a module:callable; else the one it names."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps or auto."""
    backbone_precision: str = "auto"
    """What a ViT backbone computes in: float32, bfloat16, float16, or auto: what the device is fast in."""


@dataclass(frozen=True)
class Item:
    """One image to segment."""

    file: Path
    name: str  # path relative to --images, posix
    stem: str  # of the files written for it, in the folders below --out

    def stamp(self) -> list[str | int] | None:
        """[place, bytes, modification time in ns], which tell an image that changed; None when it is gone."""
        try:
            status = self.file.stat()
        except OSError:
            return None
        # the place too: sizes and times of uncompressed tiles from an archive are all alike
        return [str(self.file.absolute()), status.st_size, status.st_mtime_ns]


@dataclass
class Outcome:
    """The result of segmenting a share of the images, by their names."""

    shares: dict[str, Shares] = field(default_factory=dict)
    skipped: dict[str, ImageError] = field(default_factory=dict)
    signal: int | None = None  # the number of the one that stopped the work


class Predictions(OutFolder):
    """The masks and overlays of one checkpoint and one set of settings, and a journal of the images that are done.

    An image's line in the journal comes after its mask and overlay, so they are whole. The last line of a stem counts:
    the files of that name may have been another image's before. Each of several processes appends to a file of its own,
    so a kill at any time costs no more than the images under way; the next command puts the files together.

    UserError when the folder at `path` is another's.
    """

    def __init__(self, path: Path, settings: dict[str, Any], processes: Processes):
        super().__init__(path, settings, record=RUN, made=(MASKS, OVERLAYS, SHARES, SHEET), below=(MASKS, OVERLAYS))
        self._processes, self._alone = processes, processes.size == 1  # whether no other process writes
        self._journal = Journal(self._journal_path(processes.rank))
        self._done = self._read_journals() if processes.first else {}

    def mask(self, item: Item) -> Path:
        return self.path / MASKS / f"{item.stem}.png"

    def overlay(self, item: Item) -> Path:
        return self.path / OVERLAYS / f"{item.stem}.jpg"

    def shares(self, item: Item) -> Shares | None:
        """The shares in an image that is done and has not changed since; None when it has to be segmented."""
        record = self._done.get(item.stem, {})
        done = record.get("stamp") == item.stamp() and self.mask(item).is_file() and self.overlay(item).is_file()
        return record.get("shares") if done else None

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Hold the folder for this command and let all its processes write into it.

        Nothing is left in a new folder where no image was done. UserError where another command is at work.
        """
        with self.held() if self._processes.first else nullcontext():
            made: list[Path] = []
            if self._processes.first:
                before = set(self.path.iterdir())
                self.claim()
                self._write_journal(self._done)
                made = [path for path in self.path.iterdir() if path not in before]
            self._processes.wait()
            try:
                yield
            finally:
                journals = [path for path in (self.path / DONE, *self._parts()) if path.exists()]
                if self._alone and self.path / RUN in made and not any(path.stat().st_size for path in journals):
                    for path in (*made, *journals):
                        path.unlink(missing_ok=True)

    def write(
        self, item: Item, stamp: list[str | int] | None, image: np.ndarray, labels: np.ndarray, colours: np.ndarray
    ) -> Shares:
        """Write mask and overlay of `image` uint8 [H,W,3] with labels uint8 [H,W], then a line of the journal."""
        pictures.save(self.overlay(item), pictures.overlay(image, labels, colours))
        pictures.write_mask(self.mask(item), labels, colours)
        shares = {str(k): round(float(n) / labels.size, 6) for k, n in enumerate(np.bincount(labels.ravel())) if n}
        self._journal.append({"stem": item.stem, "stamp": stamp, "shares": shares})
        return shares

    def join_journals(self) -> None:
        """Put the files of all processes together, once nobody writes any more."""
        self._alone = True
        if self._parts():
            self._write_journal(self._read_journals())

    def _journal_path(self, rank: int) -> Path:
        return self.path / (DONE if rank == 0 else f"done-{rank}.jsonl")

    def _parts(self) -> list[Path]:
        """The files of all processes but the first, also of an earlier command with more of them."""
        return sorted(path for path in self.path.glob("done-*.jsonl") if PART.fullmatch(path.name))

    def _read_journals(self) -> dict[str, dict[str, Any]]:
        records = [record for path in (self.path / DONE, *self._parts()) for record in Journal(path).read()]
        return {str(record.get("stem")): record for record in records}

    def _write_journal(self, records: dict[str, dict[str, Any]]) -> None:
        parts = self._parts()
        Journal(self.path / DONE).rewrite(records.values())
        for path in parts:  # a kill before this leaves lines twice, which does no harm
            path.unlink(missing_ok=True)


def main(args: Sequence[str], processes: Processes = ALONE) -> None:
    config = parse(PredictConfig, args, prog="python -m smooseg_fast.predict")
    device = processes.device(pick_device(config.device))
    segmenter = load_segmenter(config.checkpoint, config.backbone, device, config.backbone_precision)
    root, out = Path(config.images).expanduser(), Path(config.out).expanduser()
    with announced(f"listing    the images in {root}"):
        items = items_below(root) if processes.first else []
    folder = Predictions(out, settings(config, segmenter), processes)
    with announced(f"checking   which of {len(items)} images are done"):
        done = {item.name: shares for item in items if (shares := folder.shares(item)) is not None}
    items, done = processes.all((items, done))[0]
    if done:
        print(f"{len(done)} of {len(items)} images are done in {out}, by this checkpoint and with these settings")
    with folder.claimed():
        outcome = segment(segmenter, config, items, set(done), folder, processes)
        with announced("waiting    for the other processes"):
            outcomes = processes.all(outcome)
        if processes.first:
            folder.join_journals()
            finish(segmenter, config, items, done, outcomes, folder)


def settings(config: PredictConfig, segmenter: Segmenter) -> dict[str, Any]:
    """Everything that decides the labels of an image."""
    return {
        "checkpoint": f"step {segmenter.checkpoint.step}, {segmenter.digest[:16]}",
        "backbone": segmenter.backbone.digest[:16],
        "mirror": config.mirror,
        "short_side": segmenter.config.eval_size if config.short_side is None else config.short_side,
    }


def segment(
    segmenter: Segmenter,
    config: PredictConfig,
    items: Sequence[Item],
    done: Collection[str],
    folder: Predictions,
    processes: Processes,
) -> Outcome:
    """Segment this process's share of the `items` that are not `done`, until a signal stops it."""
    outcome = Outcome()
    colours = pictures.palette(segmenter.groups)
    todo = [item for item in items if item.name not in done]
    bar = Bar(total=len(items), initial=len(items) - len(todo), desc="predict", unit="image")
    with bar, StopRequest() as stop:
        for item in todo[processes.rank :: processes.size]:
            if stop.number is not None:
                outcome.signal = stop.number
                break
            try:
                stamp, image = item.stamp(), segmenter.pixels(item.file)
                labels = segmenter.predict(image, mirror=config.mirror, short_side=config.short_side).astype(np.uint8)
            except ImageError as error:
                outcome.skipped[item.name] = error
                say_skipped(item, error)
            else:
                outcome.shares[item.name] = folder.write(item, stamp, image, labels, colours)
            bar.update(min(processes.size, bar.total - bar.n))  # the others are about as far
    return outcome


def finish(
    segmenter: Segmenter,
    config: PredictConfig,
    items: Sequence[Item],
    done: dict[str, Shares],
    outcomes: Sequence[Outcome],
    folder: Predictions,
) -> None:
    """Write the shares and the sheet of all images that are done, and say how it went."""
    shares, errors = dict(done), dict[str, ImageError]()
    for outcome in outcomes:
        shares |= outcome.shares
        errors |= outcome.skipped
    skipped = {item.name: errors[item.name] for item in items if item.name in errors}
    for item in items:
        if item.name in errors and item.name not in outcomes[0].skipped:  # another process could not be heard
            say_skipped(item, errors[item.name])
    signal = next((outcome.signal for outcome in outcomes if outcome.signal is not None), None)
    count = f"{len(shares)} of {len(items)} images" + (f", {len(skipped)} could not be used" if skipped else "")
    if not shares:
        if signal is not None:
            raise Interrupted(signal, "no image was done yet")
        name, error = next(iter(skipped.items()))
        raise UserError(
            f"--images {Path(config.images).expanduser()}: none of the {len(items)} images can be used "
            f"(first: {name}: {error.reason}); give images that open"
        )
    images = {item.name: shares[item.name] for item in items if item.name in shares}
    mean = mean_shares(images.values())
    summary = {
        "groups": segmenter.groups,
        "mean": mean,
        "images": images,
        "skipped": {name: error.reason for name, error in skipped.items()},
        "model": {"checkpoint": config.checkpoint, **segmenter.describe()},
    }
    out = folder.path
    write_json(out / SHARES, summary)
    with announced("drawing    the sheet"):
        draw_sheet(out / SHEET, [item for item in items if item.name in shares], folder, segmenter, mean)
    if signal is not None:
        raise Interrupted(signal, f"{count} are done, in {out}")
    print(f"segmented {count}")
    print(f"masks {out / MASKS}, overlays {out / OVERLAYS}, shares of each group {out / SHARES}")
    print(f"look at {out / SHEET}")


def say_skipped(item: Item, error: ImageError) -> None:
    say(printable(f"skipped: {item.file}: {error.reason}; {error.advice}"))


def mean_shares(shares: Collection[Shares]) -> Shares:
    """The mean over images, whatever their sizes."""
    totals: Counter[str] = Counter()
    for image in shares:
        totals.update(image)
    return {k: round(totals[k] / len(shares), 6) for k in sorted(totals, key=int)}


def draw_sheet(path: Path, done: Sequence[Item], folder: Predictions, segmenter: Segmenter, mean: Shares) -> None:
    """Draw images evenly spaced over all that are done, read back from the disk."""

    def shown() -> Iterator[Shown]:
        for place in spread(len(done), SHEET_IMAGES).tolist():
            try:
                image, labels = read_image(done[place].file), read_label(folder.mask(done[place]))
            except ImageError:  # removed or damaged since
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
    files = find_images(root, "--images")
    top = root if root.is_dir() else root.parent
    names = [file.relative_to(top) for file in files if not is_label(file, root)]
    if not names:
        raise UserError(
            f"--images {root}: all {len(files)} image files in it are masks, below a labels/ next to an images/; "
            "give the folder that holds the pictures"
        )
    return [Item(top / name, name.as_posix(), stem) for name, stem in zip(names, output_stems(names))]


def is_label(file: Path, root: Path) -> bool:
    """Whether a file is a mask of the labelled layout: below a labels/ next to an images/."""
    inside = [parent for parent in file.parents if parent != root and root in parent.parents]
    return any(parent.name == "labels" and (parent.parent / "images").is_dir() for parent in inside)


def output_stems(files: Sequence[Path]) -> list[str]:
    """Names for the files written for each image, no two alike even where case makes no difference.

    They have no suffix, but where a.jpg and a.png would get the same name.
    """
    names = {file.as_posix().casefold() for file in files}
    stems = [file.with_suffix("").as_posix() for file in files]
    count = Counter(stem.casefold() for stem in stems)
    taken = names | {stem for stem in count if count[stem] > 1}
    return [file.as_posix() if stem.casefold() in taken else stem for file, stem in zip(files, stems)]


if __name__ == "__main__":
    sys.exit(run(main, together=True))
