"""The parts of the page `report.html` next to its tiles: the tree, figures with what is good, labels, settings."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..config import TrainConfig
from ..segment.checkpoint import Checkpoint, Fine
from ..system.fields import flag
from .report_tiles import tree_lookup

# name in the report, name for people, what is good
FIGURES = (
    ("perplexity", "Groups in effective use", "Good is close to the number of groups: all of them are used."),
    (
        "labels_per_image",
        "Groups in one image",
        "Good is what you would count in a photo; near 1, groups stand for whole images, not for things in them.",
    ),
    (
        "image_information",
        "How much a group tells of its image",
        "0 to 1; low is good. Above about 0.7, groups sort images instead of what is in them.",
    ),
    ("largest_share", "Share of the largest group", "Good is well below 1: no group swallows everything."),
    ("agreement", "Settled labels", "0 to 1; near 1 is good: more training would change next to nothing."),
    ("modularity", "Modularity", "Higher is better: patches are closer inside groups than chance would have them."),
    (
        "explained_variance",
        "Explained variance of the features",
        "0 to 1; higher is better, and it always rises with the number of groups: compare at equal numbers.",
    ),
)


def tree_section(fine: Fine, least_share: float) -> dict[str, Any]:
    """The tree for the page: lookup tables, shares, and the typical patch of each fine group on one sheet."""
    finest, parents = tree_lookup(fine.tree, least_share)
    return {
        "finest": finest,
        "parents": [[parent, round(height, 5)] for parent, height in parents],
        "shares": [round(float(share), 6) for share in fine.tree.shares],
        "patches": None if fine.typical is None else patch_sheet(fine.typical.numpy()),
    }


def patch_sheet(patches: np.ndarray, columns: int = 16) -> dict[str, Any]:
    """Patches uint8 [n,S,S,3] side by side in one WebP, as base64; row by row."""
    count, side = patches.shape[:2]
    rows = math.ceil(count / columns)
    sheet = np.zeros((rows * columns, *patches.shape[1:]), np.uint8)
    sheet[:count] = patches
    sheet = sheet.reshape(rows, columns, side, side, 3).swapaxes(1, 2).reshape(rows * side, columns * side, 3)
    target = io.BytesIO()
    Image.fromarray(sheet).save(target, "WEBP", quality=70, method=4)
    return {"picture": base64.b64encode(target.getvalue()).decode(), "side": side, "columns": columns, "rows": rows}


def figure_rows(report: Mapping[str, Any]) -> list[list[Any]]:
    """[name, value, what is good] of the figures without labels that a report of a run has."""
    health = dict(report.get("health") or {})
    if shares := health.get("shares"):
        health["largest_share"] = max(shares)
    rows = [[title, health[name], good] for name, title, good in FIGURES if isinstance(health.get(name), int | float)]
    closeness = report.get("closeness") or {}
    if {"within", "across"} <= set(closeness):
        within, across = (closeness[part].get("mean") for part in ("within", "across"))
        if isinstance(within, float) and isinstance(across, float):
            good = "Good is clearly above 0: patches of one image resemble each other more than those of other images."
            rows.append(["Closeness within images, less that across", within - across, good])
    return rows


def why_section(report: Mapping[str, Any]) -> str:
    """Why the run took its number of groups; empty where it was given."""
    why = (report.get("tree") or {}).get("why", "")
    return why if isinstance(why, str) else ""


def label_section(scores: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The confusion table and each class's IoU, from the `scores` of a run's report; None without labels."""
    matched = (scores or {}).get("hungarian")
    if not scores or not isinstance(matched, Mapping):
        return None
    classes = matched["classes"]
    return {
        "groups": scores.get("groups"),
        "held_out": bool(scores.get("held_out")),
        "accuracy": matched["accuracy"],
        "miou": matched["miou"],
        "classes": [[part["name"], part["pixels"], part["iou"]] for part in classes],
        "matched": [part["class"] for part in matched["clusters"]],
        "confusion": scores.get("confusion"),
        "kmeans": (scores.get("kmeans") or {}).get("miou"),
    }


def setting_rows(config: TrainConfig, checkpoint: Checkpoint) -> list[list[str]]:
    """[name, value] of the settings of a run, as one would type them, and of what they led to."""
    rows = [
        ["backbone", checkpoint.backbone_name],
        ["licence of its weights", checkpoint.backbone_licence],
        ["steps taken", str(checkpoint.step)],
    ]
    for setting in dataclasses.fields(config):
        value = getattr(config, setting.name)
        if value is None or value is False or value == () or setting.name == "backbone":  # not typed
            continue
        text = " ".join(map(str, value)) if isinstance(value, tuple | list) else "on" if value is True else str(value)
        rows.append([flag(setting.name), text])
    return rows


def skipped_rows(skipped: Mapping[str, str] | Iterable[Sequence[str]] | None) -> list[list[str]]:
    """[name, reason] of the images that could not be used."""
    pairs = skipped.items() if isinstance(skipped, Mapping) else skipped or ()
    return [[str(name), str(reason)] for name, reason in pairs]
