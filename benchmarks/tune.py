"""Times settings of one kernel on this GPU and prints a ranking; a person edits the data files. Nothing tunes by itself.

    python benchmarks/tune.py                                   # every kernel of the objective, H=1 and H=16, a minute each
    python benchmarks/tune.py --kernel energy_gradient --heads 16 --seconds 120
    python benchmarks/tune.py --kernel pair_tiles --heads 1      # of energies of pairs, at all 784 patches

Each setting must pass the error budget first; it is the whole forward and backward that is timed, under a CUDA graph, since one kernel's
blocks change what the next finds in the cache.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import gpu
import measure
import torch

from smooseg_kernels.triton import launch

WARPS = {"num_warps": (4, 8), "num_stages": (2, 3, 4)}
SPACES = {
    "image_moments": {
        "PROGRAMS": (64, 96, 128, 192, 256),
        "HEADS": (1, 2),
        "TILES": (1, 2, 3),
        "BLOCK_P": (32, 64),
        "BLOCK_D": (64, 128),
        **WARPS,
    },
    "pair_sums": {"BLOCK_D": (16, 32, 64, 128), "num_warps": (2, 4, 8), "num_stages": (1,)},
    "energy_gradient": {"HEADS": (1, 2, 4), "BLOCK_P": (32, 64, 128), "BLOCK_D": (32, 64, 128), **WARPS},
    "pair_tiles": {
        "RESIDENT": (0, 1, 4, 6),
        "BLOCK_M": (64, 128),
        "BLOCK_N": (16, 32, 64, 128),
        "BLOCK_D": (64, 128),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3, 4),
    },
    "row_norms": {"BLOCK_P": (4, 8, 16, 32), "BLOCK_D": (128, 512), "num_warps": (4, 8), "num_stages": (1, 2)},
}


def settings_of(kernel: str, heads: int, default: dict) -> list[dict]:
    """The shipped one first, then the whole space in a fixed random order."""
    space = SPACES[kernel]
    every = [dict(zip(space, values)) for values in itertools.product(*space.values())]
    if heads == 1:
        every = [s for s in every if s.get("HEADS", 1) == 1]
    random.Random(0).shuffle(every)
    return [default, *every]


def rank(kernel: str, heads: int, seconds: float) -> list[tuple[float, dict]]:
    if kernel == "pair_tiles":
        subjects = gpu.pair_subjects(gpu.PAIRS["all_784"], "triton")
    else:
        subjects = gpu.subjects_beyond_the_cache(heads, "triton")
    ranking, stop = [], time.perf_counter() + seconds
    launch.OVERRIDES.clear()
    default = launch.config(kernel, torch.empty(0, dtype=torch.bfloat16, device=gpu.DEVICE), heads)
    for settings in settings_of(kernel, heads, default):
        if time.perf_counter() > stop:
            break
        launch.OVERRIDES[kernel] = settings
        try:
            subjects[0].check(subjects[0].run())
            runs = [subject.run for subject in subjects]
            timing = gpu.timed(measure.captured(runs)[0], len(runs), seconds=0.1)
            ranking.append((timing["median_ms"], settings))
        except Exception as error:  # does not fit the card, or is wrong: not a candidate
            print(f"{kernel} H={heads} {settings}: {type(error).__name__}: {str(error)[:120]}")
            torch.cuda.synchronize()
    launch.OVERRIDES.clear()
    print(f"\n{kernel} H={heads}: {len(ranking)} settings; shipped {ranking[0][0] * 1e3:.1f} us" if ranking else "none")
    for milliseconds, settings in sorted(ranking, key=lambda row: row[0])[:8]:
        print(f"  {milliseconds * 1e3:8.1f} us  {settings}", flush=True)
    return ranking


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=SPACES, action="append", help="default: the three of a training step")
    parser.add_argument("--heads", type=int, action="append")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each kernel and number of heads")
    args = parser.parse_args()
    for heads in args.heads or (1, 16):
        for kernel in args.kernel or ("image_moments", "pair_sums", "energy_gradient"):
            rank(kernel, heads, args.seconds)


if __name__ == "__main__":
    main()
