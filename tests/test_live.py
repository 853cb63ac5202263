"""Live views of a run: the progress line and TensorBoard's curves."""

import io
import json
import signal
import sys

import pytest
from test_trainer import SMALL, call

from smooseg_fast.learn import loop
from smooseg_fast.learn.run import live
from smooseg_fast.system import progress
from smooseg_fast.system.progress import Bar

RECORD = {"energy_within": -0.0123, "energy_across": -0.0344, "data": 2.718, "perplexity": 11.2}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_line_has_everything_in_100_columns():
    line = Bar.format_meter(
        n=2700,
        total=3000,
        elapsed=5400,
        ncols=100,
        prefix="train",
        unit="step",
        rate=11.53,
        postfix=live(RECORD, verbose=True),
    )
    assert len(line) <= 100
    for part in ("90%", "2700/3000", "1:30:00", "11.53step/s", "E -0.012/-0.034/2.72", "11.2 groups]"):
        assert part in line, line
    assert live(RECORD, verbose=False) == "11.2 groups"


def test_a_terminal_sees_one_line_that_changes():
    screen = Terminal()
    with Bar(total=50, desc="train", unit="step", file=screen, mininterval=0) as bar:
        for _ in range(50):
            bar.update()
            bar.set_postfix_str("5 labels", refresh=False)
    assert screen.getvalue().count("\r") > 50
    assert screen.getvalue().strip("\n").count("\n") == 0
    assert "5 labels" in screen.getvalue()


def test_a_log_file_is_not_flooded(monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_S", 30.0)
    file = io.StringIO()
    with Bar(total=500, desc="train", unit="step", file=file) as bar:
        for _ in range(500):
            bar.update()
            bar.set_postfix_str("5 labels", refresh=False)
    lines = file.getvalue().strip().splitlines()
    assert len(lines) == 2
    assert "\r" not in file.getvalue()
    assert "500/500" in lines[-1]
    assert "5 labels" in lines[-1]


def test_a_bar_that_is_off_says_nothing(capsys):
    with Bar(total=2, disable=True) as bar:
        bar.set_postfix_str("x", refresh=False)
        assert bar.format_dict["rate"] is None
    assert capsys.readouterr() == ("", "")


# tensorboard


def events(folder):
    """{tag: [(step, value)]} as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def expected(file):
    curves = {}
    for record in map(json.loads, open(file)):
        for name, value in record.items():
            if isinstance(value, float):
                curves.setdefault(f"{name}/{record['head']}", []).append(
                    (record["step"], pytest.approx(value, rel=1e-6))
                )
    return curves


BOARD = [*SMALL, "--granularity", "0.06", "0.1", "--prototypes", "3", "--log", "tensorboard"]


def test_tensorboard_shows_the_metrics(labelled):
    pytest.importorskip("tensorboard")
    assert call("--data", labelled, "--out", "out", *BOARD) == 0
    found = events("out/tensorboard")
    assert found == expected("out/metrics.jsonl")
    assert [step for step, _ in found["total/granularity_0.06_seed_0"]] == [2, 4, 6]
    assert [step for step, _ in found["miou/granularity_0.06_seed_0"]] == [6]


def test_tensorboard_after_a_stop_and_a_resume(folder, monkeypatch):
    """The first process is thrown back behind what it has shown; the second shows every step once."""
    pytest.importorskip("tensorboard")
    step, calls = loop.train_step, []

    def failing(*args, **options):
        calls.append(1)
        if len(calls) == 6:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return step(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", failing)
        assert call("--data", folder, "--out", "out", *BOARD) == 130
    # closed: everything up to the stop can be read
    assert [at for at, _ in events("out/tensorboard")["total/granularity_0.06_seed_0"]] == [2, 4]
    assert call("--data", folder, "--out", "out", *BOARD) == 0
    assert events("out/tensorboard") == expected("out/metrics.jsonl")


def test_without_tensorboard_one_line_says_so(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    assert call("--data", folder, "--out", "out", *BOARD) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert (
        line == "error: --log tensorboard: the package is not installed; "
        'pip install "smooseg_fast[tensorboard]", or leave the flag out'
    )
    assert not (folder.parent / "out").exists()


def test_a_full_disk_under_tensorboard(tmp_path):
    from smooseg_fast.errors import WriteError
    from smooseg_fast.learn.board import disk_errors

    with pytest.raises(WriteError, match="cannot be written"), disk_errors(tmp_path):
        raise OSError(28, "No space left on device")
