"""How much is right without labels: features, the tree of groups and the number chosen, on several labelled sets.

    python benchmarks/quality.py sight --data DIR            # every set in it: DIR/SET/{train,val}/{images,labels}
    python benchmarks/quality.py sight --data DIR --backbones filterbank --scale 0.5 --statistics raw centred
    python benchmarks/quality.py sight --data DIR --backbones efficientnet-lite0 --size 672 --eval-size 672
    python benchmarks/quality.py domains --data DIR --backbone module:callable    # every way to group, with training

sight: for every backbone, set and statistic, over the seeds, without training: k-means at K = classes; and average
linkage of 64 k-means groups (Lan et al. 2023's energy falls with a merge exactly when the mean similarity of two groups
exceeds its threshold), cut at K = classes and at the best K of 2 to 16, which the labels choose. Groups are matched to
classes by the labels (Hungarian), as everywhere. Figures go to --out, a line each, and a table in Markdown of
everything in it is printed.

domains: all sets through one backbone and the folder preset, five seeds: one group; k-means, and a head without a tree,
at K = classes; average linkage of the fine groups; and the tree of the preset at the number of groups chosen without
labels, at the number of classes, and at the best one by the labels; the first two also after training. "fitted" has the
matching of the training labels, "majority" many groups a class, "regret" is against the best number of the
same tree.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import domains  # noqa: E402
import machine  # noqa: E402

from smooseg_fast.backbones import load_backbone  # noqa: E402
from smooseg_fast.config import FINE, FIT  # noqa: E402
from smooseg_fast.datasets import classes_of, open_splits  # noqa: E402
from smooseg_fast.datasets.cutting import Cutting  # noqa: E402
from smooseg_fast.features.extract import open_or_extract  # noqa: E402
from smooseg_fast.features.job import FeatureOptions  # noqa: E402
from smooseg_fast.features.sample import sample_patches  # noqa: E402
from smooseg_fast.features.store import FeatureStore  # noqa: E402
from smooseg_fast.measure.confusion import LabelSquares  # noqa: E402
from smooseg_fast.measure.health import unit_rows  # noqa: E402
from smooseg_fast.measure.scores import hungarian  # noqa: E402
from smooseg_fast.segment.kmeans import spherical_kmeans  # noqa: E402
from smooseg_fast.segment.tree import Moments, Tree  # noqa: E402
from smooseg_fast.system.files import write_atomic  # noqa: E402

MOST = 16  # groups that linkage is cut into, at most; more where classes are many
KEY = ["backbone", "set", "sizes", "scale", "margin", "statistics"]
SHRINKAGE = 0.1  # share of the mean variance that whitening adds to every direction's
Map = Callable[[Tensor], Tensor]
Statistic = Callable[[Tensor], Map]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    domains.add_flags(commands.add_parser("domains", help="every way to group, with training"))
    sight = commands.add_parser("sight", help="features without training")
    sight.add_argument("--data", type=Path, required=True, help="folder of labelled sets, each with train and val")
    sight.add_argument("--sets", nargs="+", help="names of the sets (all)")
    sight.add_argument("--backbones", nargs="+", default=["filterbank", "efficientnet-lite0"])
    sight.add_argument("--size", type=int, help="pixels, as train's (those that suit the backbone)")
    sight.add_argument("--eval-size", type=int, help="pixels, as train's (those that suit the backbone)")
    sight.add_argument("--scale", nargs="+", default=[FIT], help="as train's --scale")
    sight.add_argument("--margin", type=int, default=0, help="as train's --margin")
    sight.add_argument("--statistics", nargs="+", choices=STATISTICS, default=["raw"])
    sight.add_argument("--seeds", type=int, default=5)
    sight.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/sight.csv")
    args = parser.parse_args(arguments)
    if args.command == "domains":
        return domains.run(args)
    names = args.sets or sorted(path.name for path in args.data.iterdir() if (path / "val").is_dir())
    for backbone in args.backbones:
        for name in names:
            view = View(args.data / name, backbone, (args.size, args.eval_size), tuple(args.scale), args.margin)
            # a process each, so that the peak of the memory is its own
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                rows = process.submit(measure, view, args.statistics, args.seeds).result()
            write(args.out, rows)
            for row in rows:
                print("  ".join(f"{value:.1f}" if isinstance(value, float) else str(value) for value in row.values()))
    print(table(read(args.out)))


class View(NamedTuple):
    """A set through a backbone. sizes: short sides in pixels to learn and to measure at; None is the backbone's own."""

    folder: Path
    backbone: str
    sizes: tuple[int | None, int | None] = (None, None)
    scale: tuple[str, ...] = (FIT,)
    margin: int = 0


def read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype={"scale": str})


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Appends rows, which replace those of the same KEY."""
    lines = pd.DataFrame(rows)
    if path.exists():
        lines = pd.concat([read(path), lines])
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = lines.drop_duplicates(KEY, keep="last")
    write_atomic(path, lines.to_csv(index=False, float_format="%.4g", lineterminator="\n").encode())


def table(lines: pd.DataFrame) -> str:
    """Markdown: a row a backbone, sizes and statistics, mIoU of k-means in every set and their mean, of linkage."""
    view = [name for name in KEY if name != "set"]
    sets = sorted(lines["set"].unique())
    head = [*view, *sets, "mean", "linkage", "linkage, best K (by labels)", "images/s"]
    body = [head, ["---"] * len(head)]
    for key, group in lines.groupby(view, sort=False):
        by_set = group.set_index("set").reindex(sets)
        means = by_set[["kmeans_miou", "linkage_miou", "best_k_miou", "images_per_s"]].mean(skipna=False)
        body.append([*map(str, key), *map(cell, [*by_set["kmeans_miou"], *means])])
    return "\n".join("| " + " | ".join(row) + " |" for row in body)


def cell(value: float) -> str:
    return "-" if value != value else f"{value:.1f}"


def measure(view: View, statistics: list[str], seeds: int) -> list[dict[str, Any]]:
    """A row for every statistic of one backbone on one set."""
    train, val = open_splits(str(view.folder))
    if val is None:
        raise SystemExit(f"{view.folder}: has no labelled val split")
    backbone = load_backbone(view.backbone)
    size, eval_size = (asked or suits for asked, suits in zip(view.sizes, backbone.sizes))
    plain, K = view.scale == (FIT,), len(classes_of(val))
    cutting = Cutting(size=eval_size, crops="center" if plain else "tiles", scale=view.scale, margin=view.margin)
    with tempfile.TemporaryDirectory() as cache:
        options = FeatureOptions(
            size=size,
            crops="slide" if plain else "tiles",
            scale=view.scale,
            margin=view.margin,
            cache=cache,
            progress=False,
        )
        started = time.perf_counter()
        store = open_or_extract(train, backbone, options)
        images_per_s = len(train) / (time.perf_counter() - started)
        held_out = open_or_extract(val, backbone, replace(options, size=eval_size, crops=cutting.crops))
        labels = LabelSquares(val, held_out, cutting, progress=False)
        about = {
            "backbone": view.backbone,
            "set": view.folder.name,
            "sizes": f"{size}/{eval_size}",
            "scale": " ".join(view.scale),
            "margin": view.margin,
        }
        rows = []
        for statistic in statistics:
            scores = pd.DataFrame(
                [figures(store, held_out, labels, STATISTICS[statistic], K, seed) for seed in range(seeds)]
            )
            means = (100 * scores.mean()).to_dict()
            spread = {"kmeans_miou_std": 100 * scores["kmeans_miou"].std(ddof=1)} if seeds > 1 else {}
            cost = {"images_per_s": images_per_s, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
            where = {"threads": torch.get_num_threads(), "commit": machine.revision()["commit"], "seeds": seeds}
            rows.append(about | {"statistics": statistic} | means | spread | cost | where)
    return rows


def figures(
    store: FeatureStore, held_out: FeatureStore, labels: LabelSquares, statistic: Statistic, K: int, seed: int
) -> dict[str, float]:
    """Scores of one seed: k-means and linkage at K groups, and linkage at the K that the labels like best."""
    rows = sample_patches(store, seed)
    mapped: Map = statistic(rows)
    rows = mapped(rows)

    def confusion(centres: Tensor) -> np.ndarray:
        return labels.confusion(lambda places: mapped(held_out.rows(places)), centres)

    kmeans = hungarian(confusion(spherical_kmeans(rows, K, starts=10, seed=seed).centres))
    fine = spherical_kmeans(rows, max(FINE, 2 * K), starts=1, seed=seed).centres
    unit, moments = unit_rows(rows).double(), Moments(*fine.shape)
    moments.add(unit[None], (unit @ fine.double().mT).argmax(1)[None])
    tree, counts = Tree.grow(moments.pairs("all", centring=0.0), moments.shares), confusion(fine)
    cut = {
        k: hungarian(np.eye(k, dtype=np.int64)[tree.cut(k)].T @ counts)
        for k in range(2, min(max(MOST, K), len(tree.splits()) + 1) + 1)
    }
    best = max(cut.values(), key=lambda scores: scores.miou)
    return dict(
        kmeans_accuracy=kmeans.accuracy,
        kmeans_miou=kmeans.miou,
        linkage_accuracy=cut[K].accuracy,
        linkage_miou=cut[K].miou,
        best_k_miou=best.miou,
    )


def raw(rows: Tensor) -> Map:
    return lambda x: x


def centred(rows: Tensor) -> Map:
    mean = rows.mean(0)
    return lambda x: x - mean


def standardised(rows: Tensor) -> Map:
    mean, spread = rows.mean(0), rows.std(0).clamp(min=1e-6)
    return lambda x: (x - mean) / spread


def whitened(rows: Tensor) -> Map:
    mean, covariance = rows.mean(0), torch.cov(rows.T.double())
    variance, directions = torch.linalg.eigh(covariance)
    shrunk = variance.clamp(min=0) + SHRINKAGE * variance.mean()
    matrix = (directions / shrunk.sqrt()).float()
    return lambda x: (x - mean) @ matrix


STATISTICS: dict[str, Statistic] = {
    "raw": raw,
    "centred": centred,
    "standardised": standardised,
    "whitened": whitened,
}

if __name__ == "__main__":
    main()
