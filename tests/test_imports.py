"""The cost of importing a part: the step core runs on a bare machine with torch alone, learning without the command
line's parser.

smooseg_kernels by itself: test_front_door.py."""

import subprocess
import sys

import pytest

CASES = {
    "smooseg_fast": ("torch", "numpy", "shtab", "transformers", "matplotlib", "triton"),
    "smooseg_fast.learn.loop": (
        "numpy",
        "scipy",
        "PIL",
        "shtab",
        "transformers",
        "matplotlib",
        "triton",
        "safetensors",
        "tqdm",
    ),
    "smooseg_fast.learn.trainer": ("shtab", "transformers", "matplotlib.pyplot", "triton"),
}


@pytest.mark.parametrize("module", CASES)
def test_import_without(module):
    code = f"import sys\nfor name in {CASES[module]!r}: sys.modules[name] = None\nimport {module}"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
