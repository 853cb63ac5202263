"""NumPy: an archive .npz with the labels of every image, and the groups."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from .archive import entry
from .job import Extras, Job


def write(job: Job, target: Path) -> Extras:
    """Write to `target` the labels uint8 [H,W] of every image under labels/NAME, and the arrays images [N], groups [K],
    names [K] and colours uint8 [K,3]."""
    names = []
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=4) as archive:

        def add(name: str, array: np.ndarray) -> None:
            info = entry(f"{name}.npy")
            info.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(info, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)

        for image in job.images:
            add(f"labels/{image.name}", image.labels)
            names.append(image.name)
        add("images", np.array(names, str))
        add("groups", np.array(list(job.groups), np.int64))
        add("names", np.array([group.name for group in job.groups.values()], str))
        add("colours", np.array([group.colour for group in job.groups.values()], np.uint8).reshape(-1, 3))
    return Extras()
