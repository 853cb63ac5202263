"""Closeness of patches in text, as a picture and as JSON: its spread, and the shares that thresholds pull together and
push apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image

from ..config import Variant
from ..measure.closeness import BINS, Closeness, Distribution, Similarity
from ..system.table import aligned
from .histograms import Histogram, histograms_picture

SHARES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
Row = tuple[Variant, tuple[Closeness, Closeness]]  # a head, and its thresholds within and across images


def spread_table(measured: Similarity) -> str:
    """Mean, standard deviation and quantiles of the closeness within and across images."""
    head = ["", "mean", "std", *(f"{100 * q:g} %" for q in SHARES)]
    body = []
    for name, kind in kinds_of(measured).items():
        numbers = (f"{value:+.3f}" for value in kind.quantiles(SHARES))
        body.append([f"{name} images", f"{kind.mean:+.3f}", f"{kind.std:.3f}", *numbers])
    return aligned([head, *body])


def thresholds_table(rows: Sequence[Row]) -> str:
    """The shares of the pairs that each threshold pulls together (closeness above it) and pushes apart, in %."""
    head = ["thresholds", "within", "pulls", "pushes", "net force", "across", "pulls", "pushes", "net force"]
    body = [[name_of(variant), *(cell for kind in kinds for cell in cells(kind))] for variant, kinds in rows]
    return aligned([head, *body])


def cells(kind: Closeness) -> list[str]:
    pulled = 100 * kind.pulled
    return [f"{kind.threshold:+.3f}", f"{pulled:.1f} %", f"{100 - pulled:.1f} %", f"{kind.force:+.3f}"]


def name_of(variant: Variant) -> str:
    return "threshold" if variant.granularity is None else f"granularity {variant.granularity:g}"


def kinds_of(measured: Similarity) -> dict[str, Distribution]:
    return {"within": measured.within, "across": measured.across}


def closeness_picture(measured: Similarity, rows: Sequence[Row], title: str) -> Image:
    """A histogram of each kind of pairs, with a mark at every threshold."""
    panels = {}
    for place, (name, kind) in enumerate(kinds_of(measured).items()):
        marks = {}
        for variant, kinds in rows:
            threshold = kinds[place].threshold
            marks[f"{name_of(variant)}: {threshold:+.3f} pulls {100 * kinds[place].pulled:.0f} %"] = threshold
        edges = torch.linspace(*kind.limits, BINS + 1, dtype=torch.float64).tolist()
        title_of_panel = f"{name} images: {kind.pairs / 1e6:.3g} million pairs"
        panels[title_of_panel] = Histogram(edges, kind.counts.tolist(), kind.mean, marks)
    return histograms_picture(
        panels, title, "pairs right of a threshold are pulled together, those left of it pushed apart"
    )


def closeness_record(measured: Similarity, rows: Sequence[Row]) -> dict[str, Any]:
    """All figures, ready for JSON."""
    kinds = {
        name: {
            "mean": kind.mean,
            "std": kind.std,
            "quantiles": dict(zip(map(str, SHARES), kind.quantiles(SHARES))),
            "pairs": kind.pairs,
            "histogram": {"low": kind.limits[0], "high": kind.limits[1], "counts": kind.counts.tolist()},
        }
        for name, kind in kinds_of(measured).items()
    }
    thresholds = [
        {"name": name_of(variant)}
        | {
            name: {"threshold": kind.threshold, "pulled": kind.pulled, "net_force": kind.force}
            for name, kind in zip(kinds, both)
        }
        for variant, both in rows
    ]
    counted = {"squares": measured.squares, "squares_counted": measured.counted, "partners": measured.partners}
    return {**counted, **kinds, "thresholds": thresholds}
