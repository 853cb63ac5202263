"""Every labelled set through one frozen backbone: each way to group, held against the labels; see quality.py domains.

A cell is one set at one seed. Its lines go to a file at once, so an interrupted run resumes where it stopped. The file
belongs to one state of the code: give another --out to measure a later one.
"""

from __future__ import annotations

import argparse
import functools
import json
import operator
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import machine
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

import smooseg_kernels as sk
from smooseg_fast.backbones import Backbone, load_backbone
from smooseg_fast.config import TrainConfig, preset, with_changes
from smooseg_fast.datasets import Dataset, classes_of, open_splits
from smooseg_fast.datasets.cutting import Cutting
from smooseg_fast.features.extract import open_or_extract
from smooseg_fast.features.job import FeatureOptions
from smooseg_fast.features.sample import sample_patches
from smooseg_fast.features.store import FeatureStore
from smooseg_fast.learn.grow import moments_of_parts
from smooseg_fast.learn.trainer import learn
from smooseg_fast.measure.confusion import LabelSquares, head_codes
from smooseg_fast.measure.scores import hungarian, majority, matched
from smooseg_fast.segment.grouping import Grouping
from smooseg_fast.segment.kmeans import spherical_kmeans
from smooseg_fast.segment.segmenter import Segmenter
from smooseg_fast.segment.tree import Tree

FEWEST, MOST = 2, 16  # groups that the labels choose from; more where there are more classes
FORMER = dict(init="pca-kmeans", granularity=(0.06,), steps=200)  # the default before the tree, at K = classes
ONE, KMEANS, LINKAGE, FORMERLY = "one group", "k-means", "average linkage", "head without a tree"
TREE, TRAINED = "tree, untrained", "tree, trained"
CLASSES, CHOSEN, BEST = "classes", "chosen", "best"
ORDER = [(ONE, "one"), (KMEANS, CLASSES), (FORMERLY, CLASSES), (LINKAGE, CLASSES), (LINKAGE, BEST)]
ORDER += [(TREE, how) for how in (CHOSEN, CLASSES, BEST)] + [(TRAINED, how) for how in (CHOSEN, CLASSES)]
Rows = list[dict[str, Any]]


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="folder of labelled sets, each with train and val")
    parser.add_argument("--sets", nargs="+", help="names of the sets (all)")
    parser.add_argument("--backbone", default="efficientnet-lite0", help="name, file or module:callable")
    parser.add_argument("--size", type=int, help="pixels, as train's (those that suit the backbone)")
    parser.add_argument("--eval-size", type=int, help="pixels, as train's (those that suit the backbone)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60, help="of the trained tree")
    parser.add_argument("--cache", type=Path, help="folder of the features (a temporary one)")
    parser.add_argument("--out", type=Path, default=machine.ROOT / "benchmarks/results/quality/domains.jsonl")


def run(args: argparse.Namespace) -> None:
    """Measures the cells that are missing, and prints the table of all."""
    names = args.sets or sorted(path.name for path in args.data.iterdir() if (path / "val").is_dir())
    backbone = load_backbone(args.backbone)
    size, eval_size = (asked or suits for asked, suits in zip((args.size, args.eval_size), backbone.sizes))
    settings = {"backbone": args.backbone, "size": size, "eval_size": eval_size}
    about = {"backbone": args.backbone, "sizes": f"{size}/{eval_size}", "steps": args.steps}
    with nullcontext(args.cache) if args.cache else tempfile.TemporaryDirectory() as cache:
        for name in names:
            done = {row["seed"] for row in read(args.out) if row["set"] == name and about.items() <= row.items()}
            missing = [seed for seed in range(args.seeds) if seed not in done]
            if not missing:
                continue
            domain = Domain.open(args.data / name, backbone, settings | {"cache": str(cache)}, args.steps)
            for seed in missing:
                started = time.perf_counter()
                append(args.out, [about | {"set": name, "seed": seed} | row for row in domain.rows(seed)])
                print(f"{name}, seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)
    rows = [row for row in read(args.out) if row["set"] in names and about.items() <= row.items()]
    print(f"\n{table(rows)}\n\n{by_set(rows)}")


def read(path: Path) -> Rows:
    """Every whole line of the file; the last may have been cut off."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def append(path: Path, rows: Rows) -> None:
    """Adds the rows of a cell in one write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = path.read_bytes() if path.exists() else b""
    where = {"threads": torch.get_num_threads(), "commit": machine.revision()["commit"]}
    text = "".join(json.dumps(row | where) + "\n" for row in rows)
    with open(path, "r+b" if kept else "wb") as file:
        file.truncate(kept.rfind(b"\n") + 1)
        file.seek(0, 2)
        file.write(text.encode())


class Way(NamedTuple):
    """A way to label patches: by the best of `prototypes` for the codes of a store's rows."""

    codes: Callable[[FeatureStore], Callable[[Tensor], Tensor]]
    prototypes: Tensor


def of_features(centres: Tensor) -> Way:
    """Labels by centres of the frozen features."""
    return Way(lambda store: store.rows, centres)


def of_codes(grouping: Grouping) -> Way:
    """Labels by a head."""
    return Way(lambda store: head_codes(grouping, store), grouping.prototypes)


class Domain(NamedTuple):
    """A labelled set: features to learn from, and labels of both splits on central squares."""

    config: TrainConfig
    trained: TrainConfig
    former: TrainConfig
    store: FeatureStore
    train: LabelSquares
    val: LabelSquares
    classes: int

    @classmethod
    def open(cls, folder: Path, backbone: Backbone, settings: dict[str, Any], steps: int) -> Domain:
        """settings: of TrainConfig, with size and eval_size. steps: of the trained tree."""
        train, val = open_splits(str(folder))
        if val is None:
            raise SystemExit(f"{folder}: has no labelled val split")
        config, trained, former = (
            with_changes(preset("folder"), **changes | settings) for changes in ({"steps": 0}, {"steps": steps}, FORMER)
        )
        size, eval_size = config.sides
        options = FeatureOptions(size=size, crops=config.crops, cache=config.cache, progress=False)
        store = open_or_extract(train, backbone, options)
        options = replace(options, size=eval_size, crops="center")

        def squares(split: Dataset) -> LabelSquares:
            cutting = Cutting(size=eval_size)
            return LabelSquares(split, open_or_extract(split, backbone, options), cutting, progress=False)

        return cls(config, trained, former, store, squares(train), squares(val), len(classes_of(val)))

    def rows(self, seed: int) -> Iterator[dict[str, Any]]:
        """The figures of every way at one seed."""
        patches = sample_patches(self.store, seed)
        yield self.row(ONE, "one", of_features(torch.ones(1, self.store.D)), 0.0)
        started = time.perf_counter()
        centres = spherical_kmeans(patches, self.classes, starts=10, seed=seed).centres
        yield self.row(KMEANS, CLASSES, of_features(centres), time.perf_counter() - started)
        segmenter, seconds = self.learnt(replace(self.former, prototypes=self.classes, seed=seed))
        yield self.row(FORMERLY, CLASSES, of_codes(segmenter.grouping), seconds)
        yield from self.trees(seed)

    def trees(self, seed: int) -> Iterator[dict[str, Any]]:
        """The tree of the preset at the number chosen without labels, at that of the classes, and at the one that the
        labels like best; average linkage of the same fine groups; and the first two numbers after training."""
        segmenter, seconds = self.learnt(replace(self.config, seed=seed))
        fine = segmenter.checkpoint.fine
        assert fine is not None
        counts = self.confusion(self.val, of_codes(Grouping(fine.head)))
        moments = functools.reduce(operator.add, moments_of_parts(fine.head, self.store))
        plain = Tree.grow(moments.pairs("all", centring=0.0), moments.shares)
        numbers = {CHOSEN: len(segmenter.groups), CLASSES: min(self.classes, fine.most)}
        for name, tree, hows in ((LINKAGE, plain, (CLASSES, BEST)), (TREE, fine.tree, (CHOSEN, CLASSES, BEST))):
            cuts = {k: tree.cut(k) for k in range(FEWEST, min(fine.most, max(MOST, self.classes)) + 1)}
            scores = {k: hungarian(np.eye(k, dtype=np.int64)[cut].T @ counts) for k, cut in cuts.items()}
            numbers[BEST] = max(scores, key=lambda k: scores[k].miou)
            for how in hows:
                way = of_codes(Grouping(fine.head, tree.cut(numbers[how])))
                yield self.row(name, how, way, seconds if name == TREE else None)
        for how in (CHOSEN, CLASSES):
            segmenter, seconds = self.learnt(replace(self.trained, seed=seed, groups=numbers[how]))
            yield self.row(TRAINED, how, of_codes(segmenter.grouping), seconds)

    def learnt(self, config: TrainConfig) -> tuple[Segmenter, float]:
        """A run without labels, and its seconds; the features are in the cache."""
        started = time.perf_counter()
        segmenter = learn(config, self.train.dataset, None, out=None, progress=False, say=lambda line: None)
        return segmenter, time.perf_counter() - started

    def confusion(self, labels: LabelSquares, way: Way) -> np.ndarray:
        return labels.confusion(way.codes(labels.store), way.prototypes)

    def on_train(self, way: Way) -> np.ndarray:
        """[K,classes] pixels of train, by the labels of their patches: enough to match groups to classes."""
        codes = way.codes(self.train.store)
        counts = torch.zeros(len(way.prototypes), self.classes)
        for numbers, shares in self.train.class_shares(self.classes):
            labels = sk.assign(codes(numbers), way.prototypes)
            counts += F.one_hot(labels, len(counts)).flatten(0, 1).mT.float() @ shares.flatten(0, 1)
        pixels_per_patch = self.train.cutting.size**2 / self.train.store.P
        return (pixels_per_patch * counts).round().long().numpy()

    def row(self, name: str, number: str, way: Way, seconds: float | None) -> dict[str, Any]:
        """The figures of one way, in %; groups are matched by the val labels, and by those of train."""
        counts = self.confusion(self.val, way)
        scores, many = hungarian(counts), majority(counts)
        fitted = matched(counts, np.array(hungarian(self.on_train(way)).mapping), "train")
        borders = self.val.boundaries(way.codes(self.val.store), way.prototypes, scores.mapping)
        shares = counts.sum(1) / counts.sum()
        percent = {
            "accuracy": scores.accuracy,
            "miou": scores.miou,
            "majority_accuracy": many.accuracy,
            "majority_miou": many.miou,
            "fitted_accuracy": fitted.accuracy,
            "fitted_miou": fitted.miou,
            "boundary_f": borders.f_measure,
        }
        return {
            "method": name,
            "number": number,
            "groups": len(counts),
            **{figure: round(100 * value, 3) for figure, value in percent.items()},
            "perplexity": round(float(np.exp(-(shares * np.log(np.maximum(shares, 1e-300))).sum())), 3),
            "seconds": None if seconds is None else round(seconds, 2),
        }


def table(rows: Rows) -> str:
    """Markdown: a row for each way to group, every figure averaged over seeds, then over sets."""
    figures = ["miou", "accuracy", "fitted_miou", "majority_miou", "boundary_f", "perplexity", "groups", "seconds"]
    frame = pd.DataFrame(rows)
    best = frame[frame["number"] == BEST].set_index(["method", "set", "seed"])["miou"]
    keys = pd.MultiIndex.from_frame(frame[["method", "set", "seed"]])
    frame["regret"] = best.reindex(keys).to_numpy() - frame["miou"]
    means = frame.groupby(["method", "number", "set"])[[*figures, "regret"]].mean()
    means = means.groupby(level=["method", "number"]).mean()
    head = ["method", "number of groups", *figures, "regret"]
    body = [[*key, *map(cell, means.loc[key])] for key in ORDER if key in means.index]
    return markdown([head, ["---"] * len(head), *body])


def by_set(rows: Rows) -> str:
    """Markdown: mIoU of each way on each set, mean and sample standard deviation over the seeds; both averaged over the
    sets in the last column."""
    frame = pd.DataFrame(rows)
    sets, grouped = sorted(frame["set"].unique()), frame.groupby(["method", "number", "set"])["miou"]
    means, spread = grouped.mean(), grouped.std(ddof=1)
    lines = {key: [(means.get((*key, name)), spread.get((*key, name))) for name in sets] for key in ORDER}
    body = [
        [*key, *(f"{cell(mean)} ± {cell(std)}" for mean, std in [*line, np.mean(line, 0)])]
        for key, line in lines.items()
        if key in means.index
    ]
    head = ["method", "number of groups", *sets, "mean"]
    return markdown([head, ["---"] * len(head), *body])


def markdown(lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.1f}"
