"""python tests/killed_extraction.py IMAGES KILLS [SEED]: an extraction of as many small pictures, killed with SIGKILL at random moments.

Each moment is tried on an empty cache, with one rerun that is left to end; then all of them in a row on one cache, one run after the other
on what the one before left. In the end a store must be the undisturbed one's, file by file and byte for byte; exit code 1 where it is not.
Runs are forks of this process, so that PyTorch is imported once; they say when they start, and moments are shares of the time that an
undisturbed run takes from there.
"""

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from textures import draw

from smooseg_fast import store
from smooseg_fast.backbones.filterbank import Filterbank
from smooseg_fast.datasets import open_dataset
from smooseg_fast.extract import open_or_extract

SIZE, ROWS = 64, 24  # pixels of a square, squares of a shard


def make_pictures(folder, count):
    """A few of them cannot be read."""
    folder.mkdir()
    for number in range(count):
        path = folder / f"{number:04d}.png"
        height, width = (int(side) for side in np.random.default_rng(number).integers(40, 130, 2))
        Image.fromarray(draw(number, height, max(width, 45))[0]).save(path)
        if number % 83 == 40:
            path.write_bytes(b"no image")


def start(photos, cache):
    """-> the number of the process, and the end of a pipe that gets a byte when it begins to extract."""
    begun, tell = os.pipe()
    child = os.fork()
    if child:
        os.close(tell)
        return child, begun
    torch.set_num_threads(1)
    store.SHARD_BYTES = ROWS * (SIZE // 8) ** 2 * 104 * 2
    os.write(tell, b"!")
    open_or_extract(open_dataset(photos, "train"), Filterbank(), size=SIZE, crops="slide", cache=cache, progress=False)
    os._exit(0)


def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(photos, cache, seconds=None):
    """-> the exit code and the seconds that it took; killed after `seconds`."""
    child, begun = start(photos, cache)
    os.read(begun, 1)
    os.close(begun)
    since = time.perf_counter()
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return ended(child), time.perf_counter() - since


def content(cache):
    return {str(path.relative_to(cache)): path.read_bytes() for path in sorted(cache.rglob("*")) if path.is_file()}


def main(images, kills, seed):
    sys.stderr = open(os.devnull, "w")  # what is skipped is said by every run
    wrong, rng = [], random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        photos, place = Path(place, "photos"), Path(place)
        make_pictures(photos, images)
        code, whole = run(photos, place / "undisturbed")
        assert code == 0
        expected = content(place / "undisturbed")
        print(f"undisturbed {whole:.2f} s, {sum(name.endswith('.safetensors') for name in expected)} shards", flush=True)
        moments = [rng.uniform(0, 1) for _ in range(kills)]
        for moment in moments:
            killed, _ = run(photos, place / "each", moment * whole)
            kept = len(list((place / "each").rglob("*.safetensors"))) if (place / "each").exists() else 0
            code, took = run(photos, place / "each")
            same = content(place / "each") == expected
            print(
                f"killed at {moment:.2f} ({killed}), {kept} files kept; rerun {code} in {took:.2f} s; {'same' if same else 'OTHER'}",
                flush=True,
            )
            wrong += [moment] * (not same or code != 0)
            shutil.rmtree(place / "each")
        codes = [run(photos, place / "row", moment * 2 * whole / kills)[0] for moment in moments]
        code, _ = run(photos, place / "row")
        same = content(place / "row") == expected
        print(f"in a row {codes}, then {code}; {'same' if same else 'OTHER'}")
        wrong += ["row"] * (not same or code != 0)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0))
