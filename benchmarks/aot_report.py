"""Report what every shipped Triton kernel compiles to, without a GPU: registers, spills, instructions, waves, faults.

    python benchmarks/aot_report.py                                    # prints a line a kernel, for all targets
    python benchmarks/aot_report.py --target sm_90 --amount step       # one target, the launches of a training step
    python benchmarks/aot_report.py --triton FOLDER                    # also with another version of Triton
    python benchmarks/aot_report.py --csv benchmarks/results/aot.csv   # data of docs/kernels_aot.md; then run report.py

FOLDER is the target of `pip install --no-deps --target FOLDER triton==3.6.0`. The launchers themselves run, on tensors
without memory, and their launches are compiled instead of started: kernels, arguments and alignments are those of a
card. Exits 1 where a configuration has a fault.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

if os.environ.pop("TRITON_INTERPRET", None):
    raise SystemExit("TRITON_INTERPRET is set: interpreted functions cannot be compiled, unset it first")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels" / "torch-ext"))

import triton
from aot_cases import shipped_cases
from binaries import Code, copies, per_row, tool, unset_registers
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from smooseg_kernels.triton import launch as launching

# target: (backend, architecture, warp size, bytes of shared memory one program may have)
TARGETS = {
    "sm_80": ("cuda", 80, 32, 166_912),
    "sm_86": ("cuda", 86, 32, 101_376),
    "sm_90": ("cuda", 90, 32, 232_448),
    "sm_100": ("cuda", 100, 32, 232_448),
    "gfx942": ("hip", "gfx942", 64, 65_536),
}
# number of multiprocessors (A100, A40, H100, B200), and the shared memory and warps of one, which limit its programs
MULTIPROCESSORS = {
    80: (108, 164 << 10, 64),
    86: (84, 100 << 10, 48),
    90: (132, 228 << 10, 64),
    100: (148, 228 << 10, 64),
}
REGISTERS = 65536
MATRIX = r"wgmma\.mma_async|tcgen05\.mma|(?<![\w.])mma\.sync|v_mfma_\w+"
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "launch_pdl", "launch_cooperative_grid")
ROWS_A_WARP = 16  # of the result of a matrix instruction; further warps compute copies of the same rows
FIELDS = ["triton", "target", "case", "kernel", "pass", "programs", "warps", "rows", "registers", "spills", "shared"]
FIELDS += ["shared_limit", "resident", "waves", "instructions", "per_row", "copies", "matrix", "unset", "faults"]
# modules that start kernels through `launch`, which `record` replaces
PACKAGE = [module for name, module in sys.modules.items() if name.startswith("smooseg_kernels.")]
LAUNCHERS = [module for module in PACKAGE if getattr(module, "launch", None) is launching.launch]


def record(target: str, cases: dict) -> list[tuple]:
    """Runs the operators' launchers on tensors without memory, with the configurations of `target`.

    Returns: case, kernel, grid and arguments of every launch, with Triton's own options.
    """
    launches = []

    def keep(kernel, grid, *, settings, **arguments) -> None:
        options = {name: value for name, value in settings.items() if name in kernel.arg_names or name in OPTIONS}
        launches.append((label, kernel, tuple(map(int, grid)), {**arguments, **options}))

    for module in LAUNCHERS:
        module.launch = keep
    launching.family = lambda device: target
    for label, case in cases.items():  # noqa: B007  # `keep` reads it
        case()
    return launches


class Card:
    """A card that is not there, for which Triton's own launcher specialises and compiles."""

    def __init__(self, target: str):
        backend, architecture, warp, _ = TARGETS[target]
        self.number, self.target = list(TARGETS).index(target), GPUTarget(backend, architecture, warp)

    def get_current_device(self) -> int:
        return self.number  # compiled kernels are kept by it

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def compiled_launch(kernel, grid: tuple[int, ...], arguments: dict, target: str):
    """The binary of one launch, as on a card: a second compilation there finds it in Triton's cache."""
    driver.set_active(Card(target))
    with contextlib.redirect_stdout(io.StringIO()):  # an assembler's error comes with the whole program
        return kernel.warmup(grid=grid, **arguments, enable_fp_fusion=True)


def figures(compiled, grid: tuple[int, ...], arguments: dict, target: str) -> dict:
    """The figures of one binary; those that only a binary of NVIDIA tells are missing for AMD."""
    backend, architecture, _, shared_limit = TARGETS[target]
    row = {"warps": compiled.metadata.num_warps, "shared": compiled.metadata.shared, "shared_limit": shared_limit}
    row["matrix"] = sorted(set(re.findall(MATRIX, compiled.asm["amdgcn" if backend == "hip" else "ptx"])))
    row["copies"], row["dots"] = copies(compiled.asm["ttgir"]), "tt.dot" in compiled.asm["ttir"]
    row["rows"] = arguments.get("BLOCK_P")
    # read illegal memory on an H200 under Triton 3.6, for a reason that no binary shows (results/LOG.md: "A crash")
    large = arguments.get("BLOCK_M", 0) >= 128 and compiled.metadata.num_stages >= 3
    row["crashed"] = arguments.get("ALL_PIECES") is False and large
    if backend == "hip":
        counts = re.findall(r"\.vgpr_(count|spill_count):\s*(\d+)", compiled.asm["amdgcn"])
        return row | {{"count": "registers", "spill_count": "spills"}[name]: int(count) for name, count in counts}
    usage = tool("cuobjdump", "-res-usage", cubin=compiled.asm["cubin"])
    row["registers"], row["spills"] = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # spills: the stack
    # -ndf: without its analysis of jumps it takes a quarter less time
    code = Code(tool("nvdisasm", "-c", "-ndf", cubin=compiled.asm["cubin"]))
    if any(name.startswith(("wgmma", "tcgen05")) for name in row["matrix"]):  # the others' operands have no addresses
        row["unset"] = unset_registers(code)
    row["instructions"] = len(code.instructions)
    row["per_row"] = per_row(code, row["warps"], arguments)
    processors, shared, warps = MULTIPROCESSORS[architecture]
    per_warp = -(-row["registers"] * 32 // 256) * 256  # registers are handed out in lots of 256 a warp
    limits = (REGISTERS // per_warp // row["warps"], shared // (row["shared"] + 1024), warps // row["warps"])
    return row | {"resident": min(limits), "waves": round(math.prod(grid) / (max(1, min(limits)) * processors), 2)}


def report(target: str, cases: dict, wanted: Callable[[str], bool] = lambda kernel: True) -> list[dict]:
    """A row for every kernel and set of arguments, printed as it is compiled."""
    rows, seen = [], set()
    for label, kernel, grid, arguments in record(target, cases):
        name = kernel.__name__.removesuffix("_kernel")
        if not wanted(name):
            continue
        backward = False in (arguments.get("UNIT"), arguments.get("FROM_I")) or "_gradient" in name
        row = {"triton": triton.__version__, "target": target, "case": label, "kernel": name}
        row |= {"pass": "backward" if backward else "forward", "programs": math.prod(grid)}
        try:
            compiled = compiled_launch(kernel, grid, arguments, target)
            if compiled.hash in seen:
                continue
            seen.add(compiled.hash)
            row |= figures(compiled, grid, arguments, target)
            row["faults"] = "; ".join(faults(row))
        except Exception as error:  # of the compiler or its assembler
            row["faults"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[-1]}"
        texts = {field: " ".join(value) if isinstance(value, list) else value for field, value in row.items()}
        rows.append({field: texts[field] for field in FIELDS if texts.get(field) is not None})
        print(line(rows[-1]), flush=True)
    return rows


def faults(row: dict) -> list[str]:
    unset, shared, limit = row.get("unset", []), row["shared"], row["shared_limit"]
    needs_matrix = row["dots"] and not row["case"].startswith("fp32")
    conditions = {
        f"spills {row['spills']}": row["spills"] > 0,
        "128 rows in three stages with streamed codes crashed on a card": row.get("crashed", False),
        f"reads {', '.join(unset)}, which nothing writes": unset,
        f"{shared} bytes of shared memory, the card has {limit}": shared > limit,
        "no matrix instruction": needs_matrix and not row["matrix"],
        # where a product's columns are shared out instead, no two warps compute the same
        f"{row['rows']} rows for {row['warps']} warps, which compute copies": row.get("per_row") is not None
        and row["rows"] < ROWS_A_WARP * row["warps"]
        and row.get("copies") != 1,
    }
    return [text for text, present in conditions.items() if present]


def line(row: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in row.items())


def with_other_triton(folder: Path, targets: list[str], amount: str) -> list[dict]:
    """The rows of this report by the version of Triton in `folder`, from a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "rows.csv"
        command = [sys.executable, __file__, "--csv", str(path), "--amount", amount]
        command += [f"--target={target}" for target in targets]
        search = os.pathsep.join([str(folder.resolve()), os.environ.get("PYTHONPATH", "")])
        subprocess.run(command, env={**os.environ, "PYTHONPATH": search})
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all")
    parser.add_argument(
        "--amount", choices=("all", "sample", "step"), default="all", help="which cases of aot_cases.py"
    )
    parser.add_argument("--triton", action="append", type=Path, default=[], metavar="FOLDER")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    targets = args.target or list(TARGETS)
    rows = [row for target in targets for row in report(target, shipped_cases(args.amount))]
    rows += [row for folder in args.triton for row in with_other_triton(folder, targets, args.amount)]
    if args.csv:
        with args.csv.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    faulty = [row for row in rows if row["faults"]]
    for row in faulty:
        print("FAULT", line(row))
    return int(bool(faulty))


if __name__ == "__main__":
    sys.exit(main())
