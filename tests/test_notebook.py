"""Notebooks and training code: what a segmenter shows of itself, callbacks, boards, and a run by its settings file."""

import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from test_trainer import SMALL
from textures import draw

from smooseg_fast import Segmenter, UserError, fit, train
from smooseg_fast.backbones import load_backbone
from smooseg_fast.command import run
from smooseg_fast.config import TrainConfig
from smooseg_fast.datasets.reading import Picture
from smooseg_fast.learn.callbacks import Callbacks, Progress
from smooseg_fast.segment.checkpoint import Checkpoint
from smooseg_fast.segment.model import Head
from smooseg_fast.segment.names import Group
from smooseg_fast.segment.notebook import GAP, LINE, drawn, row_of
from smooseg_fast.system import progress as progress_module
from smooseg_fast.system.progress import Bar
from smooseg_fast.train import configure

IMAGES = [draw(number)[0] for number in range(3)]
QUICK = dict(size=64, eval_size=64, backbone="filterbank", init="pca-kmeans", prototypes=3, batch_size=2, steps=4)


@pytest.fixture
def segmenter():
    backbone = load_backbone("filterbank", "cpu")
    config = TrainConfig(size=64, eval_size=64, backbone="filterbank")
    report = {"images": 3, "health": {"perplexity": 2.5}, "scores": {"hungarian": {"accuracy": 0.75, "miou": 0.5}}}
    checkpoint = Checkpoint(config, Head(backbone.dim, 3), 7, "filterbank", backbone.digest, report=report)
    return Segmenter(checkpoint, backbone)


# what a notebook displays


def test_show_lays_the_labels_of_predict_over_the_image(segmenter):
    image = IMAGES[0]
    shown, labels = segmenter.show(image, mirror=False), segmenter.predict(image, mirror=False)
    present = len(np.unique(labels))
    assert shown.size == (2 * image.shape[1] + GAP, image.shape[0] + GAP + LINE * present)
    pixels = np.asarray(shown)
    assert np.array_equal(pixels[: image.shape[0], : image.shape[1]], image)
    colours = np.array([group.colour for group in segmenter.groups])
    overlay = pixels[: image.shape[0], image.shape[1] + GAP :]
    assert np.array_equal(overlay, np.rint((image + colours[labels].astype(float)) / 2))


def test_a_large_image_is_shown_smaller_and_no_data_is_white():
    labels = np.zeros((100, 3200), np.uint8)
    labels[:, :1600] = 255
    shown = drawn(Picture(np.zeros((100, 3200, 3), np.uint8)), labels, [Group(0, "road", (200, 0, 0))])
    assert shown.size == (3200 + GAP, 50 + GAP + LINE)
    assert shown.getpixel((1600 + GAP + 10, 10)) == (255, 255, 255)
    assert shown.getpixel((3200 - 10, 10)) == (100, 0, 0)


def test_the_table_of_groups_is_escaped_html(segmenter):
    html = segmenter._repr_html_()
    assert html.count("<tr>") == 1 + len(segmenter.groups)
    for text in ("3 groups", "backbone filterbank on cpu", "7 steps", "accuracy 75.0%", "miou 50.0%", "perplexity 2.5"):
        assert text in html
    row = row_of(Group(2, "<script>&", (1, 2, 255), 0.125))
    assert "<td>2</td><td style='text-align:left'>&lt;script&gt;&amp;</td><td>12.5%</td>" in row
    assert "background:#0102ff" in row
    assert set(re.findall(r"<(\w+)", row)) == {"tr", "td", "span"}


def test_a_bar_in_a_notebook_is_tqdms_own(monkeypatch, capsys):
    monkeypatch.setattr(progress_module, "in_notebook", lambda: True)
    with Bar(total=2, disable=True) as bar:
        assert not isinstance(bar, Bar)
        bar.update()
        bar.set_postfix_str("x", refresh=False)


# callbacks


def test_callbacks_are_told_every_step_and_every_pass():
    steps, passes, both = [], [], []
    listener = SimpleNamespace(on_step=lambda p: both.append(p.step), on_epoch=lambda p: both.append(-p.epoch))
    callbacks = Callbacks([steps.append, SimpleNamespace(on_epoch=passes.append), listener], steps_per_epoch=2)
    for step in range(1, 6):
        callbacks.tell(step, 5, [{"step": step}] if step == 4 else [])
    assert steps[2] == Progress(3, 5, 1)
    assert [progress.records for progress in steps] == [(), (), (), ({"step": 4},), ()]
    assert [(progress.step, progress.epoch) for progress in passes] == [(2, 1), (4, 2)]
    assert both == [1, 2, -1, 3, 4, -2, 5]
    for wrong in (print, SimpleNamespace(on_step=print)):  # before anything is read
        with pytest.raises(UserError, match=r"^callbacks: give a list of functions, such as \[f\]; got "):
            fit("nosuch", callbacks=wrong)
    with pytest.raises(UserError, match=r"^callbacks: must be functions, or have on_step or on_epoch; got 3$"):
        Callbacks([3], 1)


# Weights & Biases


class FakeRun:
    """Stand in for a run of wandb."""

    def __init__(self, kept):
        self.logged, self.finished, self.kept = [], 0, kept

    @property
    def step(self):
        return self.kept

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def test_callbacks_and_wandb_get_what_metrics_jsonl_gets(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    begun = []
    fake = FakeRun(0)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: begun.append(options) or fake))
    told = []
    fit(IMAGES, out=tmp_path / "out", log_every=2, log="wandb", callbacks=[told.append], progress=False, **QUICK)
    lines = [json.loads(line) for line in open(tmp_path / "out" / "metrics.jsonl")]
    assert [progress.step for progress in told] == [1, 2, 3, 4]
    assert [len(progress.records) for progress in told] == [0, 1, 0, 1]
    assert [dict(record) for progress in told for record in progress.records] == lines
    assert [step for step, _ in fake.logged] == [line["step"] for line in lines] == [2, 4]
    for (_, values), line in zip(fake.logged, lines):
        head = line["head"]
        assert values == {f"{name}/{head}": value for name, value in line.items() if isinstance(value, float)}
    assert fake.finished == 1
    (options,) = begun
    assert (options["name"], options["dir"], options["resume"]) == ("out", str(tmp_path / "out"), "allow")
    assert options["config"]["steps"] == 4
    # a resumed run has the same id, and does not repeat what is shown
    from smooseg_fast.learn.board import open_board

    config = TrainConfig(**QUICK, log="wandb")
    fake.kept, fake.logged = 3, []
    open_board(config, tmp_path / "out", lines)
    open_board(config, tmp_path / "out", [])
    assert [step for step, _ in fake.logged] == [4]
    assert begun[1]["id"] == begun[2]["id"] == begun[0]["id"]


def test_wandb_that_is_missing_or_refuses_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError) as raised:
        fit(IMAGES, out=tmp_path / "out", log="wandb", progress=False, **QUICK)
    assert str(raised.value) == (
        '--log wandb: the package is not installed; pip install "smooseg_fast[wandb]", or leave the flag out'
    )

    def refusing(**options):
        raise RuntimeError("api_key not configured\nmore")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refusing))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"^--log wandb: cannot begin \(api_key not configured\); run `wandb login`"):
        fit(IMAGES, out=tmp_path / "out", log="wandb", progress=False, **QUICK)


# --config


def test_a_run_by_the_settings_of_another(folder, capsys):
    assert run(train.main, ["--data", str(folder), "--out", "first", *SMALL]) == 0
    again, asked = configure(["--config", "first/run.json"]), configure(["--data", str(folder), *SMALL])
    assert again.learning() == asked.learning() | {"backbone": "filterbank"}
    # the same command on the same folder finds the run finished
    capsys.readouterr()
    assert run(train.main, ["--config", "first/run.json", "--out", "first"]) == 0
    assert "this run is finished" in capsys.readouterr().out


def test_flags_win_over_the_file(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"data": "photos", "steps": 7, "seed": 3, "scale": ["1", "0.5"], "granularity": [0.1]}))
    config = configure(["--config", str(path), "--seed", "4"])
    assert (config.data, config.steps, config.seed, config.preset) == ("photos", 7, 4, "folder")
    assert config.scale == ("1", "0.5")
    assert configure(["--config", str(path), "--threshold-within", "0", "--threshold-across", "0"]).granularity is None
    path.write_text('{"preset": "demo"}')
    assert configure(["--config", str(path)]) == configure([])


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"stepz": 3}', "stepz: is not a setting; did you mean steps"),
        ('{"steps": "many"}', "--steps: must be a whole number, got 'many'"),
        ('{"preset": "nosuch"}', "--preset: 'nosuch' is not known; choose one of demo, "),
        ('{"preset": []}', "--preset: must be text, got ()"),
        ("[1]", "holds no settings by name; give the run.json of a run"),
        ("{", "cannot be read (Expecting property name enclosed in double quotes: "),
        (None, "cannot be read (No such file or directory); give the run.json of a run"),
    ],
)
def test_a_file_that_is_no_settings_is_one_line(tmp_path, text, error):
    path = tmp_path / "run.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as raised:
        configure(["--config", str(path)])
    assert str(raised.value).startswith(f"--config {path}: {error}")
    assert "\n" not in str(raised.value)


def test_a_preset_beside_the_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^--preset: --config brings all its settings; leave one of them out$"):
        configure(["--config", "run.json", "--preset", "demo"])
