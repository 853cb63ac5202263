"""python tests/killed_extraction.py IMAGES KILLS [SEED]: kill an extraction of small pictures at random moments.

It tries each moment on an empty cache, with one rerun that is left to end; then all moments in a row on one cache,
where every run resumes the one before. In the end the files must be those of an undisturbed run, byte for byte; the
exit code is 1 where they are not. Runs are forks of this process, so that PyTorch is imported once. A moment is a
number of shards and a share of the time that one takes, so that it comes however busy the machine is.
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

from smooseg_fast.backbones.filterbank import DIM, PATCH, Filterbank
from smooseg_fast.datasets import open_dataset
from smooseg_fast.features import store
from smooseg_fast.features.extract import open_or_extract
from smooseg_fast.features.job import FeatureOptions

SIZE, ROWS = 64, 32  # pixels of a square, squares of a shard


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
    child = os.fork()
    if child:
        return child
    torch.set_num_threads(1)
    store.SHARD_BYTES = ROWS * (SIZE // PATCH) ** 2 * DIM * 2
    options = FeatureOptions(size=SIZE, crops="slide", cache=cache, progress=False)
    open_or_extract(open_dataset(photos, "train"), Filterbank(), options)
    os._exit(0)


def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(photos, cache, shards=None, seconds=0.0):
    """-> the exit code; killed `seconds` after the cache has as many `shards`."""
    child = start(photos, cache)
    if shards is not None:
        while kept(cache) < shards:
            time.sleep(0.001)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return ended(child)


def kept(cache):
    return sum(path.name.startswith("shard") for path in cache.rglob("*.safetensors"))


def content(cache):
    return {str(path.relative_to(cache)): path.read_bytes() for path in sorted(cache.rglob("*")) if path.is_file()}


def main(images, kills, seed):
    sys.stderr = open(os.devnull, "w")  # every run reports what it skips
    wrong, rng = [], random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        photos, place = Path(place, "photos"), Path(place)
        make_pictures(photos, images)
        began = time.perf_counter()
        code = run(photos, place / "undisturbed")
        whole, total = time.perf_counter() - began, kept(place / "undisturbed")
        assert code == 0
        expected = content(place / "undisturbed")
        print(f"undisturbed {whole:.2f} s, {total} shards", flush=True)
        for _ in range(kills):
            moment = rng.uniform(0, total - 1)
            killed = run(photos, place / "each", int(moment), moment % 1 * whole / total)
            left = kept(place / "each")
            code = run(photos, place / "each")
            same = content(place / "each") == expected
            print(f"killed ({killed}) with {left} shards; rerun {code}; {'same' if same else 'OTHER'}", flush=True)
            wrong += [moment] * (not same or code != 0 or killed != -signal.SIGKILL)
            shutil.rmtree(place / "each")
        moments = sorted(rng.uniform(0, total - 1) for _ in range(kills))
        codes = [run(photos, place / "row", int(moment), moment % 1 * whole / total) for moment in moments]
        code = run(photos, place / "row")
        same = content(place / "row") == expected
        print(f"in a row {codes}, then {code}; {'same' if same else 'OTHER'}")
        wrong += ["row"] * (not same or code != 0)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0))
