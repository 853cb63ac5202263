"""COCO annotations: compressed run-length masks, as pycocotools reads them.

The format is that of COCO-Stuff: an annotation for each group of an image, with iscrowd 0. With instances, one for each
connected region. Categories count from 1, because many readers take 0 for the background: category = group + 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..datasets import IGNORE
from .folder import Segmented
from .job import Extras, Job
from .runs import Runs, regions, runs_of


def write(job: Job, target: Path) -> Extras:
    """Write the annotations of all images to `target`, one image at a time in memory."""
    images: list[str] = []
    count = 0
    with open(target, "w", encoding="ascii") as file:
        start = {"info": {"description": f"groups of {job.root.name}, by smooseg_fast"}, "licenses": []}
        categories = [
            {"id": group.number + 1, "name": group.name, "supercategory": "group", "color": list(group.colour)}
            for group in job.groups.values()
        ]
        file.write(json.dumps({**start, "categories": categories})[:-1] + ', "annotations": [')
        for number, image in enumerate(job.images, 1):
            height, width = image.size
            about = {"id": number, "file_name": image.name, "width": width, "height": height}
            images.append(json.dumps(about))
            for annotation in annotations_of(image, job):
                count += 1
                file.write("," * (count > 1) + "\n" + json.dumps({"id": count, "image_id": number, **annotation}))
        file.write('\n], "images": [\n' + ",\n".join(images) + "\n]}\n")
    return Extras()


def annotations_of(image: Segmented, job: Job) -> Iterator[dict[str, Any]]:
    """The annotations of an image, without their numbers."""
    height, width = image.size
    labels, owners = image.labels, np.arange(256)
    if job.instances:
        labels, owners = regions(labels)
    for runs in runs_of(labels.ravel(order="F")):  # COCO counts down the columns
        group = int(owners[runs.label])
        if group == IGNORE or (job.instances and runs.pixels < job.min_area):
            continue
        yield {
            "category_id": group + 1,
            "segmentation": {"size": [height, width], "counts": compressed(runs.alternating(labels.size))},
            "area": runs.pixels,
            "bbox": box_of(runs, height),
            "iscrowd": 0,
        }


def box_of(runs: Runs, height: int) -> list[int]:
    """[left, top, width, height] of runs down the columns of an image of this height."""
    last = runs.starts + runs.lengths - 1
    left, right = int(runs.starts[0] // height), int(last[-1] // height)
    if np.any(runs.starts // height != last // height):  # over the end of a column to the top of the next
        return [left, 0, right - left + 1, height]
    top, bottom = int((runs.starts % height).min()), int((last % height).max())
    return [left, top, right - left + 1, bottom - top + 1]


def compressed(counts: np.ndarray) -> str:
    """COCO's text for the lengths int64 [n] of alternating runs.

    Each length but the first three is replaced by its difference to the one two before, and written in signed digits of
    five bits, the lowest first; a sixth bit says that more follow, and 48 makes each a printable character.
    """
    rest = counts.copy()
    rest[3:] -= counts[1:-2]
    digits, used, due = [], [], np.ones(len(counts), bool)
    while due.any():
        low, rest = rest & 31, rest >> 5
        more = np.where(low & 16, rest != -1, rest != 0)
        digits.append(low + 32 * more + 48)
        used.append(due)
        due = due & more
    return np.stack(digits, 1)[np.stack(used, 1)].astype(np.uint8).tobytes().decode("ascii")
