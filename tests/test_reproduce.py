"""docs/reproduce.md: every command parses, and the settings it prints are those of the presets."""

import re
import shlex
from pathlib import Path

import pytest

from smooseg_fast import data, evaluate, train
from smooseg_fast.config import PRESETS, preset
from smooseg_fast.system.commandline import parse

TEXT = (Path(__file__).parent.parent / "docs" / "reproduce.md").read_text(encoding="utf-8")
COMMANDS = sorted(
    {
        line
        for block in re.findall(r"^```bash\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("smooseg ")
    }
)


def read_data(args):
    assert args[0] == "check"
    return parse(data.CheckConfig, args[1:], "data", "check")


def read_evaluate(args):
    return parse(evaluate.EvaluateConfig, args, "evaluate")


READERS = {"train": train.configure, "evaluate": read_evaluate, "data": read_data}


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(command):
    _, name, *args = shlex.split(command)
    config = READERS[name](args)
    assert config.data == "DIR"
    if getattr(config, "preset", None):
        preset(config.preset)


def test_every_benchmark_has_its_commands():
    for name in ("cityscapes", "cocostuff27", "potsdam"):
        for command in ("train", "evaluate"):
            assert any(line.startswith(f"smooseg {command} --preset {name} ") for line in COMMANDS)


def test_the_table_is_that_of_the_presets():
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line.startswith("| `")
    ]
    assert len(rows) == 3
    for name, backbone, within, across, groups, steps, batch, crops, size, eval_size in rows:
        config = PRESETS[name.strip("`")]
        assert (backbone, float(within), float(across)) == (
            config.backbone,
            config.threshold_within,
            config.threshold_across,
        )
        numbers = (config.prototypes, config.steps, config.batch_size, config.size, config.eval_size)
        assert tuple(map(int, (groups, steps, batch, size, eval_size))) == numbers
        assert crops == config.crops


def test_sizes_of_features_are_those_of_the_counts():
    """Half precision, five squares (or one) for training, one square and its mirror in float32 for the test."""
    said = [
        tuple(map(float, pair))
        for pair in re.findall(r"Features: ([\d.]+) GB for training, ([\d.]+) GB for the test", TEXT)
    ]
    counts = {"cityscapes": (2975, 500, 5, 384), "cocostuff27": (49_629, 2_175, 5, 384), "potsdam": (4545, 855, 1, 768)}
    assert len(said) == len(counts)
    for (training, test), (name, (learnt, measured, crops, channels)) in zip(said, counts.items()):
        patches = [(getattr(PRESETS[name], size) // 8) ** 2 for size in ("size", "eval_size")]
        assert training == pytest.approx(learnt * crops * patches[0] * channels * 2 / 1e9, rel=0.02)
        assert test == pytest.approx(2 * measured * patches[1] * channels * 4 / 1e9, rel=0.03)
