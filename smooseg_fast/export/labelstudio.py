"""Label Studio: tasks with predictions as brush masks, and the labelling interface that shows them.

Brush masks are packed as by the library thi.ng/rle-pack: 32 bits for the number of values, 5 bits for the bits of a
value - 1, four times 4 bits for the sizes of counters - 1, then the runs. A run is a bit 1, two bits that choose the
size of its counter, its length - 1, and its value. The values are the bytes of an RGBA image, 255 in all channels of
the mask.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np

from ..datasets import IGNORE
from ..segment.names import as_hex
from ..system.stores import Remote
from .folder import Segmented
from .job import Extras, Job
from .runs import runs_of

COUNTER_BITS = (4, 8, 12, 16)
CHANNELS = 4
LOCAL = "/data/local-files/?d="  # how Label Studio names a file below its document root
IMAGE, GROUPS = "image", "groups"  # the tags of the interface


def write(job: Job, target: Path) -> Extras:
    """Write the tasks of all images to `target`, one image at a time in memory -> the labelling interface."""
    count = 0
    with open(target, "w", encoding="ascii") as file:
        file.write("[")
        for image in job.images:
            file.write("," * (count > 0) + "\n" + json.dumps(task(image, job)))
            count += 1
        file.write("\n]\n")
    return Extras({".xml": interface(job)})


def task(image: Segmented, job: Job) -> dict[str, Any]:
    """A task with one prediction, which has a brush mask for each group of the image."""
    height, width = image.size
    about = {"type": "brushlabels", "from_name": GROUPS, "to_name": IMAGE, "image_rotation": 0}
    size = {"original_width": width, "original_height": height}
    result = []
    for runs in runs_of(image.labels.ravel()):
        if runs.label != IGNORE:
            rle = packed(runs.alternating(image.labels.size))
            value = {"format": "rle", "rle": list(rle), "brushlabels": [job.groups[runs.label].name]}
            result.append({"id": f"group{runs.label}", **about, **size, "value": value})
    local = LOCAL + quote(f"{job.root.name}/{image.name}", errors="surrogateescape")
    return {
        "data": {IMAGE: str(image.file) if isinstance(image.file, Remote) else local},
        "predictions": [{"model_version": "smooseg_fast", "result": result}],
    }


def interface(job: Job) -> str:
    """The labelling interface, XML to paste."""
    labels = (
        f'    <Label value={quoteattr(group.name)} background="{as_hex(group.colour)}"/>'
        for group in job.groups.values()
    )
    lines = [
        "<View>",
        f'  <Image name="{IMAGE}" value="${IMAGE}" zoom="true"/>',
        f'  <BrushLabels name="{GROUPS}" toName="{IMAGE}">',
        *labels,
        "  </BrushLabels>",
        "</View>",
    ]
    return "\n".join(lines) + "\n"


def packed(pixels: np.ndarray) -> bytes:
    """The packed mask of alternating runs of pixels int64 [n] outside and inside, the first outside."""
    values = 255 * (np.arange(len(pixels)) % 2)
    total, longest = CHANNELS * int(pixels.sum()), 1 << COUNTER_BITS[-1]
    # runs that no counter holds are split
    parts = -(-CHANNELS * pixels // longest)
    lengths = np.full(parts.sum(), longest)
    used = np.flatnonzero(parts)
    lengths[np.cumsum(parts[used]) - 1] = (CHANNELS * pixels - (parts - 1) * longest)[used]
    values = np.repeat(values, parts)
    choice = np.searchsorted(1 << np.array(COUNTER_BITS), lengths)  # the smallest counter that holds it
    bits = np.array(COUNTER_BITS)[choice]
    words = (((4 | choice) << bits | lengths - 1) << 8) | values  # 1, choice, length - 1, value
    sizes = [bits - 1 for bits in COUNTER_BITS]
    head = np.array([total, 7, *sizes])
    return np.packbits(
        spelled(np.concatenate([head, words]), np.concatenate([[32, 5, 4, 4, 4, 4], bits + 11]))
    ).tobytes()


def spelled(numbers: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """The bits uint8 of all `numbers` int64 [n] in a row, of each its lowest `bits`, the highest first."""
    ends = np.cumsum(bits)
    shifts = np.repeat(ends, bits) - 1 - np.arange(ends[-1])
    return (np.repeat(numbers, bits) >> shifts & 1).astype(np.uint8)
