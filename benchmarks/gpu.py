"""The commands for a machine with a CUDA card that is at hand for a quarter of an hour.

    python benchmarks/gpu.py --out DIR                    # measures and picks settings, in five minutes
    python benchmarks/gpu.py --out DIR --stage tests      # the GPU tests, in two and a half minutes
    python benchmarks/gpu.py --out DIR --stage rivals     # PyTorch, dense and compiled forms, in five minutes
    python benchmarks/gpu.py --out DIR --stage profile    # Nsight Compute on the two slowest kernels, in a minute
    python benchmarks/gpu.py --smoke --out DIR            # on a CPU in Triton's interpreter, tiny sizes

It runs from a bare checkout that it does not write to, with torch, Triton, pytest, pytest-benchmark and pytest-xdist.
SMOOSEG_COMMIT gives the commit of a checkout without its history. DIR gets gpu.jsonl (form: results.py), the binaries
of all settings (aot.jsonl), their times (settings.jsonl) and the best ones (best.json). Every line is on the disk as
soon as it is measured, so a run that is cut off keeps its lines. The main stage's parts run in processes of their own,
one after the other; one that fails or takes too long does not keep the next from running. Exits 1 where a part failed
or left a line with an error.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import results

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (ROOT / "benchmarks", ROOT, ROOT / "kernels" / "torch-ext", ROOT / "tests")
# parts of card.py in the order of the main stage, and the seconds that each may take; the last takes what is left
PARTS = {
    "ceilings": 45,
    "gates": 60,
    "shipped": 60,
    "others": 60,
    "wide": 75,
    "family": 60,
    "edges": 45,
    "steps": 60,
    "settings": 1000,
}
STAGES = {"main": 300, "tests": 150, "rivals": 300, "profile": 60}  # seconds by default
RESERVE_S = 3  # of the main stage, for its summary
# a captured step first: the kernels' own tests mostly compile
TESTS = ("trainer_gpu", "triton_projection", "triton_gpu", "triton_pair_energy_gpu", "triton_contrast", "crf")
TESTS += ("pair_options", "triton_rows", "triton_objective", "triton_pair_energy", "triton_pair_sums")
TESTS += ("clamped_partners", "similarity_statistics")
# cases of bench_operators.py as pytest's -k takes them; compiled forms take minutes and come last
RIVALS = (
    "function and objective and (cityscapes_s8 or heads16) and graph and (torch or dense)",
    "head_step and cityscapes_s8 and (torch or dense)",
    "function and all_784 and graph and (torch or dense)",
    "assign and eval320 and torch",
    "compiled and heads16 and torch and graph",
    "compiled and cityscapes_s8 and torch and graph",
    "compiled and all_784 and dense and graph",
)


class Clock:
    def __init__(self, seconds: float):
        self.start_s = time.perf_counter()
        self.stop_s = self.start_s + seconds

    def left(self) -> float:
        return self.stop_s - time.perf_counter()


def run_parts(commands: dict[str, list[str]], limits: dict[str, float], clock: Clock, env: dict | None = None) -> list:
    """Starts all commands at once; each waits for a line with its seconds, which comes when the one before has ended.

    Returns: the names of those that failed, or were stopped as they took longer.
    """
    processes = {
        name: subprocess.Popen(command, stdin=subprocess.PIPE, text=True, env=env, start_new_session=True)
        for name, command in commands.items()
    }
    failed = []
    try:
        for name, process in processes.items():
            seconds = min(limits[name], clock.left() - RESERVE_S)
            print(f"== {name}: {max(0.0, seconds):.0f} s", flush=True)
            if seconds <= 0 or not ended_well(process, seconds):
                print(f"== {name} failed or was stopped", flush=True)
                failed.append(name)
    finally:
        for process in processes.values():
            stop(process)
    return failed


def ended_well(process: subprocess.Popen, seconds: float) -> bool:
    """Lets a process run for `seconds`. It gets a tenth less, so that it can end by itself."""
    try:
        process.communicate(f"{0.9 * seconds:.1f}\n", timeout=seconds)
    except (OSError, subprocess.TimeoutExpired):
        stop(process)
    return process.wait() == 0


def stop(process: subprocess.Popen) -> None:
    """Ends a process and those that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main_stage(out: Path, clock: Clock, device: str) -> list[str]:
    command = [sys.executable, __file__, "--out", str(out), "--part"]
    smoke = ["--smoke"] if device == "cpu" else []
    failed = run_parts({part: [*command, part, *smoke] for part in PARTS}, PARTS, clock)
    rows = [row for row in lines(out) if row.get("run") == os.environ["SMOOSEG_RUN"]]
    print("\n".join(["", "== summary", *results.summary(row for row in rows if not row["mode"].startswith("kernel"))]))
    for job, best in (json.loads(path.read_text()) if (path := out / "best.json").exists() else {}).items():
        print(f"{job}: {best['shipped_ms']:.4f} -> {best['median_ms']:.4f} ms {json.dumps(best['settings'])}")
    return [*failed, *(f"{row['case']} {row['mode']}: {row['error']}" for row in rows if "error" in row)]


def lines(out: Path) -> list[results.Row]:
    return results.read([path for path in [out / "gpu.jsonl"] if path.exists()])


def pytest(arguments: list[str], seconds: float, log: Path) -> bool:
    """Runs pytest with this checkout's packages and prints the end of its output, all of which is appended to `log`.

    Names come line by line, so that a run that is cut off tells what failed.
    """
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "-v", *arguments]
    with log.open("a", encoding="utf-8") as file:
        start = file.tell()
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
        try:
            status = process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            stop(process)
            status = None
    print(f"== {' '.join(arguments)[:100]}: {'stopped' if status is None else f'exit status {status}'}")
    print(log.read_text(encoding="utf-8", errors="replace")[start:][-2500:], flush=True)
    return status in (0, 5)  # 5: nothing was selected


def tests_stage(out: Path, clock: Clock, device: str) -> list[str]:
    """Tests that need a card first, then all of the kernels', as many processes as compile well beside each other."""
    files = [f"tests/test_{name}.py" for name in TESTS[: 1 if device == "cpu" else None]]
    spread = ["-n", "12"] if importlib.util.find_spec("xdist") and device == "cuda" else []
    log, failed = out / "tests.txt", []
    for marked in ("gpu", "not gpu")[: 1 if device == "cpu" else None]:
        if clock.left() < 5 or not pytest([*spread, "-m", marked, *files], clock.left(), log):
            failed.append(f"tests -m '{marked}'")
    return failed


def rivals_stage(out: Path, clock: Clock, device: str) -> list[str]:
    options = ["--benchmark-only", "--benchmark-quiet", "--bench-results", str(out / "gpu.jsonl")]
    options += ["--bench-smoke"] if device == "cpu" else []
    failed = []
    for cases in RIVALS[: 1 if device == "cpu" else None]:
        arguments = ["benchmarks/bench_operators.py", "-k", cases, *options]
        if clock.left() < 10 or not pytest(arguments, clock.left(), out / "rivals.txt"):
            failed.append(cases)
    return failed


def profile_stage(out: Path, clock: Clock, device: str) -> list[str]:
    """Nsight Compute on the slowest kernel of one head and of sixteen, as gpu.jsonl has them."""
    if not (program := shutil.which("ncu")):
        print("ncu is not on the path: no profile")
        return []
    slowest: dict[int, tuple[float, str]] = {}
    rows = lines(out)
    for row in rows:
        if row["run"] == rows[-1]["run"] and row["case"] == "objective" and row["mode"].startswith("kernel "):
            heads = row["sizes"].get("H", 1)
            slowest[heads] = max(slowest.get(heads, (0.0, "")), (row["mean_us"], row["mode"].removeprefix("kernel ")))
    failed = []
    for heads, (_, kernel) in slowest.items():
        log = out / f"ncu_{kernel}_h{heads}.txt"
        command = [program, "--clock-control", "none", "--set", "full", "-k", kernel, "--launch-skip", "1"]
        command += ["--launch-count", "1", sys.executable, __file__, "--out", str(out), "--part", f"once {heads}"]
        print(f"== {log.name}", flush=True)
        try:
            done = subprocess.run(command, input="60\n", capture_output=True, text=True, timeout=max(1, clock.left()))
            log.write_text(done.stdout + done.stderr, encoding="utf-8")
            print("\n".join(line for line in done.stdout.splitlines() if "Throughput" in line or "Occupancy" in line))
            failed += [log.name] if done.returncode else []
        except subprocess.TimeoutExpired:
            failed.append(log.name)
    return failed


def prepare(out: Path) -> None:
    """Sets what the processes of a stage inherit: this checkout's packages, one run, and a cache beside no sources."""
    out.mkdir(parents=True, exist_ok=True)
    path = [*map(str, FOLDERS), *filter(None, [os.environ.get("PYTHONPATH")])]
    cache = Path(tempfile.gettempdir()) / "smooseg-triton"  # a second command on the machine finds its binaries
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache))
    os.environ.setdefault("SMOOSEG_RUN", uuid.uuid4().hex[:12])
    os.environ |= {"PYTHONPATH": os.pathsep.join(path), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=STAGES, default="main")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results, which may exist")
    parser.add_argument("--seconds", type=float, help=f"the stage's time; default: {STAGES}")
    parser.add_argument("--smoke", action="store_true", help="on a CPU; its times mean nothing")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # run in this process, as a stage does
    args = parser.parse_args()
    device, out = "cpu" if args.smoke else "cuda", args.out.resolve()
    if args.smoke:
        os.environ["TRITON_INTERPRET"] = "1"
    if args.part:
        import card

        return card.main(args.part, out, device)
    clock = Clock(args.seconds or STAGES[args.stage])
    prepare(out)
    stage = {"main": main_stage, "tests": tests_stage, "rivals": rivals_stage, "profile": profile_stage}[args.stage]
    failed = stage(out, clock, device)
    print("\n".join([*(f"FAILED {what}" for what in failed), f"{time.perf_counter() - clock.start_s:.0f} s"]))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
