"""Threads on a busy machine: commands make those that wait sleep."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import smooseg_fast
from smooseg_fast.system.threads import wait_asleep

TELLS = 'import os\nprint("policy", os.environ.get("OMP_WAIT_POLICY"))\nraise SystemExit(0)\n'


@pytest.mark.parametrize(
    ("words", "environment", "policy"),
    [
        ("-m smooseg_fast cache", {}, "passive"),
        ("-m smooseg_fast.predict --checkpoint x", {}, "passive"),
        ("-m smooseg_fast cache", {"OMP_WAIT_POLICY": "active"}, "active"),
        ("-m smooseg_fast cache", {"GOMP_SPINCOUNT": "9"}, "None"),
        ("-m smooseg_fast cache", {"KMP_BLOCKTIME": "9"}, "None"),
        ("-c from+smooseg_fast+import+Segmenter", {}, "None"),
        ("-c import+smooseg_fast.command,torch", {}, "None"),
    ],
)
def test_commands_choose_how_threads_wait_before_pytorch_loads(tmp_path, words, environment, policy):
    """The environment decides first, and a library leaves it alone. PyTorch is one that tells what it sees."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(TELLS)
    others = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    paths = os.pathsep.join([str(tmp_path), str(Path(smooseg_fast.__file__).parents[1]), *sys.path])
    command = [sys.executable, *(word.replace("+", " ") for word in words.split())]
    done = subprocess.run(
        command, env=others | environment | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == f"policy {policy}\n", done.stderr


def test_a_process_that_has_pytorch_keeps_its_environment(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    wait_asleep()
    assert "OMP_WAIT_POLICY" not in os.environ
