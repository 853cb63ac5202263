"""What got faster or slower between two results files, or between two commits, beyond noise.

    python benchmarks/compare.py old.jsonl new.jsonl
    python benchmarks/compare.py main my-branch                          # both measured here, in worktrees, in turn
    python benchmarks/compare.py main HEAD --rounds 3 --out runs/compare -- benchmarks/bench_ops.py -k objective

Commits: each gets a temporary worktree, and `python -m pytest --benchmark-only benchmarks --bench-results FILE` runs in A, B, A, B, ...
so that a drift of the machine meets both. What follows `--` goes to pytest; a path among it replaces `benchmarks`. Files: of each cell
the runs of the newest commit that measured it.

The rule. d is the logarithm of the ratio of medians, B over A, each the median over its runs. It is beyond noise when |d| exceeds all of
    log(1 + threshold)                                 what nobody wants to hear of
    2 hypot(h_A / sqrt(runs_A), h_B / sqrt(runs_B))    h: half of p20 to p80 over the median, the median over the runs: how calls spread
    4 s sqrt(1/runs_A + 1/runs_B)                      s: how one run's median spreads from run to run: the cell's own estimate, drawn to
                                                       the typical cell's with the weight of 6 runs; 2.5 % where every cell has one run
On simulated timings of 60 cells (tests/test_compare.py; a quiet machine, and one shared with other work) it speaks without a cause in
2 and 3 of 100 comparisons of two rounds, and finds a cell that is 20 % slower in 100 and 87 of 100 (three rounds: 100 and 97). With one
run a side it cannot know how runs differ: 0 and 9 false alarms in 100, 95 and 72 of 100 found.

A ceiling (a copy, a matrix product of PyTorch) is no code of ours: when one moves beyond noise the machine moved, and the table says so.
Cells whose noise is above 20 % could hide a change worth knowing: their number is printed.

Exit status: 0 nothing slower, 1 something slower, 2 no comparison (one line says why), 130 stopped by Ctrl-C. Worktrees are removed in
every case.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import cells  # noqa: E402
import results  # noqa: E402

CALLS_FACTOR, RUNS_FACTOR, ASSUMED_RUN_SPREAD, TYPICAL_WEIGHT, BLIND = 2.0, 4.0, 0.025, 6, 0.20
STOP_SECONDS = 5.0  # that a benchmark has to end by itself


class Refused(Exception):
    """No comparison; its one line says why and what to do."""


@dataclass(frozen=True)
class Side:
    """One cell on one side: a median in milliseconds and a relative half-width for each run."""

    medians: tuple[float, ...]
    half_widths: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.medians)


@dataclass(frozen=True)
class Change:
    cell: cells.Cell
    a: Side
    b: Side
    noise: float  # the ratio of medians, or its inverse, up to which nothing is said

    @property
    def ratio(self) -> float:
        return self.b.median / self.a.median

    @property
    def beyond(self) -> int:
        """1 slower, -1 faster, 0 within noise."""
        return (self.ratio > self.noise) - (self.ratio < 1 / self.noise)


def sides(rows: Iterable[results.Row], *, any_machine: bool = False) -> dict[cells.Cell, Side]:
    """Of every timed cell the runs of the newest commit that measured it."""
    found = {}
    for cell, runs in cells.collect(rows).items():
        timed = [row for row in runs.values() if row.get("median_ms", 0) > 0]
        if timed:
            timed = [row for row in timed if row.get("commit") == timed[-1].get("commit")]
            medians = tuple(row["median_ms"] for row in timed)
            half_widths = tuple(
                (row.get("p80_ms", m) - row.get("p20_ms", m)) / (2 * m) for row, m in zip(timed, medians)
            )
            found[cell._replace(machine=None, threads=None) if any_machine else cell] = Side(medians, half_widths)
    return found


def run_spreads(a: dict[cells.Cell, Side], b: dict[cells.Cell, Side]) -> dict[cells.Cell, float]:
    """Standard deviation of one run's log median in each cell of both sides, from what runs of the same code differ by."""
    own, freedom = {}, {}
    for cell in a.keys() & b.keys():
        logs = [[math.log(median) for median in side[cell].medians] for side in (a, b)]
        freedom[cell] = sum(len(values) - 1 for values in logs)
        own[cell] = sum((value - statistics.fmean(values)) ** 2 for values in logs for value in values) / max(
            freedom[cell], 1
        )
    # the median of a chi-square over its mean, nearly: the typical cell, blind to a few wild ones
    unbiased = [own[cell] / (1 - 2 / (9 * degrees)) ** 3 for cell, degrees in freedom.items() if degrees]
    typical = statistics.median(unbiased) if unbiased else ASSUMED_RUN_SPREAD**2
    return {
        cell: math.sqrt((TYPICAL_WEIGHT * typical + degrees * own[cell]) / (TYPICAL_WEIGHT + degrees))
        for cell, degrees in freedom.items()
    }


def compare(a: dict[cells.Cell, Side], b: dict[cells.Cell, Side], threshold: float = 0.05) -> list[Change]:
    """The rule above for every cell that both sides have."""
    changes, spreads = [], run_spreads(a, b)
    for cell in (cell for cell in a if cell in b):
        pair = a[cell], b[cell]
        calls = math.hypot(*(statistics.median(side.half_widths) / math.sqrt(len(side.medians)) for side in pair))
        runs = spreads[cell] * math.hypot(*(1 / math.sqrt(len(side.medians)) for side in pair))
        noise = max(math.log1p(threshold), CALLS_FACTOR * calls, RUNS_FACTOR * runs)
        changes.append(Change(cell, *pair, math.exp(noise)))
    return changes


def name(cell: cells.Cell) -> str:
    sizes = " ".join(f"{letter}{value}" for letter, value in cell.sizes)
    return " ".join(
        part for part in (cell.device, cell.case, cell.shape, sizes, cell.impl, cell.mode, cell.dtype) if part
    )


def table(changes: list[Change]) -> list[str]:
    width = max(len(name(change.cell)) for change in changes)
    lines = [f"{'':6s} {'cell':{width}s} {'A ms':>10s} {'B ms':>10s} {'B/A':>6s} {'noise':>7s} runs"]
    for change in sorted(changes, key=lambda change: -change.ratio):
        verdict = {1: "slower", -1: "faster", 0: ""}[change.beyond]
        runs = f"{len(change.a.medians)}+{len(change.b.medians)}"
        times = f"{change.a.median:10.4g} {change.b.median:10.4g} {change.ratio:6.3f} {min(100 * (change.noise - 1), 999):6.1f}%"
        lines.append(f"{verdict:6s} {name(change.cell):{width}s} {times} {runs}")
    return lines


def report(
    a: dict[cells.Cell, Side], b: dict[cells.Cell, Side], threshold: float, everything: bool
) -> tuple[list[str], int]:
    """Lines to print and the exit status. Refused when the sides have no cell in common."""
    changes = compare(a, b, threshold)
    if not changes:
        raise Refused("no cell was measured on both sides; compare the same cases, shapes and dtypes")
    ceilings = [change for change in changes if change.cell.case == "ceiling"]
    ours = [change for change in changes if change.cell.case != "ceiling"]
    moved = [change for change in ours if change.beyond]
    lines = table(ours if everything else moved) if moved or (everything and ours) else []
    slower = sum(change.beyond > 0 for change in ours)
    lines.append(f"{slower} slower, {len(moved) - slower} faster, {len(ours) - len(moved)} within noise")
    for change in ceilings:
        if change.beyond:
            word = "slower" if change.beyond > 0 else "faster"
            lines.append(
                f"the machine itself moved: {name(change.cell)} is {change.ratio:.2f} times as long ({word}); measure again"
            )
    blind = sum(change.noise > 1 + BLIND for change in ours)
    if blind:
        lines.append(
            f"too noisy to see {100 * BLIND:.0f} %: {blind} cells; more --rounds or a quieter machine would tell"
        )
    alone = [
        f"{sum(cell not in other for cell in side)} on {which} alone"
        for which, side, other in (("A", a, b), ("B", b, a))
    ]
    if set(a) != set(b):
        lines.append("cells " + ", ".join(alone))
    return lines, int(slower > 0)


def refuse_other_machines(a: list[results.Row], b: list[results.Row]) -> None:
    """Refused where a device that both sides have is not the same machine with the same number of threads."""

    def who(rows: list[results.Row], device: str) -> set[str]:
        found = (cells.identity(row) for row in rows)
        return {cells.threads_text(cell.machine, cell.threads) for cell in found if cell.device == device}

    for device in ("cpu", "cuda"):
        one, other = who(a, device), who(b, device)
        if one and other and one != other:
            described = " against ".join(" and ".join(sorted(names)) for names in (one, other))
            raise Refused(
                f"{device}: {described}; times of different machines or threads do not compare (--across-machines does it anyway)"
            )


def other_versions(a: list[results.Row], b: list[results.Row]) -> list[str]:
    lines = []
    for package in ("torch", "triton", "python", "driver"):
        one, other = ({str(row[package]) for row in rows if row.get(package)} for rows in (a, b))
        if one and other and one != other:
            lines.append(f"{package} differs: A {', '.join(sorted(one))}; B {', '.join(sorted(other))}")
    return lines


def git(*command: str) -> str | None:
    """What git prints, None where it fails."""
    done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def commit_of(revision: str) -> str:
    commit = git("rev-parse", "--verify", "--quiet", "--end-of-options", revision + "^{commit}")
    if commit is None:
        raise Refused(f"{revision}: neither a results file nor a commit or branch of {ROOT}")
    if git("grep", "-q", "-e", "--bench-results", commit, "--", "benchmarks/*.py", ":!benchmarks/compare.py") is None:
        raise Refused(f"{revision}: too old to know --bench-results; compare a later commit")
    return commit


@contextlib.contextmanager
def worktree(commit: str, path: Path) -> Iterator[Path]:
    try:
        if git("worktree", "add", "--detach", str(path), commit) is None:
            raise Refused(f"{commit[:12]}: git cannot make a worktree at {path}; see `git worktree list`")
        yield path
    finally:
        git("worktree", "remove", "--force", "--force", str(path))
        git("worktree", "prune")


def measure(tree: Path, target: Path, arguments: list[str]) -> None:
    """One run of the benchmarks of `tree`, with that tree's packages, appended to `target`. Refused where it cannot run."""
    paths = [] if any(argument.startswith("benchmarks") for argument in arguments) else ["benchmarks"]
    command = [sys.executable, "-m", "pytest", "--benchmark-only", *paths, "--bench-results", str(target), *arguments]
    ours = [str(tree), str(tree / "kernels" / "torch-ext")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*ours, *filter(None, [os.environ.get("PYTHONPATH")])])}
    environment.pop("SMOOSEG_COMMIT", None)  # it would give both trees one name
    process = subprocess.Popen(command, cwd=tree, env=environment, stdout=sys.stderr, start_new_session=True)
    try:
        status = process.wait()
    finally:
        stop(process)
    if status not in (0, 1):  # 1: a gate failed; that cell has no number, the others do
        raise Refused(f"pytest ended with status {status} in the worktree of {tree.name}; its output is above")


def stop(process: subprocess.Popen) -> None:
    """The whole group: benchmarks start processes of their own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)


def measured_commits(a: str, b: str, rounds: int, out: Path, arguments: list[str]) -> tuple[Path, Path]:
    """The results files of both sides: runs in turn, A first in each round."""
    commits = [commit_of(revision) for revision in (a, b)]
    out = out.resolve()  # pytest runs elsewhere
    out.mkdir(parents=True, exist_ok=True)
    files = out / "A.jsonl", out / "B.jsonl"
    for file in files:
        if file.exists():
            raise Refused(f"{file}: exists; remove it or name another --out")
    with tempfile.TemporaryDirectory(prefix="smooseg-compare-") as folder, contextlib.ExitStack() as trees:
        places = [trees.enter_context(worktree(commit, Path(folder) / side)) for commit, side in zip(commits, "AB")]
        for number in range(rounds):
            for side, place, commit, file in zip("AB", places, commits, files):
                print(f"round {number + 1} of {rounds}: {side}, commit {commit[:12]}", file=sys.stderr, flush=True)
                measure(place, file, arguments)
    for revision, file in zip((a, b), files):
        if not file.exists():
            raise Refused(f"{revision}: no benchmark wrote a line; look at what was selected after `--`")
    return files


def read(path: Path) -> list[results.Row]:
    try:
        return results.read([path])
    except (OSError, ValueError) as error:
        raise Refused(str(error)) from error


def run(args: argparse.Namespace, scratch: Path) -> int:
    files = [Path(side) for side in (args.a, args.b)]
    if sum(file.is_file() for file in files) == 1:
        raise Refused(f"{args.a} and {args.b}: one is a file and one is not; name two results files or two commits")
    if not files[0].is_file():
        files = measured_commits(args.a, args.b, args.rounds, args.out or scratch, args.pytest)
    a, b = (read(file) for file in files)
    if not args.across_machines:
        refuse_other_machines(a, b)
    lines, status = report(
        *(sides(rows, any_machine=args.across_machines) for rows in (a, b)), args.threshold, args.all
    )
    print("\n".join(lines + other_versions(a, b)))
    return status


def parse(arguments: list[str]) -> argparse.Namespace:
    at = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", metavar="A", help="results file, commit or branch")
    parser.add_argument("b", metavar="B")
    parser.add_argument(
        "--threshold", type=float, default=0.05, help="relative change below which nothing is said (0.05)"
    )
    parser.add_argument("--rounds", type=int, default=2, help="runs of each commit (2)")
    parser.add_argument(
        "--out", type=Path, help="folder that keeps the lines measured for commits, A.jsonl and B.jsonl"
    )
    parser.add_argument("--across-machines", action="store_true")
    parser.add_argument("--all", action="store_true", help="print the cells within noise, too")
    args = parser.parse_args(arguments[:at])
    args.pytest = arguments[at + 1 :]
    if not args.threshold > 0 or args.rounds < 1:
        parser.error("--threshold must be above 0 and --rounds at least 1")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C: the worktrees go
    try:
        with tempfile.TemporaryDirectory(prefix="smooseg-lines-") as scratch:
            return run(args, Path(scratch))
    except Refused as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("compare.py: stopped; the worktrees are removed", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
