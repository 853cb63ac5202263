"""The stages for a machine with a card, in the form that a CPU can run: parts, their lines, settings, compilation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gpu
import pytest
import report
import results

pytest.importorskip("triton")
import card
import tuning

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_parts_run_one_after_the_other(tmp_path, monkeypatch, capfd):
    """One that hangs is stopped with what it started, one that fails is told; the next one runs nevertheless."""
    monkeypatch.setattr(gpu, "RESERVE_S", 0)
    wait = "import sys, time; seconds = sys.stdin.readline(); "
    child = "import subprocess as s; s.Popen([sys.executable, '-c', 'import time; time.sleep(30)']); "
    programs = {"first": "print('one', 0 < float(seconds) < 5)", "fails": "sys.exit(3)"}
    programs |= {"hangs": f"{child} time.sleep(30)", "last": "print('four')"}
    commands = {name: [sys.executable, "-c", wait + program] for name, program in programs.items()}
    failed = gpu.run_parts(commands, {"first": 5, "fails": 20, "hangs": 1, "last": 20}, gpu.Clock(60))
    assert failed == ["fails", "hangs"]
    out = capfd.readouterr().out
    assert out.index("one True") < out.index("fails") < out.index("four")
    assert gpu.run_parts({"late": commands["last"]}, {"late": 5}, gpu.Clock(0)) == ["late"]
    assert "four" not in capfd.readouterr().out


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """All parts in this process, where they take their lines from the interpreter."""
    out = tmp_path_factory.mktemp("card")
    one = card.Card(out, "cpu", time.perf_counter() + 600)
    for part in card.PARTS.values():
        part(one)
    card.settings(one, card.compiler_for(one))
    return out


def test_every_part_in_smoke_form(smoke):
    rows = results.read([smoke / "gpu.jsonl"])
    assert [row["error"] for row in rows if "error" in row] == []
    measured = {(row["case"], row.get("shape"), row["mode"]) for row in rows}
    assert {("objective", shape, "graph") for shape in ("cityscapes_s8", "heads16")} <= measured
    assert {("assign", "eval320", "graph"), ("pairs", "all_784", "graph")} <= measured
    assert {row["impl"] for row in rows if row["case"] == "ceiling"} == {"copy", "matmul", "empty launch", "read of L2"}
    assert [row["sizes"].get("patches") for row in rows if row["case"] == "head step"] == [None, 12]
    assert sum(row.get("passed", False) for row in rows) == 3
    lines = report.collect(rows)
    assert "head step" in report.table(lines[lines["case"].isin(report.CASES)])
    assert "objective" in report.cells_csv(lines)


def test_settings_are_written_as_they_are_timed(smoke):
    rows = results.read([smoke / "settings.jsonl"])
    assert rows
    assert all(("median_ms" in row) != ("refused" in row) for row in rows)
    best = json.loads((smoke / "best.json").read_text())["objective H=1"]
    assert best["median_ms"] <= best["shipped_ms"]
    assert {"pair_sums", "energy_gradient"} <= set(best["settings"])


def test_an_error_and_the_end_of_the_time_are_lines(tmp_path):
    one = card.Card(tmp_path, "cpu", time.perf_counter() + 60)
    cell = {"case": "ceiling", "impl": "x", "mode": "eager"}
    assert one.guarded(cell, lambda: 1 / 0) is None
    assert one.guarded(cell, lambda: 5) == 5
    one.stop_s = 0
    assert one.guarded(cell, lambda: 5) is None
    first, second = results.read([tmp_path / "gpu.jsonl"])
    assert first["error"].startswith("ZeroDivisionError")
    assert second["error"] == "no time left"


def test_neighbours():
    setting = {"PROGRAMS": 96, "BLOCK_P": 64, "num_warps": 4, "num_stages": 1}
    near = tuning.neighbours(setting)
    assert {**setting, "PROGRAMS": 48} in near
    assert {**setting, "BLOCK_P": 128, "num_warps": 8} in near
    assert {**setting, "maxnreg": 128} in near
    assert {**setting, "num_stages": 0} not in near
    assert all({name for name in one if one[name] != setting.get(name)} for one in near)
    assert {**setting, "maxnreg": 168} in tuning.neighbours({**setting, "maxnreg": 128})


class Interrupted(Exception):
    """Covers a run that is cut off."""


def test_descent_finds_the_best_and_keeps_what_it_has(tmp_path, monkeypatch):
    """On times that are a function of the settings: wrong and equal programs are refused, coordinates are combined."""
    shipped = {"a": {"BLOCK_D": 64, "num_stages": 2}, "b": {"BLOCK_D": 32}}

    def milliseconds(self, overrides):
        self.timed += 1
        settings = {**shipped, **overrides}
        if settings["a"]["num_stages"] == 3:
            raise AssertionError("wrong values")
        if settings["b"]["BLOCK_D"] == 512:
            raise Interrupted
        return 1 + abs(settings["a"]["BLOCK_D"] / 16 - 1) + 64 / settings["b"]["BLOCK_D"]

    class Pool:
        def submit(self, job, overrides):
            self.overrides = overrides
            return self

        def result(self, seconds):
            if self.overrides.get("a", {}).get("maxnreg") == 128:
                return tuning.Compiled({}, [("spilling", 1)], {"spilling": "spills 8", "always": "copies"})
            return tuning.Compiled({}, [(json.dumps({**shipped, **self.overrides}), 1)], {"always": "copies"})

    monkeypatch.setattr(tuning, "settings_asked", lambda *_: shipped)
    monkeypatch.setattr(tuning.Tuner, "milliseconds", milliseconds)
    where = {"device": "cpu", "out": tmp_path, "compiler": Pool(), "stop_s": time.perf_counter() + 60}
    tuner = tuning.Tuner("objective H=1", most=1000, **where)
    tuner.run()
    best = json.loads((tmp_path / "best.json").read_text())["objective H=1"]
    assert best["settings"]["a"]["BLOCK_D"] == 16
    assert best["settings"]["b"]["BLOCK_D"] == 256
    rows = results.read([tmp_path / "settings.jsonl"])
    refused = {row.get("refused", "") for row in rows}
    assert {"spills 8", "AssertionError: wrong values"} <= refused
    assert any(text.startswith("Interrupted") for text in refused)
    limited = tuning.Tuner("objective H=1", most=4, **where)
    limited.run()
    assert limited.timed == 4


def test_a_process_without_a_card_compiles_for_one(tmp_path):
    """Through Triton's launcher, as the card's own process does; the second time nothing is new."""
    code = f"""
import tuning
from pathlib import Path
out = Path({str(tmp_path)!r})
first, again = (tuning.compiled("gate H=1", "sm_90", {{}}, out / "aot.jsonl") for _ in range(2))
assert first.binaries == again.binaries and "energy_gradient" in first.settings, first
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, gpu.FOLDERS))
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    rows = results.read([tmp_path / "aot.jsonl"])
    assert len({(row["kernel"], row["programs"], row["registers"]) for row in rows}) == len(rows) >= 3
    assert all(row["resident"] >= 1 for row in rows)
