"""Report what every shipped Triton kernel compiles to, without a GPU: registers, spills, instructions, waves, faults.

    python benchmarks/aot_report.py                                    # prints a line a kernel, for all targets
    python benchmarks/aot_report.py --target sm_90 --quick             # one target, the launches of a training step
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
from functools import partial
from pathlib import Path

if os.environ.pop("TRITON_INTERPRET", None):
    raise SystemExit("TRITON_INTERPRET is set: interpreted functions cannot be compiled, unset it first")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels" / "torch-ext"))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from smooseg_kernels.triton import assignment, code_rows, objective, pairs, similarity
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
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
STORES = ("ST", "RED.", "REDG", "REDS", "ATOM", "BAR", "UTM", "UBLKCP", "SYNCS")  # their first operand is read
MATRIX = r"wgmma\.mma_async|tcgen05\.mma|(?<![\w.])mma\.sync|v_mfma_\w+"
MMA = r"(#mma\d*) = #ttg\.(?:nvidia|amd)_(?:mma|mfma)<\{.*?warpsPerCTA = \[(\d+), (\d+)\].*?instrShape = \[(\d+), (\d+)"
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "launch_pdl", "launch_cooperative_grid")
# bytes of stack that a kernel of fp32 operands may have: each product is three of tf32, and the label rows of one head
# need more than 255 registers in every setting tried
FP32_STACK = 96
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


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def objective_case(dtype: torch.dtype, H: int, entries=(-1, 0), *, full=False, scaled=False) -> None:
    """Forward and backward. `scaled`: channel masks of dropout; `full`: every option, every upstream gradient."""
    B, P, D, Z, K, T = 32, 784, 384, 64, 27, len(entries)
    features, codes = tensor(B, P, D, dtype=dtype), tensor(H, B, P, Z, dtype=dtype)
    student, teacher = tensor(H, K, Z), tensor(H, K, Z)
    partners, thresholds = tensor(1, B, dtype=torch.int64), tensor(H, T)
    scale, weight = tensor(B, D) if full or scaled else None, tensor(B, P) if full else None
    common = (features, codes, student, teacher, partners, entries, thresholds, scale, weight)
    out = objective.objective.launcher(*common, None, None, 0.1, full, True, True, True)
    upstream = [x if full or i == 0 else None for i, x in enumerate(out[:4])]
    objective.objective_backward.launcher(*upstream, *common, out[4], list(out[5:]), 0.1, full, True, True, True)


def rows_case(dtype: torch.dtype) -> None:
    codes, prototypes = tensor(1, 32, 784, 64, dtype=dtype), tensor(1, 27, 64)
    out = code_rows.probabilities.launcher(codes, prototypes, 0.1)
    code_rows.probabilities_backward.launcher(out, codes, prototypes, 0.1)
    code_rows.data_term.launcher(codes, prototypes, prototypes, None, True)
    labels = tensor(32, 320, 320, dtype=torch.uint8)
    assignment.assign.launcher(codes[0], prototypes[0], [28, 28], [320, 320], labels, 27)


def statistics_case(dtype: torch.dtype, entries: tuple[int, ...] = (-1,), full: bool = False) -> None:
    """Means, histogram and 32 neighbours; `full`: centred, weighted, the most bins and neighbours."""
    features, partners = tensor(32, 784, 384, dtype=dtype), tensor(1, 32, dtype=torch.int64)
    weight = tensor(32, 784) if full else None
    bins, neighbours = (similarity.LARGEST_BINS, similarity.LARGEST_NEIGHBOURS) if full else (512, 32)
    rows = (features, partners, list(entries), weight, None)
    similarity.similarity_statistics.launcher(*rows, True, bins, -1.5, 1.5, neighbours)


def pairs_case(dtype: torch.dtype, points: int = 784, full: bool = False, D: int = 384, Z: int = 70) -> None:
    """Forward and backward; `full`: a partner index, hinge, and upstream gradients to both outputs."""
    rows, number = (tensor(32, points, D, dtype=dtype), tensor(32, points, Z, dtype=dtype)), tensor()
    partner = tensor(32, dtype=torch.int64) if full else None
    common = (*rows, *rows, number, partner)
    out = pairs.pair_energy.launcher(*common, 0.0, 0.8, full, True, True)
    upstream = (number, number if full else None)
    pairs.pair_energy_backward.launcher(*upstream, *common, list(out[2:]), 0.0, 0.8, full, True, True, True)


def shipped_cases(quick: bool = False) -> dict:
    """Calls by name; `quick`: the launches of a training step alone."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    cases = {
        "bf16 dropout": partial(objective_case, bf16, 1, scaled=True),
        "bf16 dropout, H=16": partial(objective_case, bf16, 16, scaled=True),
        "bf16 pairs": partial(pairs_case, bf16),
    }
    if quick:
        return cases
    for name, dtype, heads in (("bf16", bf16, 1), ("bf16", bf16, 16), ("fp16", fp16, 1), ("fp32", fp32, 1)):
        cases[f"{name} H={heads}"] = partial(objective_case, dtype, heads)
    for name, dtype, heads in (("bf16", bf16, 1), ("bf16", bf16, 16), ("fp16", fp16, 16)):
        title = f"{name} every option" + (f", H={heads}" if heads > 1 else "")
        cases[title] = partial(objective_case, dtype, heads, (-1, 0, -2), full=True)
    cases |= {
        "bf16 pairs, P=121": partial(pairs_case, bf16, 121),
        "bf16 pairs, options": partial(pairs_case, bf16, full=True),
        "fp32 pairs": partial(pairs_case, fp32),
        "bf16 pairs, D=768": partial(pairs_case, bf16, D=768),
        "bf16 pairs, Z=200": partial(pairs_case, bf16, Z=200),
    }
    for name, dtype in (("bf16", bf16), ("fp32", fp32)):
        cases[f"{name} rows"] = partial(rows_case, dtype)
        cases[f"{name} statistics"] = partial(statistics_case, dtype)
        cases[f"{name} statistics, every option"] = partial(statistics_case, dtype, (0, -2), full=True)
    return cases


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


def tool(name: str, *arguments: str, cubin: bytes) -> str:
    """The text that one of CUDA's tools prints about a binary."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(cubin)
        command = [str(TOOLS / name), *arguments, str(binary)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class Code:
    """A program's instructions in the order of their addresses, and its loops as sets of their places."""

    def __init__(self, disassembly: str):
        self.instructions: list[str] = []
        labels: dict[str, int] = {}
        for label, text in re.findall(r"^(\.L\w+):|/\*[0-9a-f]{4,}\*/\s+(.*?);", disassembly, re.MULTILINE):
            if label:
                labels[label] = len(self.instructions)
            elif text.strip() != "NOP":
                self.instructions.append(text)
        self.loops = natural_loops([self.next_places(i, labels) for i in range(len(self.instructions))])

    def next_places(self, place: int, labels: dict[str, int]) -> list[int]:
        """The places to which the program may go from `place`."""
        text, following = self.instructions[place], [place + 1] * (place + 1 < len(self.instructions))
        jump = re.search(r"\bBRA\b(.*)`\((\.L\w+)\)", text)
        if jump:
            return [labels[jump[2]], *(following if text.startswith("@") or "P" in jump[1] or "DIV" in jump[1] else [])]
        return [] if re.match(r"(EXIT|RET)\b", text) else following

    def places(self, operation: str) -> set[int]:
        return {i for i, text in enumerate(self.instructions) if operation in text}


def natural_loops(edges: list[list[int]]) -> list[set[int]]:
    """The loops of a graph that is entered at 0: sets of nodes, one a node to which an edge from inside goes back.

    An edge goes back where every way to its start leads through its end, so a jump from code that was moved out of
    line is none.
    """
    before = [[] for _ in edges]
    for i, following in enumerate(edges):
        for j in following:
            before[j].append(i)
    loops: dict[int, set[int]] = {}
    for start, end in [(i, j) for i, following in enumerate(edges) for j in following if j < i]:
        body, new = {end}, [start]
        while new:
            node = new.pop()
            if node not in body:
                body.add(node)
                new += before[node]
        if end == 0 or 0 not in body:  # else a way from the entry to `start` avoids `end`
            loops.setdefault(end, set()).update(body)
    return list(loops.values())


def per_row(code: Code, warps: int, arguments: dict) -> float | None:
    """Instructions of all warps for one row of codes and one head, where a kernel computes a softmax of it.

    In a loop over tiles of rows those of all outermost loops, as one of them may go over the same tiles again; else the
    whole program, up to where all but a few programs leave it. A loop in them is one over channels.
    """
    rows = arguments.get("codes_ptr", arguments.get("rows_ptr"))
    exponentials = code.places("MUFU.EX2")
    if not exponentials or rows is None or rows.dim() != 4 or "BLOCK_P" not in arguments:
        return None
    outer = [loop for loop in code.loops if not any(loop < other for other in code.loops)]
    over_rows = any(loop & exponentials for loop in outer)
    trips = -(-arguments["D"] // arguments["BLOCK_D"]) if {"D", "BLOCK_D"} <= set(arguments) else 1
    inner = [loop for loop in code.loops if not over_rows or loop not in outer]
    count = sum(map(len, outer)) if over_rows else first_exit(code)
    count += (trips - 1) * sum(map(len, inner))
    return round(count * warps / (arguments["BLOCK_P"] * arguments.get("HEADS", 1)), 1)


def first_exit(code: Code) -> int:
    """The instructions up to the first exit after the last exponential: few programs have more to do."""
    last = max(code.places("MUFU.EX2"), default=0)
    return min(i + 1 for i in code.places("EXIT") if i > last)


def copies(ttgir: str) -> int | None:
    """How many warps at most compute the same part of a product; None without a matrix instruction in registers."""
    counts = []
    for name, *numbers in re.findall(MMA, ttgir):
        down, across, rows, columns = map(int, numbers)
        for height, width in re.findall(rf"tensor<(\d+)x(\d+)x\w+, {name}>", ttgir):
            if min(int(height), int(width)) > 1:  # not a column of sums
                counts.append(max(1, down * rows // int(height)) * max(1, across * columns // int(width)))
    return max(counts, default=None)


def unset_registers(code: Code) -> list[str]:
    """Uniform registers that instructions read and none writes.

    The assembler that came with Triton 3.6 lost the addresses of a matrix instruction's later operands: the product of
    codes and their gradients was wrong on a card, with no other sign of it. A matrix descriptor gdesc[URn] names the
    first of four registers, of which an operand in registers leaves two unused, so descriptors do not count as reads.
    """
    read, written = set(), set()
    for text in code.instructions:
        text = re.sub(r"^@!?U?P\w+\s+|gdesc\[UR\d+\]", "", text)
        operation, _, operands = text.partition(" ")
        target, *rest = (x.strip() for x in operands.split(","))
        while re.match(r"U?P(\d|T)", target) and rest:  # predicates that come out before the register
            target, *rest = rest
        if re.fullmatch(r"UR\d+", target) and not operation.startswith(STORES):
            count = 4 if ".128" in operation else 2 if re.search(r"\.64|\.WIDE", operation) else 1
            written.update(range(int(target[2:]), int(target[2:]) + count))
        else:
            rest = [target, *rest]
        read.update(int(n) for x in rest for n in re.findall(r"\bUR(\d+)\b", x))
    return [f"UR{n}" for n in sorted(read - written)]


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
        f"spills {row['spills']}": row["spills"] > (FP32_STACK if row["case"].startswith("fp32") else 0),
        f"reads {', '.join(unset)}, which nothing writes": unset,
        f"{shared} bytes of shared memory, the card has {limit}": shared > limit,
        "no matrix instruction": needs_matrix and not row["matrix"],
        f"{row['rows']} rows for {row['warps']} warps, which compute copies": row.get("per_row") is not None
        and row["rows"] < ROWS_A_WARP * row["warps"],
    }
    return [text for text, present in conditions.items() if present]


def line(row: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in row.items())


def with_other_triton(folder: Path, targets: list[str], quick: bool) -> list[dict]:
    """The rows of this report by the version of Triton in `folder`, from a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "rows.csv"
        command = [sys.executable, __file__, "--csv", str(path), *(f"--target={target}" for target in targets)]
        search = os.pathsep.join([str(folder.resolve()), os.environ.get("PYTHONPATH", "")])
        subprocess.run([*command, *["--quick"] * quick], env={**os.environ, "PYTHONPATH": search})
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all")
    parser.add_argument("--quick", action="store_true", help="the launches of a training step alone")
    parser.add_argument("--triton", action="append", type=Path, default=[], metavar="FOLDER")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    targets = args.target or list(TARGETS)
    rows = [row for target in targets for row in report(target, shipped_cases(args.quick))]
    rows += [row for folder in args.triton for row in with_other_triton(folder, targets, args.quick)]
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
