"""Picks settings of kernels on this GPU by coordinate descent, from which a person edits the data files.

    python benchmarks/tune.py --out DIR                                   # the objective with one and 16 heads, pairs
    python benchmarks/tune.py --out DIR --job "objective H=16" --kernel label_rows --seconds 60

DIR gets every setting's binaries (aot.jsonl) and time (settings.jsonl) at once, and the best so far (best.json).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import card
import torch
import tuning

from smooseg_kernels.triton import launch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--job", choices=tuning.TUNABLE, action="append", help=f"default: {', '.join(card.TUNED)}")
    parser.add_argument("--kernel", action="append", help="default: all of a job")
    parser.add_argument("--seconds", type=float, default=180.0, help="in all")
    parser.add_argument("--most", type=int, default=1000, help="settings to time for a job")
    args = parser.parse_args()
    jobs = args.job or card.TUNED
    compiler = tuning.Compiler(launch.family(torch.device("cuda")), args.out)
    compiler.start(jobs)
    for job, stop_s in tuning.shares(jobs, time.perf_counter() + args.seconds):
        tuning.Tuner(job, "cuda", args.out, compiler, stop_s=stop_s, most=args.most).run(args.kernel)
    compiler.close()
    print((args.out / "best.json").read_text())


if __name__ == "__main__":
    main()
