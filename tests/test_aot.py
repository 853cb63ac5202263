"""Every shipped configuration compiles for its target by two versions of Triton: no spills, no copies, no growth.

The second version is the one of the last measurements on a card. SMOOSEG_TEST_TRITON names a folder that has it; else
pip puts it into the user's cache, and its tests are skipped where pip cannot.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
OTHER = "3.6.0"
# the longest first: every kernel and option for one target and version, a training step for the rest
RUNS = [("sm_90", None), ("sm_90", OTHER), ("sm_80", None), ("sm_86", None), ("sm_100", None), ("gfx942", None)]
GROWTH = 1.03  # of counts that benchmarks/results/aot.csv records
# of instructions a row and head: what a training step was designed to keep to
LIMITS = [("label_rows", "bf16 dropout, H=16", 60), ("energy_gradient", "bf16 dropout, H=16", 70)]
LIMITS += [("label_rows", "bf16 dropout", 100), ("energy_gradient", "bf16 dropout", 100)]


def other_triton() -> Path | None:
    """The folder that has the other version; None where it cannot be had."""
    if folder := os.environ.get("SMOOSEG_TEST_TRITON"):
        return Path(folder)
    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "smooseg-tests" / f"triton-{OTHER}"
    if (folder / "triton").is_dir():
        return folder
    scratch = folder.with_name(f"{folder.name}.{os.getpid()}")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--retries=0", "--timeout=10"]
    try:
        subprocess.run([*command, f"--target={scratch}", f"triton=={OTHER}"], check=True, timeout=60)
        scratch.rename(folder)
    except (OSError, subprocess.SubprocessError):
        return None
    return folder


def report(run, folder):
    """In its own process, as the interpreter cannot compile."""
    target, version = run
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if version is not None:
        other = other_triton()
        if other is None:
            return None
        environment["PYTHONPATH"] = os.pathsep.join([str(other), os.environ.get("PYTHONPATH", "")])
    table = folder / f"{target}-{version}.csv"
    command = [sys.executable, str(BENCHMARKS / "aot_report.py"), "--target", target, "--csv", str(table)]
    command += ["--amount", "sample" if run == RUNS[0] else "step"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    with table.open(newline="") as file:
        return done, list(csv.DictReader(file))


@pytest.fixture(scope="module")
def reports(request, tmp_path_factory):
    """Reports of the selected runs, two at a time."""
    folder = tmp_path_factory.mktemp("aot")
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    selected = {item.callspec.params.get("run") for item in items}
    runs = [run for run in RUNS if run in selected]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(runs, pool.map(lambda run: report(run, folder), runs)))


@pytest.fixture
def rows(run, reports):
    if reports[run] is None:
        pytest.skip(f"Triton {OTHER} cannot be installed here")
    return reports[run][1]


def numbered(rows):
    """Rows by what they are of; a kernel that is compiled twice for a case has two."""
    seen: Counter = Counter()
    keys = []
    for row in rows:
        key = tuple(row[name] for name in ("triton", "target", "case", "kernel", "pass"))
        seen[key] += 1
        keys.append((*key, seen[key]))
    return dict(zip(keys, rows))


def figures(row):
    """Returns what tells one binary from another."""
    names = ("triton", "target", "kernel", "warps", "registers", "spills", "shared", "instructions", "per_row")
    return tuple(row.get(name) for name in names)


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_shipped_configurations(run, rows, reports):
    done, _ = reports[run]
    assert done.returncode == 0, "\n".join(line for line in done.stdout.splitlines() if line.startswith("FAULT"))
    assert {row["triton"] for row in rows} == {run[1] or triton.__version__}
    assert {"pair_sums", "energy_gradient"} <= {row["kernel"] for row in rows}
    assert all(row["faults"] == "" and int(row["registers"]) > 0 for row in rows)
    assert all(0 <= int(row["shared"]) <= int(row["shared_limit"]) for row in rows)
    if run[0] != "gfx942":
        softmax = [row for row in rows if row["per_row"]]
        assert {"energy_gradient"} <= {row["kernel"] for row in softmax}
        # products in tensor memory tell no layout
        assert all(row["copies"] == "1" or int(row["rows"]) >= 16 * int(row["warps"]) for row in softmax)
        assert {row["copies"] for row in softmax} <= {"", "1"}


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_counts_do_not_grow(run, rows):
    """The committed record is benchmarks/results/aot.csv."""
    with (BENCHMARKS / "results" / "aot.csv").open(newline="") as file:
        record = numbered(list(csv.DictReader(file)))
    if not any(key[:2] == (rows[0]["triton"], run[0]) for key in record):
        pytest.skip(f"waits for rows of Triton {rows[0]['triton']} in aot.csv")
    # a binary is recorded under the first case that has it, which a sample may do without
    recorded = {figures(row) for row in record.values()}
    now = {
        key: row
        for key, row in numbered(rows).items()
        if figures(row) not in recorded or figures(row) == figures(record.get(key, {}))
    }
    missing = [key for key in now if key not in record]
    assert not missing, f"aot.csv is out of date, write it again (docs/kernels_aot.md): {missing}"
    grown = [
        f"{' '.join(map(str, key))}: {name} {record[key][name]} -> {row[name]}"
        for key, row in now.items()
        for name in ("instructions", "per_row", "copies", "waves", "spills")
        if float(row[name] or 0) > GROWTH * float(record[key][name] or 0) + 0.01
    ]
    assert not grown, "\n".join(grown)


def test_no_fault_in_the_record():
    """Every target, case and version, most of which no test compiles."""
    with (BENCHMARKS / "results" / "aot.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["triton"], row["target"]) for row in rows} >= {
        (version or "3.9.0", target) for target, version in RUNS
    }
    assert [row for row in rows if row["faults"]] == []


@pytest.mark.parametrize(("kernel", "case", "most"), LIMITS)
def test_a_training_step_keeps_to_its_instructions(kernel, case, most):
    """Warp instructions a row and head, for all of NVIDIA's targets and both versions, in the committed record."""
    with (BENCHMARKS / "results" / "aot.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["kernel"] == kernel and row["case"] == case]
    counts = {(row["triton"], row["target"]): float(row["per_row"]) for row in rows if row["per_row"]}
    assert {target for _, target in counts} == {"sm_80", "sm_86", "sm_90", "sm_100"}
    assert len(counts) == 8
    assert {key: count for key, count in counts.items() if count > most} == {}
    assert {row["spills"] for row in rows} == {"0"}


def test_the_parts_of_a_binary(monkeypatch):
    """Loops, instructions a row and copies, read from texts of the tools."""
    pytest.importorskip("smooseg_kernels.triton")  # before the next line, so that other tests have interpreted kernels
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    aot = pytest.importorskip("aot_report")
    binaries = pytest.importorskip("binaries")
    lines = ["MOV R0, R1", "@P0 BRA `(.L_2)", ".L_0:", "MUFU.EX2 R2, R3", ".L_1:", "HGMMA.64x32x16 R4, gdesc[UR4]"]
    lines += ["@P1 BRA `(.L_1)", "@!P2 BRA `(.L_3)", ".L_4:", "@P0 BRA `(.L_0)", ".L_2:", "EXIT", ".L_3:", "NOP"]
    lines += ["SYNCS R1", "BRA `(.L_4)", ".L_5:", "BRA `(.L_5)"]
    code = binaries.Code("\n".join(x if x.startswith(".L") else f"  /*{i:04x}*/   {x} ;" for i, x in enumerate(lines)))
    assert code.instructions[0] == "MOV R0, R1 "
    # the jump back from SYNCS belongs to the outer loop, as its target does not come before it on every way
    assert sorted(map(sorted, code.loops)) == [[2, 3, 4, 5, 6, 8, 9], [3, 4]]
    sizes = {"codes_ptr": torch.empty(2, 3, 64, 8), "BLOCK_P": 64, "BLOCK_D": 64, "D": 192}
    assert binaries.per_row(code, 4, sizes) == round((7 + 2 * 2) * 4 / 64, 1)
    assert binaries.per_row(code, 4, {"BLOCK_P": 64}) is None
    straight = binaries.Code(
        "  /*0000*/   MUFU.EX2 R2, R3 ;\n  /*0010*/   @P0 EXIT ;\n  /*0020*/   MOV R0, R1 ;\n  /*0030*/   EXIT ;"
    )
    assert (
        binaries.per_row(straight, 4, {"codes_ptr": torch.empty(2, 3, 64, 8), "BLOCK_P": 2}) == 4.0
    )  # one tile has more
    # UR26 is read by the very instruction that first writes it; UR9 is only moved, and one way skips UR7
    lines = ["UIADD3 UR20, UR17, 0x2000, URZ", "UIADD3 UR26, UP0, UR26, 0x20, URZ", "UMOV UR11, UR9", "UMOV UR11, 0x4"]
    lines += ["@P0 BRA `(.L_0)", "UMOV UR7, 0x1", ".L_0:", "HGMMA.64x64x16.F32 R24, gdesc[UR4], R24"]
    lines += ["HGMMA.64x64x16.F32 R88, R24, gdesc[UR18].tnspB, R88", "EXIT"]
    code = binaries.Code("\n".join(x if x.startswith(".L") else f"  /*{i:04x}*/   {x} ;" for i, x in enumerate(lines)))
    assert binaries.unset_registers(code) == [f"UR{n}" for n in (4, 5, 6, 7, 17, 21, 26)]
    layout = "#mma = #ttg.nvidia_mma<{versionMajor = 2, warpsPerCTA = [8, 1], instrShape = [16, 8]}>\n"
    assert binaries.copies(f"{layout} tensor<32x32xf32, #mma> tensor<32x1xf32, #mma>") == 4
    assert binaries.copies(f"{layout} tensor<128x32xf32, #mma>") == 1
    assert binaries.copies("tensor<64x64xf32, #blocked>") is None
    wide = layout.replace("[8, 1]", "[1, 8]").replace("[16, 8]", "[16, 128]")
    assert binaries.copies(f"{wide} tensor<16x64xf32, #mma>") == 16
    assert binaries.copies(f"{wide.replace('[1, 8]', '[4, 1]')} tensor<64x64xf32, #mma>") == 1
    row = dict(case="bf16", spills=0, shared=1, shared_limit=2, dots=True, matrix=["mma"], per_row=50.0, warps=8)
    assert aot.faults({**row, "rows": 64}) == ["64 rows for 8 warps, which compute copies"]
    assert aot.faults({**row, "rows": 128}) == []
    assert aot.faults({**row, "rows": 64, "copies": 1}) == []  # the warps share the columns
    assert aot.faults({**row, "case": "fp32", "spills": 8, "rows": 128}) == ["spills 8"]
    assert aot.faults({**row, "rows": 64, "per_row": None}) == []  # no labels are made
    assert "crashed" in aot.faults({**row, "rows": 128, "crashed": True})[0]
