"""CVAT's "Segmentation mask 1.1": a zip of masks in the colours of their labels, and a list of these.

It is the layout of Pascal VOC. SegmentationObject tells CVAT which pixels belong to nothing; from the classes alone it
makes shapes of them, and takes no file of a task without the label "background". One mask that CVAT cannot assign to a
frame makes it refuse the file.
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path, PurePath

import numpy as np
from PIL import Image

from ..errors import UserError
from ..segment.names import Colour, as_hex
from .archive import entry
from .folder import Segmented
from .job import Extras, Job

BACKGROUND = (0, 0, 0)


def write(job: Job, target: Path) -> Extras:
    """Write the archive to `target` -> the labels for CVAT's constructor, to paste.

    Pixels without data are background. Images that CVAT could not tell apart or find are left out. UserError where
    names or colours of groups would not be told apart there.
    """
    colours = colours_of(job)
    classes, objects = np.zeros((2, 256, 3), np.uint8)
    for place, (number, group) in enumerate(job.groups.items(), 1):
        classes[number], objects[number] = group.colour, voc_colour(place)
    stems, left_out = [], []
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:  # PNG is compressed already
        for image in job.images:
            if not is_found(image, job):
                left_out.append(image.name)
                continue
            for folder, table in (("SegmentationClass", classes), ("SegmentationObject", objects)):
                png = io.BytesIO()
                Image.fromarray(table[image.labels]).save(png, "PNG")
                archive.writestr(entry(f"{folder}/{image.stem}.png"), png.getvalue())
            stems.append(image.stem)
        lines = [f"{name}:{r},{g},{b}::" for (r, g, b), name in colours.items()]
        archive.writestr(entry("labelmap.txt"), "\n".join(["# label:color_rgb:parts:actions", *lines]) + "\n")
        archive.writestr(entry("ImageSets/Segmentation/default.txt"), "\n".join(stems) + "\n")
    about = {"type": "any", "attributes": []}
    labels = [{"name": group.name, "color": as_hex(group.colour), **about} for group in job.groups.values()]
    more = f" and {len(left_out) - 1} more" if left_out[1:] else ""
    why = "CVAT finds images by their names without suffix, and would not find these or mix them up; rename them"
    notes = (f"left out {left_out[0]!r}{more}: {why}",) if left_out else ()
    content = json.dumps(labels, indent=2, ensure_ascii=False) + "\n"
    return Extras({"_labels.json": content}, notes, len(left_out))


def is_found(image: Segmented, job: Job) -> bool:
    """Whether CVAT finds the image by its name without suffix, as a stripped line that is no comment."""
    name = PurePath(image.name).with_suffix("").as_posix()
    is_line = name.strip().splitlines() == [name] and not name.startswith("#")
    return is_line and image.is_file and image.stem == name and job.folder.names_without_suffix[name] == 1


def voc_colour(number: int) -> Colour:
    """The colour of an object in Pascal VOC: its bits, dealt to red, green and blue in turn from the highest down."""
    red, green, blue = (sum((number >> 3 * i + channel & 1) << 7 - i for i in range(3)) for channel in range(3))
    return red, green, blue


def colours_of(job: Job) -> dict[Colour, str]:
    """The name of every colour. UserError where CVAT would not tell groups apart by them."""
    colours = {BACKGROUND: "background"}
    for group in job.groups.values():
        if ":" in group.name or group.name.startswith("#"):
            what = "with a colon" if ":" in group.name else "that begins with #"
            raise UserError(f"{group.name!r}: CVAT's labelmap.txt holds no name {what}; rename the group")
        if group.colour in colours or group.name == colours[BACKGROUND]:
            other = colours.get(group.colour, "what no group covers")
            shared = "name" if group.name == colours[BACKGROUND] else f"colour {as_hex(group.colour)}"
            raise UserError(f"{group.name!r}: shares its {shared} with {other!r} in CVAT; give the group another")
        colours[group.colour] = group.name
    return colours
