"""Report what every shipped Triton kernel compiles to, without a GPU: registers, spills, shared memory, matrix unit.

    python benchmarks/aot_report.py                                    # prints a line a kernel, for all targets
    python benchmarks/aot_report.py --target sm_90 --quick             # one target, the launches of a training step
    python benchmarks/aot_report.py --csv benchmarks/results/aot.csv   # data of docs/kernels_aot.md; then run report.py

The launchers themselves run, on tensors without memory, and their launches are compiled instead of started: kernels,
arguments and alignments are those of a card. Exits 1 where a configuration has a fault.
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
from functools import partial
from pathlib import Path

if os.environ.pop("TRITON_INTERPRET", None):
    raise SystemExit("TRITON_INTERPRET is set: interpreted functions cannot be compiled, unset it first")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels" / "torch-ext"))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

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
# shared memory and warps of one multiprocessor: they limit how many programs it holds at once
MULTIPROCESSORS = {80: (164 << 10, 64), 86: (100 << 10, 48), 90: (228 << 10, 64), 100: (228 << 10, 64)}
REGISTERS = 65536
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
STORES = ("ST", "RED.", "REDG", "REDS", "ATOM", "BAR", "UTM", "UBLKCP", "SYNCS")  # their first operand is read
MATRIX = r"wgmma\.mma_async|tcgen05\.mma|(?<![\w.])mma\.sync|v_mfma_\w+"
FIELDS = ["target", "case", "kernel", "pass", "programs", "warps", "registers", "spills", "shared", "shared_limit"]
FIELDS += ["resident", "matrix", "unset", "faults", "triton"]
POINTERS = {
    **{torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"},
    **{torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8"},
}


def record(target: str, cases: dict) -> list[tuple]:
    """Runs the operators' launchers on tensors without memory, with the configurations of `target`."""
    launches = []

    def keep(kernel, grid, *, settings, **arguments) -> None:
        switches = {kernel.arg_names[i] for i in kernel.constexprs}
        args = [arguments.pop(name) for name in kernel.arg_names if name in arguments and name not in switches]
        launches.append((label, kernel, grid, args, {**arguments, **settings}))

    for module in (objective, code_rows, assignment, pairs, similarity):
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


def signature(kernel, args, constants):
    """Types, 16-byte alignments and sizes of 1, on which Triton's own launcher specialises."""
    names = kernel.arg_names
    types, attributes, fixed = {}, {}, {}
    values = {**dict(zip(names, args)), **{n: constants[n] for n in names if n in constants}}
    for i, name in enumerate(names):
        value = values[name]
        if name in constants or (isinstance(value, int) and value == 1):
            types[name], fixed[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[name], attributes[(i,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            types[name] = "fp32"
        else:
            types[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return types, fixed, attributes


def compile_launch(kernel, args, constants, target: str) -> dict:
    backend, architecture, warp, shared_limit = TARGETS[target]
    options = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
    options["enable_fp_fusion"] = True
    source = ASTSource(kernel, *signature(kernel, args, constants))
    with contextlib.redirect_stdout(io.StringIO()):  # an assembler's error comes with the whole program
        compiled = triton.compile(source, target=GPUTarget(backend, architecture, warp), options=options)
    row = {"warps": compiled.metadata.num_warps, "shared": compiled.metadata.shared, "shared_limit": shared_limit}
    row["matrix"] = sorted(set(re.findall(MATRIX, compiled.asm["amdgcn" if backend == "hip" else "ptx"])))
    if backend == "hip":
        counts = re.findall(r"\.vgpr_(count|spill_count):\s*(\d+)", compiled.asm["amdgcn"])
        return row | {{"count": "registers", "spill_count": "spills"}[name]: int(count) for name, count in counts}
    usage = tool("cuobjdump", "-res-usage", cubin=compiled.asm["cubin"])
    row["registers"], row["spills"] = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # spills: the stack
    if any(name.startswith(("wgmma", "tcgen05")) for name in row["matrix"]):  # the others' operands have no addresses
        row["unset"] = unset_registers(compiled.asm["cubin"])
    shared, warps = MULTIPROCESSORS[architecture]
    per_warp = -(-row["registers"] * 32 // 256) * 256  # registers are handed out in lots of 256 a warp
    limits = (REGISTERS // per_warp // row["warps"], shared // (row["shared"] + 1024), warps // row["warps"])
    return row | {"resident": min(limits)}


def tool(name: str, *arguments: str, cubin: bytes) -> str:
    """The text that one of CUDA's tools prints about a binary."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(cubin)
        command = [str(TOOLS / name), *arguments, str(binary)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def unset_registers(cubin: bytes) -> list[str]:
    """Uniform registers that instructions read and none writes.

    The assembler that came with Triton 3.6 lost the addresses of a matrix instruction's later operands: the product of
    codes and their gradients was wrong on a card, with no other sign of it. A matrix descriptor gdesc[URn] names the
    first of four registers, of which an operand in registers leaves two unused, so descriptors do not count as reads.
    """
    # -ndf: without its analysis of jumps it takes a quarter of the time
    read, written = set(), set()
    for code in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", tool("nvdisasm", "-c", "-ndf", cubin=cubin)):
        code = re.sub(r"^@!?U?P\w+\s+|gdesc\[UR\d+\]", "", code)
        operation, _, operands = code.partition(" ")
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


def report(target: str, cases: dict) -> list[dict]:
    """A row for every kernel and set of arguments, printed as it is compiled."""
    rows, seen = [], set()
    for label, kernel, grid, args, constants in record(target, cases):
        key = (kernel.__name__, str(signature(kernel, args, constants)))
        if key in seen:
            continue
        seen.add(key)
        backward = False in (constants.get("UNIT"), constants.get("FROM_I")) or "_gradient" in kernel.__name__
        row = {"target": target, "case": label, "kernel": kernel.__name__.removesuffix("_kernel")}
        row |= {"pass": "backward" if backward else "forward", "programs": math.prod(map(int, grid))}
        row |= {**compile_launch(kernel, args, constants, target), "triton": triton.__version__}
        needs_matrix = re.search(r"\bdot\(|cosines\(", kernel.src) and not label.startswith("fp32")
        row["faults"] = "; ".join(faults(row, bool(needs_matrix)))
        texts = {name: " ".join(value) if isinstance(value, list) else value for name, value in row.items()}
        rows.append({name: texts[name] for name in FIELDS if name in texts})
        print(line(rows[-1]), flush=True)
    return rows


def faults(row: dict, needs_matrix: bool) -> list[str]:
    unset, shared, limit = row.get("unset", []), row["shared"], row["shared_limit"]
    conditions = {
        f"spills {row['spills']}": row["spills"],
        f"reads {', '.join(unset)}, which nothing writes": unset,
        f"{shared} bytes of shared memory, the card has {limit}": shared > limit,
        "no matrix instruction": needs_matrix and not row["matrix"],
    }
    return [text for text, present in conditions.items() if present]


def line(row: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in row.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all")
    parser.add_argument("--quick", action="store_true", help="the launches of a training step alone")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    rows = [row for target in args.target or TARGETS for row in report(target, shipped_cases(args.quick))]
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
