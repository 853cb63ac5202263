"""Closeness of patches in text, as a picture and as JSON: its spread, and the shares that thresholds pull together and
push apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL.Image import Image

from ..config import Variant
from ..measure.closeness import Closeness, Similarity
from ..system.table import aligned
from .histograms import Histogram, histograms_picture

SHARES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
KINDS = ("within", "across")
Row = tuple[Variant, tuple[Closeness, Closeness]]  # a head, and its thresholds within and across images


def spread_table(measured: Similarity) -> str:
    """Mean, standard deviation and quantiles of the closeness within and across images."""
    rows = [["", "mean", "std", *(f"{100 * share:g} %" for share in SHARES)]]
    for name, kind in zip(KINDS, (measured.within, measured.across)):
        numbers = (f"{value:+.3f}" for value in kind.quantiles(SHARES))
        rows.append([f"{name} images", f"{kind.mean:+.3f}", f"{kind.std:.3f}", *numbers])
    return aligned(rows)


def thresholds_table(rows: Sequence[Row]) -> str:
    """The shares of the pairs that each threshold pulls together (closeness above it) and pushes apart, in %."""

    def cells(kind: Closeness) -> list[str]:
        pulled = 100 * kind.pulled
        return [f"{kind.threshold:+.3f}", f"{pulled:.1f} %", f"{100 - pulled:.1f} %", f"{kind.force:+.3f}"]

    head = ["thresholds", "within", "pulls", "pushes", "net force", "across", "pulls", "pushes", "net force"]
    body = [[name_of(variant), *cells(within), *cells(across)] for variant, (within, across) in rows]
    return aligned([head, *body])


def name_of(variant: Variant) -> str:
    return "threshold" if variant.granularity is None else f"granularity {variant.granularity:g}"


def closeness_picture(measured: Similarity, rows: Sequence[Row], title: str) -> Image:
    """A histogram of each kind of pairs, with a mark at every threshold."""
    panels = {}
    for place, kind in enumerate((measured.within, measured.across)):
        applied = {name_of(variant): kinds[place] for variant, kinds in rows}
        marks = {f"{name}: {k.threshold:+.3f} pulls {100 * k.pulled:.0f} %": k.threshold for name, k in applied.items()}
        panel = f"{KINDS[place]} images: {kind.pairs / 1e6:.3g} million pairs"
        panels[panel] = Histogram(kind.edges.tolist(), kind.counts.tolist(), kind.mean, marks)
    note = "pairs right of a threshold are pulled together, those left of it pushed apart"
    return histograms_picture(panels, title, note)


def closeness_record(measured: Similarity, rows: Sequence[Row]) -> dict[str, Any]:
    """All figures, ready for JSON."""
    record: dict[str, Any] = {"squares": measured.squares, "squares_counted": measured.counted}
    for name, kind in zip(KINDS, (measured.within, measured.across)):
        record[name] = {
            "mean": kind.mean,
            "std": kind.std,
            "quantiles": dict(zip(map(str, SHARES), kind.quantiles(SHARES))),
            "pairs": kind.pairs,
            "histogram": {"low": kind.limits[0], "high": kind.limits[1], "counts": kind.counts.tolist()},
        }
    record["thresholds"] = [{"name": name_of(variant)} for variant, _ in rows]
    for entry, (_, kinds) in zip(record["thresholds"], rows):
        for name, effect in zip(KINDS, kinds):
            entry[name] = {"threshold": effect.threshold, "pulled": effect.pulled, "net_force": effect.force}
    return record
