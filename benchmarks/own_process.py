"""Times of one call in a process of its own, with memory allocated as PyTorch comes: freed blocks may go back to the system.

The suite's own process keeps freed memory, as training does, which makes every implementation faster, and dense most.

python benchmarks/own_process.py '{"case": "head step", "impl": "dense", "mode": "step", "dtype": "float32", "rounds": 5,
                                   "problem": {"B": 8}}'
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import measure
import problems
from floors import Problem

SECONDS = 300
WARM = 2


def times(case: str, problem: Problem, impl: str, mode: str, dtype: str, rounds: int) -> list[float]:
    """Starts this file as a program; -> milliseconds of each call. RuntimeError with its last line where it fails."""
    job = {"case": case, "problem": asdict(problem), "impl": impl, "mode": mode, "dtype": dtype, "rounds": rounds}
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("MALLOC_") and name != "GLIBC_TUNABLES"
    }
    command = [sys.executable, str(Path(__file__).resolve()), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise RuntimeError(f"no times of {impl} at {problem}: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])["times_ms"]


def main() -> int:
    job = json.loads(sys.argv[1])
    build = problems.SUBJECTS[job["case"]]
    subject = build(Problem(**job["problem"]), job["impl"], job["mode"], problems.DTYPES[job["dtype"]], "cpu")
    subject.check(subject.run())  # nothing wrong gets a time
    for _ in range(WARM):
        subject.run()
    print(json.dumps({"times_ms": [measure.elapsed(subject.run, "cpu") for _ in range(job["rounds"])]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
