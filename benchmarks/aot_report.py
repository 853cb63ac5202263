"""What every Triton kernel compiles to in every shipped configuration, without a GPU: registers, spills, shared memory, matrix unit.

    python benchmarks/aot_report.py                                  # the table, for all targets
    python benchmarks/aot_report.py --target sm_90 --json out.json   # one target, as data
    python benchmarks/aot_report.py --markdown docs/kernels_aot.md   # writes the page

The launchers themselves run, on tensors without memory, and their launches are compiled instead of started: the report is of the kernels,
arguments and alignments that run on a card. Exits 1 where a configuration spills or asks for more shared memory than the card has.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
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
# registers, shared memory and warps of one multiprocessor: how many programs it holds at once
MULTIPROCESSORS = {
    80: (65536, 164 << 10, 64),
    86: (65536, 100 << 10, 48),
    90: (65536, 228 << 10, 64),
    100: (65536, 228 << 10, 64),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
STORES = ("ST", "RED.", "REDG", "REDS", "ATOM", "BAR", "UTM", "UBLKCP", "SYNCS")  # what comes first there is read
MATRIX = r"wgmma\.mma_async|tcgen05\.mma|(?<![\w.])mma\.sync|v_mfma_\w+"
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


class Recorder:
    """Stands in for `launch`: keeps what would have been launched."""

    def __init__(self) -> None:
        self.launches: list[tuple] = []
        self.label = ""

    def __call__(self, kernel, grid, *, settings, **arguments) -> None:
        switches = {kernel.arg_names[i] for i in kernel.constexprs}
        args = [arguments.pop(name) for name in kernel.arg_names if name in arguments and name not in switches]
        self.launches.append((self.label, kernel, grid, args, {**arguments, **settings}))


def record(target: str, cases: dict) -> list[tuple]:
    """Runs the operators' launchers on tensors without memory, with the configurations of `target`."""
    recorder = Recorder()
    for module in (objective, code_rows, assignment, pairs, similarity):
        module.launch = recorder
    launching.family = lambda device: target
    for label, case in cases.items():
        recorder.label = label
        case()
    return recorder.launches


def objective_case(
    dtype: torch.dtype,
    H: int,
    entries=(-1, 0),
    full: bool = False,
    scaled: bool = False,
    B=32,
    P=784,
    D=384,
    Z=64,
    K=27,
):
    """Forward and backward; `scaled`: channel masks, as training with dropout has them; `full`: every option, every upstream gradient."""

    def tensor(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    def run():
        T = len(entries)
        features, codes = tensor(B, P, D, dtype=dtype), tensor(H, B, P, Z, dtype=dtype)
        student, teacher = tensor(H, K, Z), tensor(H, K, Z)
        partners, thresholds = tensor(1, B, dtype=torch.int64), tensor(H, T)
        scale, weight = tensor(B, D) if full or scaled else None, tensor(B, P) if full else None
        common = (features, codes, student, teacher, partners, entries, thresholds, scale, weight)
        out = objective.objective.launcher(*common, None, None, 0.1, full, True, True, True)
        upstream = [x if full or i == 0 else None for i, x in enumerate(out[:4])]
        objective.objective_backward.launcher(*upstream, *common, out[4], list(out[5:]), 0.1, full, True, True, True)

    return run


def rows_case(dtype: torch.dtype, B=32, P=784, Z=64, K=27):
    def run():
        codes, prototypes = torch.empty(1, B, P, Z, dtype=dtype, device="meta"), torch.empty(1, K, Z, device="meta")
        out = code_rows.probabilities.launcher(codes, prototypes, 0.1)
        code_rows.probabilities_backward.launcher(out, codes, prototypes, 0.1)
        code_rows.data_term.launcher(codes, prototypes, prototypes, None, True)
        labels = torch.empty(B, 320, 320, dtype=torch.uint8, device="meta")
        assignment.assign.launcher(codes[0], prototypes[0], [28, 28], [320, 320], labels, 27)

    return run


def statistics_case(dtype: torch.dtype, entries: tuple[int, ...] = (-1,), full: bool = False, B=32, P=784, D=384):
    """Means, histogram and 32 neighbours; `full`: centred, weighted and with as many bins and neighbours as there can be."""

    def run():
        features, partners = (
            torch.empty(B, P, D, dtype=dtype, device="meta"),
            torch.empty(1, B, dtype=torch.int64, device="meta"),
        )
        weight = torch.empty(B, P, device="meta") if full else None
        bins, neighbours = (similarity.LARGEST_BINS, similarity.LARGEST_NEIGHBOURS) if full else (512, 32)
        similarity.similarity_statistics.launcher(
            features, partners, list(entries), weight, None, True, bins, -1.5, 1.5, neighbours
        )

    return run


def pairs_case(dtype: torch.dtype, points: int = 784, full: bool = False, B=32, D=384, Z=70):
    """Forward and backward; `full`: a partner index, hinge, and upstream gradients to both outputs."""

    def run():
        rows = (
            torch.empty(B, points, D, dtype=dtype, device="meta"),
            torch.empty(B, points, Z, dtype=dtype, device="meta"),
        )
        number = torch.empty((), device="meta")
        partner = torch.empty(B, dtype=torch.int64, device="meta") if full else None
        common = (*rows, *rows, number, partner)
        out = pairs.pair_energy.launcher(*common, 0.0, 0.8, full, True, True)
        upstream = (number, number if full else None)
        pairs.pair_energy_backward.launcher(*upstream, *common, list(out[2:]), 0.0, 0.8, full, True, True, True)

    return run


def shipped_cases(quick: bool = False) -> dict:
    """`quick`: the launches of a training step alone."""
    cases = {
        "bf16 dropout": objective_case(torch.bfloat16, 1, scaled=True),
        "bf16 dropout, H=16": objective_case(torch.bfloat16, 16, scaled=True),
    }
    cases["bf16 pairs"] = pairs_case(torch.bfloat16)
    if quick:
        return cases
    return cases | {
        "bf16 H=1": objective_case(torch.bfloat16, 1),
        "bf16 H=16": objective_case(torch.bfloat16, 16),
        "fp16 H=1": objective_case(torch.float16, 1),
        "fp32 H=1": objective_case(torch.float32, 1),
        "bf16 every option": objective_case(torch.bfloat16, 1, (-1, 0, -2), full=True),
        "bf16 every option, H=16": objective_case(torch.bfloat16, 16, (-1, 0, -2), full=True),
        "fp16 every option, H=16": objective_case(torch.float16, 16, (-1, 0, -2), full=True),
        "bf16 pairs, P=121": pairs_case(torch.bfloat16, 121),
        "bf16 pairs, options": pairs_case(torch.bfloat16, full=True),
        "fp32 pairs": pairs_case(torch.float32),
        "bf16 pairs, D=768": pairs_case(torch.bfloat16, D=768),
        "bf16 pairs, Z=200": pairs_case(torch.bfloat16, Z=200),
        "bf16 rows": rows_case(torch.bfloat16),
        "fp32 rows": rows_case(torch.float32),
        "bf16 statistics": statistics_case(torch.bfloat16),
        "fp32 statistics": statistics_case(torch.float32),
        "bf16 statistics, every option": statistics_case(torch.bfloat16, (0, -2), full=True),
        "fp32 statistics, every option": statistics_case(torch.float32, (0, -2), full=True),
    }


def signature(kernel, args, constants):
    """What Triton's own launcher would specialise on: types, 16-byte alignment, sizes of 1."""
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
    return types, attributes, fixed


def compile_launch(kernel, args, constants, target: str) -> dict:
    backend, architecture, warp, shared_limit = TARGETS[target]
    options = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
    types, attributes, fixed = signature(kernel, args, constants)
    source = ASTSource(fn=kernel, signature=types, constexprs=fixed, attrs=attributes)
    with contextlib.redirect_stdout(io.StringIO()):  # an assembler's error comes with the whole program
        compiled = triton.compile(
            source, target=GPUTarget(backend, architecture, warp), options={**options, "enable_fp_fusion": True}
        )
    row = {"warps": compiled.metadata.num_warps, "shared": compiled.metadata.shared, "shared_limit": shared_limit}
    if backend == "hip":
        text = compiled.asm["amdgcn"]
        row["registers"] = int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1])
        row["spills"] = int(re.search(r"\.vgpr_spill_count:\s*(\d+)", text)[1])
        row["matrix"] = sorted(set(re.findall(MATRIX, text)))
        return row
    row["matrix"] = sorted(set(re.findall(MATRIX, compiled.asm["ptx"])))
    row["registers"], row["spills"] = resources(compiled.asm["cubin"])
    if any(name.startswith(("wgmma", "tcgen05")) for name in row["matrix"]):  # the others' operands have no addresses
        row["unset"] = unset_registers(compiled.asm["cubin"])
    registers, shared, warps = MULTIPROCESSORS[architecture]
    per_warp = -(-row["registers"] * 32 // 256) * 256  # registers are handed out in lots of 256 a warp
    row["resident"] = min(
        registers // per_warp // row["warps"], shared // (row["shared"] + 1024), warps // row["warps"]
    )
    return row


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack, which is where registers spill to, of the very binary that Triton's options made."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(cubin)
        text = subprocess.run(
            [str(TOOLS / "cuobjdump"), "-res-usage", str(binary)], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return int(registers), int(stack)


def unset_registers(cubin: bytes) -> list[str]:
    """Uniform registers that instructions read and none writes.

    The assembler that came with Triton 3.6 made one so: the addresses of a matrix instruction's later operands were lost, and the product
    of codes and their gradients was wrong on a card with no other sign of it. A matrix descriptor gdesc[URn] names the first of four, of
    which an operand in registers leaves two unused, so descriptors do not count as reads.
    """
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(cubin)
        # without its analysis of jumps, which names their targets and takes a quarter of the time
        text = subprocess.run(
            [str(TOOLS / "nvdisasm"), "-c", "-ndf", str(binary)], capture_output=True, text=True, check=True
        ).stdout
    read, written = set(), set()
    for code in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", text):
        code = re.sub(r"^@!?U?P\w+\s+|gdesc\[UR\d+\]", "", code)
        operation, _, operands = code.partition(" ")
        target, *rest = (x.strip() for x in operands.split(","))
        while re.match(r"U?P(\d|T)", target) and rest:  # predicates that come out before the register
            target, *rest = rest
        if re.fullmatch(r"UR\d+", target) and not operation.startswith(STORES):
            first = int(target[2:])
            written.update(
                range(
                    first,
                    first + (4 if ".128" in operation else 2 if ".64" in operation or ".WIDE" in operation else 1),
                )
            )
        else:
            rest = [target, *rest]
        read.update(int(n) for x in rest for n in re.findall(r"\bUR(\d+)\b", x))
    return [f"UR{n}" for n in sorted(read - written)]


def report(target: str, cases: dict, verbose: bool = False) -> list[dict]:
    rows, seen = [], set()
    for label, kernel, grid, args, constants in record(target, cases):
        key = (kernel.__name__, str(signature(kernel, args, constants)))
        if key in seen:
            continue
        seen.add(key)
        row = {
            "target": target,
            "case": label,
            "kernel": kernel.__name__.removesuffix("_kernel"),
            "programs": count(grid),
        }
        row["pass"] = (
            "backward"
            if False in (constants.get("UNIT"), constants.get("FROM_I")) or "_gradient" in kernel.__name__
            else "forward"
        )
        row["dot"] = re.search(r"\bdot\(|cosines\(", kernel.src) is not None
        row["fp32"] = label.startswith("fp32")
        row.update(compile_launch(kernel, args, constants, target))
        row["triton"] = triton.__version__
        rows.append(row)
        if verbose:
            print(line(row), flush=True)
    return rows


def count(grid: tuple[int, ...]) -> int:
    total = 1
    for size in grid:
        total *= int(size)
    return total


def faults(row: dict) -> list[str]:
    found = []
    if row["spills"]:
        found.append(f"spills {row['spills']}")
    if row.get("unset"):
        found.append(f"reads {', '.join(row['unset'])}, which nothing writes")
    if row["shared"] > row["shared_limit"]:
        found.append(f"{row['shared']} bytes of shared memory, the card has {row['shared_limit']}")
    if row["dot"] and not row["fp32"] and not row["matrix"]:
        found.append("no matrix instruction")
    return found


def line(row: dict) -> str:
    return (
        f"{row['target']:7s} {row['case']:23s} {row['kernel']:18s} {row['pass']:8s} programs {row['programs']:5d} warps {row['warps']:2d} "
        f"registers {row['registers']:3d} spills {row['spills']:4d} shared {row['shared']:6d} resident {row.get('resident', '-')!s:>2s} "
        f"{', '.join(row['matrix']) or '-'} {'; '.join(faults(row))}"
    )


def markdown(rows: list[dict]) -> str:
    head = [
        "target",
        "case",
        "kernel",
        "pass",
        "programs",
        "warps",
        "registers",
        "spilled bytes",
        "shared bytes",
        "resident",
        "matrix unit",
    ]
    names = ("target", "case", "kernel", "pass", "programs", "warps", "registers", "spills", "shared")
    body = [
        [*(row[name] for name in names), row.get("resident", ""), ", ".join(f"`{m}`" for m in row["matrix"])]
        for row in rows
    ]
    table = ["| " + " | ".join(map(str, cells)) + " |" for cells in (head, ["---"] * len(head), *body)]
    return "\n".join(
        [
            "# What the Triton kernels compile to",
            "",
            f"Ahead of time with Triton {triton.__version__}, by `benchmarks/aot_report.py --markdown docs/kernels_aot.md`: none of it was",
            "measured on a card. B=32, P=784, D=384, Z=64 (70 for `pairs`), K=27, two pair sets. `resident`: programs that one",
            "multiprocessor holds. fp32 dots are three tf32 products on NVIDIA cards. Another Triton version gives other register counts.",
            "",
            *table,
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all")
    parser.add_argument("--quick", action="store_true", help="the launches of a training step alone")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    rows = [row for target in args.target or TARGETS for row in report(target, shipped_cases(args.quick), verbose=True)]
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    if args.markdown:
        args.markdown.write_text(markdown(rows))
    bad = [row for row in rows if faults(row)]
    for row in bad:
        print("FAULT", line(row))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
