"""Times settings of one kernel on this GPU and prints a ranking, from which a person edits the data files.

    python benchmarks/tune.py                                 # kernels of a training step, H=1 and H=16, a minute each
    python benchmarks/tune.py --kernel energy_gradient --heads 16 --seconds 120
    python benchmarks/tune.py --kernel pair_tiles --heads 1   # energies of pairs, all 784 patches

A setting must pass the error budget first. The whole forward and backward is timed under a CUDA graph, since one
kernel's blocks change what the next finds in the cache.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import measure
import problems
import torch
from problems import PairProblem, Problem

from smooseg_kernels.triton import launch

LAUNCH = dict(num_warps=(4, 8), num_stages=(2, 3, 4))
BLOCKS = dict(BLOCK_P=(32, 64, 128), BLOCK_D=(32, 64, 128))
SPACES = {
    "image_moments": dict(PROGRAMS=(64, 96, 128, 192, 256), HEADS=(1, 2), TILES=(1, 2, 3), BLOCK_P=(32, 64))
    | dict(BLOCK_D=(64, 128), **LAUNCH),
    "pair_sums": dict(BLOCK_D=(16, 32, 64, 128), num_warps=(2, 4, 8), num_stages=(1,)),
    "energy_gradient": dict(HEADS=(1, 2, 4), **BLOCKS, **LAUNCH),
    "pair_tiles": dict(RESIDENT=(0, 1, 4, 6), BLOCK_M=(64, 128), BLOCK_N=(16, 32, 64, 128), BLOCK_D=(64, 128))
    | dict(num_warps=(4, 8), num_stages=(1, 2, 3, 4)),
    "row_norms": dict(BLOCK_P=(4, 8, 16, 32), BLOCK_D=(128, 512), num_warps=(4, 8), num_stages=(1, 2)),
}


def rank(kernel: str, heads: int, seconds: float) -> None:
    """Times the shipped setting, then the space in a fixed random order, for `seconds`, and prints the best eight."""
    subject, problem = ("pairs", PairProblem()) if kernel == "pair_tiles" else ("objective", Problem(H=heads))
    subjects = problems.rotation(subject, problem, "triton", "forward + backward", "bfloat16", "cuda")
    run, ranking, stop_s = measure.in_turn([one.run for one in subjects]), [], time.perf_counter() + seconds
    launch.OVERRIDES.clear()
    shipped = launch.config(kernel, torch.empty(0, dtype=torch.bfloat16, device="cuda"), heads)
    settings = [dict(zip(SPACES[kernel], values)) for values in itertools.product(*SPACES[kernel].values())]
    random.Random(0).shuffle(settings)
    for setting in [shipped, *(setting for setting in settings if setting.get("HEADS", 1) <= heads)]:
        if time.perf_counter() > stop_s:
            break
        launch.OVERRIDES[kernel] = setting
        try:
            subjects[0].check(subjects[0].run())
            timing = measure.timed(measure.captured(run)[0], "cuda", len(subjects), seconds=0.1)
            ranking.append((timing["median_ms"], setting))
        except Exception as error:  # does not fit the card, or is wrong: no candidate
            print(f"{kernel} H={heads} {setting}: {type(error).__name__}: {str(error)[:120]}")
            torch.cuda.synchronize()
    launch.OVERRIDES.clear()
    print(f"\n{kernel} H={heads}: {len(ranking)} settings; shipped {ranking[0][0] * 1e3:.1f} us" if ranking else "none")
    for median_ms, setting in sorted(ranking, key=lambda row: row[0])[:8]:
        print(f"  {median_ms * 1e3:8.1f} us  {setting}", flush=True)


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
