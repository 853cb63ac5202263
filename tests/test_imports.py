"""The cost of importing a part: the step core runs on a bare machine with torch alone, learning without the command
line's parser.

smooseg_kernels by itself: test_front_door.py."""

import subprocess
import sys

import pytest
import torch

from smooseg_fast.config import TrainConfig
from smooseg_fast.segment.checkpoint import Checkpoint, Fine
from smooseg_fast.segment.model import Head
from smooseg_fast.segment.tree import Moments, Tree
from smooseg_kernels.rows import unit_rows

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


def test_a_checkpoint_is_read_without_the_compiler(tmp_path):
    """torch._dynamo takes longer to import than PyTorch itself, and choose is a lookup."""
    torch.manual_seed(0)
    head, tree = Head(8, 3), Moments(4, 8)
    tree.add(unit_rows(torch.randn(2, 9, 8)), torch.arange(18).reshape(2, 9) % 4)
    fine = Fine(Head(8, 4), Tree.grow(tree.pairs(), tree.shares))
    config = TrainConfig(size=64, eval_size=64, backbone="filterbank")
    Checkpoint(config, head, 0, "filterbank", "", fine=fine).write(tmp_path / "x.safetensors")
    code = (
        "import sys, smooseg_fast.learn.trainer, smooseg_fast.show.tree\n"
        "from smooseg_fast.segment.checkpoint import read_checkpoint\n"
        f"read_checkpoint({str(tmp_path / 'x.safetensors')!r}).at(2)\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
