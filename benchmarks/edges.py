"""How well masks follow the edges of pictures: every refinement, number of shifts and combination on labelled sets.

    python benchmarks/edges.py --data DIR --runs FOLDER              # quality on DIR/SET/{train,val}/{images,labels}
    python benchmarks/edges.py --data DIR --runs FOLDER --ways none "shifts 4 + guided" "guided GUIDED_RADIUS=2"
    python benchmarks/edges.py --data DIR --runs FOLDER --crop 160 --ways none crf crf-exact  # parts of squares
    python benchmarks/edges.py --data DIR --runs FOLDER --speed            # time and memory of whole pictures

A checkpoint of every set is trained in FOLDER with today's defaults and kept. Central squares of its val
pictures at the checkpoint's evaluation size, mirror averaged, are labelled in every way; groups are matched to classes
one to one (Hungarian) for each way by itself. Boundary F has a tolerance of 0.75 % of the diagonal. A way reads
[size 2 | shifts N] [+ METHOD [NAME=VALUE ...]]: size 2 sees pictures at twice the pixels, NAME is a constant of
smooseg_fast.segment.refine. Lines go to --out at once; the same command resumes.
"""

from __future__ import annotations

import argparse
import ast
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import domains  # noqa: E402

import smooseg_kernels as sk  # noqa: E402
from smooseg_fast.backbones.shifts import density  # noqa: E402
from smooseg_fast.config import preset, with_changes  # noqa: E402
from smooseg_fast.datasets import classes_of, open_splits  # noqa: E402
from smooseg_fast.datasets.cutting import Cutting  # noqa: E402
from smooseg_fast.datasets.evenly import evenly  # noqa: E402
from smooseg_fast.datasets.images import resize_short_side  # noqa: E402
from smooseg_fast.datasets.mosaic import Mosaic  # noqa: E402
from smooseg_fast.datasets.reading import Picture  # noqa: E402
from smooseg_fast.datasets.scaled import Scaled  # noqa: E402
from smooseg_fast.learn.trainer import learn  # noqa: E402
from smooseg_fast.measure.boundary import BoundaryCounts  # noqa: E402
from smooseg_fast.measure.scores import hungarian  # noqa: E402
from smooseg_fast.segment import refine  # noqa: E402
from smooseg_fast.segment.segmenter import Segmenter  # noqa: E402
from smooseg_fast.segment.views import Views  # noqa: E402

MOST = 40  # pictures of a set
EXACT = 6  # pictures for crf-exact, whose time grows with the square of the pixels
SIDES = (320, 1024)  # pixels of the pictures that are timed
PEER = "pydensecrf2"
WAYS = ("none", "guided", "joint", "crf", PEER, "shifts 2", "shifts 4", "size 2", "shifts 2 + guided")
WAYS += ("shifts 4 + guided", "shifts 4 + joint", "shifts 4 + crf")
Codes = dict[tuple[int, int], Tensor]  # (size, shifts) -> codes [h,w,Z] of a square


@dataclass(frozen=True)
class Way:
    """A way to label pixels. size: times the checkpoint's pixels. changes: constants of `refine`."""

    name: str
    size: int = 1
    shifts: int = 1
    method: str = "none"
    changes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str) -> Way:
        given: dict[str, Any] = {}
        for part in name.split(" + "):
            word, *rest = part.split()
            if word in ("size", "shifts"):
                given[word] = int(rest[0])
            else:
                pairs = (pair.split("=") for pair in rest)
                given |= {"method": word, "changes": {key: ast.literal_eval(value) for key, value in pairs}}
        return cls(name, **given)

    def labels(self, segmenter: Segmenter, codes: Tensor, pixels: np.ndarray) -> Tensor:
        """Label the pixels uint8 [S,S,3] of a square from its codes [h,w,Z] -> uint8 [S,S]."""
        grouping, shape = segmenter.grouping, pixels.shape[:2]
        scores = grouping.scores(codes)
        if self.method == "none":
            flat = scores.flatten(0, 1)[None]
            return sk.assign(flat, grouping.prototypes, grid=codes.shape[:2], size=shape)[0].to(torch.uint8)
        plane = refine.Plane((codes.shape[0], codes.shape[1]), shape, shape, density(self.shifts))
        with mock.patch.multiple(refine, **self.changes) if self.changes else nullcontext():
            if self.method == PEER:
                return peer(grouping, scores, plane, pixels)
            refiner = refine.Refiner(self.method, grouping, plane)
            bands = refine.refined_bands([scores], refiner, Picture(np.ascontiguousarray(pixels)))
            return torch.from_numpy(np.concatenate(list(bands)))


def peer(grouping: Any, scores: Tensor, plane: Any, pixels: np.ndarray) -> Tensor:
    """The same dense CRF by pydensecrf2."""
    from pydensecrf import densecrf
    from pydensecrf.utils import unary_from_softmax

    weight = torch.ones(scores.shape[:2])
    patches, core = refine.Patches(grouping, scores, weight, (0, 0), plane), refine.Rectangle(0, 0, *plane.shape)
    probs = patches.softmax(patches.rows(core), patches.columns(core), refine.CRF_TEMPERATURE)
    (H, W), K = plane.shape, probs.shape[-1]
    model = densecrf.DenseCRF2D(W, H, K)
    model.setUnaryEnergy(np.ascontiguousarray(unary_from_softmax(probs.permute(2, 0, 1).contiguous().numpy())))
    sigma, colour, strength = refine.BILATERAL
    model.addPairwiseGaussian(sxy=refine.GAUSSIAN[0], compat=refine.GAUSSIAN[1])
    model.addPairwiseBilateral(sxy=sigma, srgb=colour, rgbim=np.ascontiguousarray(pixels), compat=strength)
    return torch.from_numpy(np.array(model.inference(10)).argmax(0).reshape(H, W).astype(np.uint8))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of labelled sets, each with train and val")
    parser.add_argument("--runs", type=Path, required=True, help="folder of checkpoints and features, kept")
    parser.add_argument("--sets", nargs="+", help="names of the sets (all)")
    parser.add_argument("--ways", nargs="+", help="ways to label (the table's)")
    parser.add_argument("--told", action="store_true", help="take as many groups as there are classes")
    parser.add_argument("--seed", type=int, default=0, help="of the checkpoints")
    parser.add_argument("--crop", type=int, help=f"pixels: the middles of {EXACT} squares, for crf-exact on a CPU")
    parser.add_argument("--speed", action="store_true", help="time and memory of whole pictures instead of quality")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/quality/edges.jsonl")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    names = args.sets or sorted(path.name for path in args.data.iterdir() if (path / "val").is_dir())
    ways = [Way.of(name) for name in args.ways or WAYS]
    if not args.ways:
        ways = [way for way in ways if way.method != PEER or has_peer()]
    (speeds if args.speed else qualities)(args, names, ways)
    print("\n" + table([row for row in domains.read(args.out) if row["set"] in names and row["seed"] == args.seed]))


def has_peer() -> bool:
    try:
        from pydensecrf import densecrf  # noqa: F401
    except ImportError:
        return False
    return True


def checkpoint_of(args: argparse.Namespace, name: str) -> Path:
    """The checkpoint of a set; trained where it is not there yet."""
    folder = args.runs / f"{name}-{'told' if args.told else 'chosen'}{f'-{args.seed}' if args.seed else ''}"
    if not (folder / "checkpoint.safetensors").exists():
        train, val = open_splits(str(args.data / name))
        groups = len(classes_of(val)) if args.told and val is not None else None
        cache = str(args.runs / "cache")
        config = with_changes(preset("folder"), data=str(args.data / name), seed=args.seed, groups=groups, cache=cache)
        learn(config, train, None, out=folder, progress=False, say=print)
    return folder / "checkpoint.safetensors"


def qualities(args: argparse.Namespace, names: Sequence[str], ways: Sequence[Way]) -> None:
    """Measure the cells that are missing."""
    for name in names:
        about = {"set": name, "told": args.told, "seed": args.seed, **({"crop": args.crop} if args.crop else {})}
        rows = [row for row in domains.read(args.out) if row.get("crop") == args.crop]
        done = {row["way"] for row in rows if about.items() <= row.items() and "miou" in row}
        missing = [way for way in ways if way.name not in done]
        if not missing:
            continue
        domain = Domain(Segmenter.load(checkpoint_of(args, name), device="cpu"), args.data / name, args.crop)
        for row in domain.rows(missing):
            domains.append(args.out, [about | row])
            print(name, *(f"{key} {value}" for key, value in row.items() if key != "changes"), flush=True)


class Domain:
    """Central squares of the val pictures of a set, their truth, and their codes, computed once for each (size,
    shifts). crop: label their middles alone, of about so many pixels a side."""

    def __init__(self, segmenter: Segmenter, folder: Path, crop: int | None = None):
        _, val = open_splits(str(folder))
        if val is None:
            raise SystemExit(f"{folder}: has no labelled val split")
        self.segmenter, self.classes, self.side = segmenter, len(classes_of(val)), segmenter.config.sides[1]
        self.crop, self.pictures = crop, list[np.ndarray]()
        truths = []
        for index in evenly(range(len(val)), EXACT if crop else MOST):
            label = val.label(index)
            if label is not None:
                self.pictures.append(val.picture(index).pixels)
                truths.append(torch.from_numpy(self.central(resize_short_side(label, self.side))))
        self.truth, self._codes = torch.stack(truths), {}

    def central(self, image: np.ndarray, size: int = 1) -> np.ndarray:
        """The central square of an image whose short side is the checkpoint's, times `size`."""
        side = self.side * size
        top, left = ((length - side) // 2 for length in image.shape[:2])
        return image[top : top + side, left : left + side]

    def square(self, number: int, size: int = 1) -> np.ndarray:
        return self.central(resize_short_side(self.pictures[number], self.side * size), size)

    def codes(self, way: Way) -> list[Tensor]:
        """The codes [h,w,Z] of every square, as evaluation has them: what lies around a square is real."""
        key = way.size, way.shifts
        if key not in self._codes:
            self._codes[key] = [codes_of(self.segmenter, picture, key) for picture in self.pictures]
        return self._codes[key]

    def middle(self, codes: Tensor, image: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """The part of a square that is labelled: its codes [h,w,Z], and its pixels or truth [S,S,...]."""
        if self.crop is None:
            return codes, image
        patches, patch = codes.shape[0], self.side // codes.shape[0]
        count = self.crop // patch
        first = (patches - count) // 2
        part, inside = slice(first, first + count), slice(first * patch, (first + count) * patch)
        return codes[part, part], np.ascontiguousarray(image[inside, inside])

    def rows(self, ways: Sequence[Way]) -> Any:
        for way in ways:
            codes = self.codes(way)[: EXACT if way.method == "crf-exact" else None]
            labels, seconds = [], []
            for number, of_square in enumerate(codes):
                of_square, pixels = self.middle(of_square, self.square(number))
                started = time.perf_counter()
                labels.append(way.labels(self.segmenter, of_square, pixels))
                seconds.append(time.perf_counter() - started)
            yield self.row(way, torch.stack(labels)) | {"ms": round(1000 * float(np.median(seconds)), 1)}

    def row(self, way: Way, labels: Tensor) -> dict[str, Any]:
        """The figures in % of labels [n,S,S]."""
        K, truth = len(self.segmenter.groups), self.truth[: len(labels)]
        if self.crop is not None:
            codes = self.codes(way)[0]
            truth = torch.stack([torch.from_numpy(self.middle(codes, image.numpy())[1]) for image in truth])
        known = truth < self.classes
        cells = labels[known].long() * self.classes + truth[known].long()
        counts = torch.bincount(cells, minlength=K * self.classes).view(K, self.classes)
        scores, borders = hungarian(counts.numpy()), BoundaryCounts()
        class_of = torch.tensor(scores.mapping)
        for predicted, expected in zip(labels, truth):
            borders.add(class_of[predicted.long()][None], expected[None])
        percent = {
            "miou": scores.miou,
            "accuracy": scores.accuracy,
            "boundary_f": borders.f_measure,
            "precision": borders.predicted_near / max(1, borders.predicted),
            "recall": borders.true_near / max(1, borders.true),
        }
        about = {"way": way.name, "groups": K, "size": self.side, "pictures": len(labels)}
        return about | {name: round(100 * value, 2) for name, value in percent.items()}


@torch.no_grad()
def codes_of(segmenter: Segmenter, picture: np.ndarray, key: tuple[int, int]) -> Tensor:
    """The codes [h,w,Z] of the central square of a picture, mirror averaged; key: (size, shifts)."""
    size, shifts = key
    side = size * segmenter.config.sides[1]
    views = CentralViews(picture, side, segmenter, shifts)
    return torch.cat([codes for (codes,) in segmenter.code_bands(views, [segmenter.head], True)])


class CentralViews(Views):
    """The central square of a picture with what is around it where shifts or a margin reach out."""

    def __init__(self, picture: np.ndarray, side: int, segmenter: Segmenter, shifts: int):
        config = segmenter.config
        resized = resize_short_side(picture, side, config.resample)
        top, left = ((length - side) // 2 for length in resized.shape[:2])
        square = np.ascontiguousarray(resized[top : top + side, left : left + side])
        cutting = Cutting(size=side, resample=config.resample, margin=config.margin)
        super().__init__(Picture(square), cutting, segmenter.backbone, shifts)
        self.pictures = [Around(resized, resized.shape[:2], config.resample, (top, left))]


@dataclass(frozen=True)
class Around(Scaled):
    """A picture whose windows are counted from `origin`."""

    origin: tuple[int, int]

    def window(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        return super().window(top + self.origin[0], left + self.origin[1], height, width)


def speeds(args: argparse.Namespace, names: Sequence[str], ways: Sequence[Way]) -> None:
    """Time every way on whole pictures of SIDES pixels, each in a process of its own, whose peak memory is its own."""
    for name in names:
        checkpoint = checkpoint_of(args, name)
        for side in SIDES:
            about = {"set": name, "told": args.told, "seed": args.seed, "side": side}
            done = {row["way"] for row in domains.read(args.out) if about.items() <= row.items()}
            for way in ways:
                if way.name in done or way.size > 1 or (way.method == "crf-exact" and side > SIDES[0]):
                    continue
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                    row = process.submit(speed, checkpoint, way, side).result()
                domains.append(args.out, [about | row])
                print(name, *(f"{key} {value}" for key, value in row.items()), flush=True)


@torch.no_grad()
def speed(checkpoint: Path, way: Way, side: int) -> dict[str, Any]:
    """Milliseconds of a picture of side x side pixels, one thread: the codes, and the labels from them; and MB that a
    prediction adds to the peak of a process that has loaded everything."""
    torch.set_num_threads(1)
    segmenter, picture = Segmenter.load(checkpoint, device="cpu"), Mosaic("val", 1, side).picture(0)
    views = Views(picture, segmenter.cutting(), segmenter.backbone, way.shifts)

    def codes() -> Tensor:
        return torch.cat([band for (band,) in segmenter.code_bands(views, [segmenter.head], True)])

    of_picture = codes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = [timed(codes), timed(lambda: way.labels(segmenter, of_picture, picture.pixels))]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    milliseconds = {name: round(1000 * seconds, 1) for name, seconds in zip(("codes_ms", "labels_ms"), times)}
    return {"way": way.name, "groups": len(segmenter.groups), **milliseconds, "added_mb": round((peak - before) / 1024)}


def timed(work: Callable[[], Any]) -> float:
    """The shortest of three times, in seconds; of one where that takes long."""
    seconds: list[float] = []
    while len(seconds) < 3 and sum(seconds) < 10:
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each way; mIoU and boundary F of each set, their means with accuracy, and time."""
    frame = pd.DataFrame([row for row in rows if "miou" in row and not row["told"] and "crop" not in row])
    if frame.empty:
        return ""
    sets = sorted(frame["set"].unique())
    body = []
    for way, part in frame.groupby("way", sort=False):
        part = part.set_index("set")
        pairs = [f"{part.miou[name]:.1f} / {part.boundary_f[name]:.1f}" if name in part.index else "-" for name in sets]
        means = [f"{part[figure].mean():.2f}" for figure in ("miou", "boundary_f", "accuracy", "ms")]
        body.append([way, *pairs, *(means if len(part) == len(sets) else ["-"] * 4)])
    head = ["way", *(f"{name}: mIoU / F" for name in sets), "mean mIoU", "mean F", "mean accuracy", "ms a square"]
    return domains.markdown([head, ["---"] * len(head), *body])


if __name__ == "__main__":
    main()
