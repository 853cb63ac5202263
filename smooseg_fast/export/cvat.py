"""CVAT's "Segmentation mask 1.1": a zip of masks in the colours of their labels, and a list of these."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import UserError
from ..segment.names import Colour, as_hex
from .archive import entry
from .job import Extras, Job

BACKGROUND = (0, 0, 0)


def write(job: Job, target: Path) -> Extras:
    """Write the archive to `target` -> the labels for CVAT's constructor, to paste.

    Pixels without data are background. UserError where names or colours would not be told apart there.
    """
    colours = colours_of(job)
    table = np.zeros((256, 3), np.uint8)
    for number, group in job.groups.items():
        table[number] = group.colour
    stems = []
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:  # PNG is compressed already
        for image in job.images:
            png = io.BytesIO()
            Image.fromarray(table[image.labels]).save(png, "PNG")
            archive.writestr(entry(f"SegmentationClass/{image.stem}.png"), png.getvalue())
            stems.append(image.stem)
        lines = [f"{name}:{r},{g},{b}::" for (r, g, b), name in colours.items()]
        archive.writestr(entry("labelmap.txt"), "\n".join(["# label:color_rgb:parts:actions", *lines]) + "\n")
        archive.writestr(entry("ImageSets/Segmentation/default.txt"), "\n".join(stems) + "\n")
    about = {"type": "any", "attributes": []}
    labels = [{"name": group.name, "color": as_hex(group.colour), **about} for group in job.groups.values()]
    return Extras({"_labels.json": json.dumps(labels, indent=2, ensure_ascii=False) + "\n"})


def colours_of(job: Job) -> dict[Colour, str]:
    """The name of every colour. UserError where CVAT would not tell groups apart by them."""
    colours = {BACKGROUND: "background"}
    for group in job.groups.values():
        if ":" in group.name:
            raise UserError(f"{group.name!r}: CVAT's labelmap.txt holds no name with a colon; rename the group")
        if group.colour in colours or group.name == colours[BACKGROUND]:
            other = colours.get(group.colour, "what no group covers")
            shared = "name" if group.name == colours[BACKGROUND] else f"colour {as_hex(group.colour)}"
            raise UserError(f"{group.name!r}: shares its {shared} with {other!r} in CVAT; give the group another")
        colours[group.colour] = group.name
    return colours
