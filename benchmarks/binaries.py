"""Read a binary of Triton with CUDA's tools: its loops, instructions for a row, copies of rows, unset registers."""

from __future__ import annotations

import functools
import operator
import re
import subprocess
import tempfile
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ANY = (1 << 256) - 1  # all registers
STORES = ("ST", "RED.", "REDG", "REDS", "ATOM", "BAR", "UTM", "UBLKCP", "SYNCS")  # their first operand is read
MMA = r"(#mma\d*) = #ttg\.(?:nvidia|amd)_(?:mma|mfma)<\{.*?warpsPerCTA = \[(\d+), (\d+)\].*?instrShape = \[(\d+), (\d+)"


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
        self.edges = [self.next_places(i, labels) for i in range(len(self.instructions))]
        self.loops = natural_loops(self.edges)

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
                # a single warp across repeats the columns of wgmma in registers that are one
                repeats = across * columns // int(width) if across > 1 else 1
                counts.append(max(1, down * rows // int(height)) * max(1, repeats))
    return max(counts, default=None)


def unset_registers(code: Code) -> list[str]:
    """Uniform registers that an instruction reads although, on some way to it, none has written them.

    The assembler that came with Triton 3.6 loses the addresses of a matrix instruction's later operands: it adds an
    offset to a register that it never set, in the same register. The matrix unit then reads wherever that points.
    """
    access = [uniform_access(text) for text in code.instructions]
    written = [0, *[ANY] * (len(access) - 1)]  # bits of the registers that every way to an instruction has written
    pending = [0]
    while pending:
        i = pending.pop()
        _, wrote, moved = access[i]
        after = written[i] | wrote if moved & ~written[i] == 0 else written[i] & ~wrote
        for j in code.edges[i]:
            if written[j] & after != written[j]:
                written[j] &= after
                pending.append(j)
    unset = functools.reduce(operator.or_, (read & ~known for (read, *_), known in zip(access, written)), 0)
    return [f"UR{n}" for n in range(unset.bit_length()) if unset >> n & 1]


def uniform_access(text: str) -> tuple[int, int, int]:
    """The uniform registers that an instruction reads, writes, and only moves elsewhere, as bits.

    Half of a pair may be unset where the whole is moved or put aside.
    """
    operation, _, operands = re.sub(r"^@!?U?P\w+\s+", "", text).partition(" ")
    target, *rest = (x.strip() for x in operands.split(","))
    while re.match(r"!?U?P(\d|T)$", target) and rest:  # predicates that come out before the register
        target, *rest = rest
    count = 4 if ".128" in operation else 2 if re.search(r"\.64|\.WIDE", operation) else 1
    written = 0
    if re.fullmatch(r"UR\d+", target) and not operation.startswith(STORES):
        written = bits(int(target[2:]), count)
    else:
        rest = [target, *rest]
    read = 0
    for i, x in enumerate(rest):
        for kind, number in re.findall(r"(gdesc|\bdesc)?\[?\bUR(\d+)", x):
            first = int(number)
            if kind == "gdesc" and operation.startswith("HGMMA"):
                # two descriptors; the first is unused where registers hold that operand
                held = any(re.match(r"R\d", other) for other in rest[1:i])
                read |= bits(first + 2, 2) if held else bits(first, 4)
            elif kind != "gdesc":
                read |= bits(first, 2 if kind == "desc" or operation == "UIADD3.64" else 1)
    if operation == "UMOV":
        return 0, written, read
    return 0 if operation == "MOV.SPILL" else read, written, 0


def bits(first: int, count: int) -> int:
    return ((1 << count) - 1) << first
