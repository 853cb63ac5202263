"""Whole runs on small images: what is written, resumed, refused and said."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from textures import draw

import smooseg_fast
from smooseg_fast import train
from smooseg_fast.command import run
from smooseg_fast.config import Thresholds
from smooseg_fast.datasets import ImageFolder
from smooseg_fast.datasets.images import ImageError
from smooseg_fast.errors import UserError
from smooseg_fast.learn import groupspicture, loop, runfolder, runpictures, trainer
from smooseg_fast.learn import run as steps
from smooseg_fast.learn.summary import sizes
from smooseg_fast.measure.confusion import LabelSquares
from smooseg_fast.segment.checkpoint import STATE_KEY, read_checkpoint, read_training_state, sealed
from smooseg_fast.system.locks import Lock

EVERYTHING = {"checkpoint.safetensors", "training.safetensors", "metrics.jsonl", "run.json", "report.json"}
EVERYTHING |= {"groups.png", "tree.png", "report.html", "tiles.jsonl", "groups.jsonl", ".smooseg"}
NETWORK = "iteration:features_of"
FIRST = "granularity_0_seed_0"  # the head that is learnt by default
SMALL = [
    "--size",
    "64",
    "--eval-size",
    "64",
    "--steps",
    "6",
    "--batch-size",
    "4",
    "--log-every",
    "2",
    "--checkpoint-every",
    "3",
]


def call(*args):
    return run(train.main, [str(a) for a in args])


def metrics(out, head=FIRST):
    """The records of one head."""
    return [record for record in map(json.loads, open(f"{out}/metrics.jsonl")) if record["head"] == head]


def files(out):
    """Read the files of a run, without the times that its page tells."""
    contents = {path.relative_to(out).as_posix(): path.read_bytes() for path in Path(out).rglob("*") if path.is_file()}
    return {name: re.sub(rb'"times": ?\[.*?\]\]', b"", content) for name, content in contents.items()}


@pytest.fixture
def curves(monkeypatch):
    """Curves of the shortest runs, too."""
    monkeypatch.setattr(runfolder, "CURVES_STEPS", 1)


def test_a_folder_without_labels(folder, capsys, curves):
    assert call("--data", folder, "--out", "out", "--prototypes", "5", *SMALL) == 0
    out = capsys.readouterr().out
    assert "learning   groups by a tree of 5 fine ones, then 6 steps of training on cpu" in out
    assert "net force" not in out
    assert "perplexity" not in out
    chosen = r"^groups     [2-5] of 5 fine ones, chosen without labels"
    assert re.search(chosen, out, re.M)
    assert re.search(
        r"^groups     [1-5] of [2-5] in use, \d+ %(, \d+ %)* of the area; labels settled on \d+ % of it$",
        out,
        re.M,
    )
    assert re.search(r"^done       the whole run took [\d.]+ s$", out, re.M)
    assert "k-means" not in out
    assert out.strip().splitlines()[-1] == (
        "next       python -m smooseg_fast.predict --checkpoint out/checkpoint.safetensors "
        f"--images {folder} --out out/predictions"
    )
    records = metrics("out")
    assert [r["step"] for r in records] == [2, 4, 6]
    for key in (
        "total",
        "energy_within",
        "energy_across",
        "data",
        "perplexity",
        "labels_per_image",
        "image_information",
        "agreement",
    ):
        assert np.isfinite(records[-1][key])
    report = json.load(open("out/report.json"))
    assert report["images"] == 6
    assert sum(report["health"]["shares"]) == pytest.approx(1)
    for name in ("groups.png", "curves.png"):
        assert Image.open(f"out/{name}").size[0] > 200
    checkpoint = read_checkpoint("out/checkpoint.safetensors")
    assert (checkpoint.step, checkpoint.config.prototypes, checkpoint.config.impl) == (6, 5, "torch")


def test_figures_for_experts_are_printed_on_demand(folder, capsys):
    """And --verbose is no other run: the same folder is finished by it."""
    small = ["--data", folder, "--out", "out", "--prototypes", "5", *SMALL]
    assert call(*small, "--verbose") == 0
    out = capsys.readouterr().out
    for figure in ("net force", "perplexity", "I(image;label)/H(label)", "modularity", "million pairs"):
        assert figure in out
    assert call(*small) == 0
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("shares", "text"),
    [
        ((0.25, 0.7, 0.05), "70 %, 25 %, 5 %"),
        ((0.996, 0.004), "100 %"),
        ((0.3, *[0.1] * 7), "30 %, 10 %, 10 %, 10 %, 10 %, 10 % and 2 smaller groups"),
        ((0.4, *[0.1] * 6), "40 %, 10 %, 10 %, 10 %, 10 %, 10 % and 1 smaller group"),
    ],
)
def test_sizes_of_groups_in_words(shares, text):
    assert sizes(shares) == text


def test_labels_give_figures_next_to_kmeans(labelled, capsys):
    assert call("--data", labelled, "--out", "out", *SMALL) == 0
    out = capsys.readouterr().out
    assert re.search(r"k-means +accuracy [\d.]+ %  mIoU [\d.]+ %  \(same features, 2 groups\)", out)
    assert re.search(r"smooseg +accuracy [\d.]+ %  mIoU [\d.]+ %  \(\d groups\)", out)
    figures = r"accuracy [\d.]+ %  mIoU [\d.]+ %"
    assert re.search(rf"smooseg, guided +{figures}  \(edges follow the image\)", out)
    assert re.search(r"tree, untrained +accuracy [\d.]+ %  mIoU [\d.]+ %  \(2 groups, as many as classes\)", out)
    assert "3 held-out images" in out
    scores = json.load(open("out/report.json"))["scores"]
    assert {c["name"] for c in scores["hungarian"]["classes"]} == {"wall", "fence"}
    assert scores["hungarian"]["pixels"] == 3 * 64 * 64 - 3 * 64 * round(64 * 2 / 72)
    records = metrics("out")
    assert [("miou" in r) for r in records] == [False, False, True]


def test_labels_of_val_alone_are_used(labelled, capsys):
    shutil.rmtree(labelled / "train" / "labels")
    assert call("--data", labelled, "--out", "out", *SMALL) == 0
    out = capsys.readouterr().out
    assert "2 groups, as many as classes" in out  # of val
    assert "3 held-out images" in out
    assert read_checkpoint("out/checkpoint.safetensors").class_names == ("wall", "fence")
    segmenter = smooseg_fast.fit(labelled, size=64, eval_size=64, steps=3, batch_size=4, progress=False)
    assert segmenter.checkpoint.report["scores"]["held_out"]
    assert segmenter.checkpoint.report["scores"]["tree"]["groups"] == 2


def test_two_textures_are_told_apart(tmp_path, monkeypatch):
    """Not only plumbing: an obvious segmentation is found."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    images = [draw(number, 144, 192)[0] for number in range(5)]
    segmenter = smooseg_fast.fit(images, size=128, eval_size=128, steps=30, batch_size=4, progress=False, prototypes=2)
    right = []
    for number in range(5, 8):
        image, label = draw(number, 144, 192)
        same = (segmenter.predict(image) == label).mean()
        right.append(max(same, 1 - same))
    assert min(right) > 0.9


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed_equals_undisturbed(folder, capsys, monkeypatch, number):
    assert call("--data", folder, "--out", "whole", *SMALL) == 0
    step = loop.train_step
    calls = []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 4:
            signal.raise_signal(number)
        return step(*args, **options)

    monkeypatch.setattr(loop, "train_step", interrupted)
    assert call("--data", folder, "--out", "cut", *SMALL) == 128 + number
    said = capsys.readouterr().err
    assert "interrupted; step 4 of 6 is saved, whole, in cut\n" in said
    assert f"resume     python -m smooseg_fast.train --data {folder} --out cut {' '.join(SMALL)}\n" in said
    assert read_training_state("cut/training.safetensors").step == 4
    assert call("--data", folder, "--out", "cut", *SMALL) == 0
    assert "resume     from step 4" in capsys.readouterr().out
    assert len(calls) == 6
    whole, cut = (read_checkpoint(f"{name}/checkpoint.safetensors") for name in ("whole", "cut"))
    for name, value in whole.head.state_dict().items():
        assert torch.equal(value, cut.head.state_dict()[name]), name
    whole, cut = (safetensors.torch.load_file(f"{name}/training.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    for name, value in whole.items():
        assert torch.equal(value, cut[name]), name
    assert open("whole/metrics.jsonl").read() == open("cut/metrics.jsonl").read()
    # once more on a finished run: nothing is trained, nothing is lost
    before = open("cut/checkpoint.safetensors", "rb").read()
    assert call("--data", folder, "--out", "cut", *SMALL) == 0
    assert "is finished" in capsys.readouterr().out
    assert before == open("cut/checkpoint.safetensors", "rb").read()


def test_the_same_seed_follows_the_same_losses(folder):
    """dense and torch, 50 steps in fp32, to 1e-5."""
    losses = {}
    for impl in ("dense", "torch"):
        assert call("--data", folder, "--out", impl, "--impl", impl, *SMALL, "--steps", "50", "--log-every", "1") == 0
        losses[impl] = np.array([record["total"] for record in metrics(impl)])
    assert len(losses["torch"]) == 50
    np.testing.assert_allclose(losses["torch"], losses["dense"], rtol=0, atol=1e-5)


def test_triton_follows_the_losses_of_torch(folder):
    pytest.importorskip("triton")
    losses = {}
    small = [*SMALL, "--size", "32", "--batch-size", "2", "--log-every", "1", "--granularity", "0.05", "0.2"]
    for impl in ("torch", "triton"):  # the kernels in their interpreter, on a small grid
        assert call("--data", folder, "--out", impl, "--impl", impl, *small) == 0
        losses[impl] = np.array([record["total"] for record in metrics(impl)])
        assert read_checkpoint(f"{impl}/checkpoint.safetensors").config.impl == impl
    np.testing.assert_allclose(losses["triton"], losses["torch"], rtol=0, atol=2e-5)


def test_triton_on_a_cpu_is_refused_in_one_line(folder):
    """In a process of its own, since the interpreter is on in this one; whether Triton is installed or not."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    args = [
        sys.executable,
        "-m",
        "smooseg_fast.train",
        "--data",
        str(folder),
        "--out",
        "out",
        "--impl",
        "triton",
        "--device",
        "cpu",
        *SMALL,
    ]
    done = subprocess.run(args, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 2
    lines = [line for line in done.stderr.strip().splitlines() if not line.startswith("starting ")]  # on a busy machine
    assert len(lines) == 1
    assert lines[0].startswith("error: --impl triton: cannot run on cpu")
    assert not os.path.exists("out")


def test_reruns_are_bit_equal(folder):
    for name in ("a", "b"):
        assert call("--data", folder, "--out", name, *SMALL, "--patches", "20") == 0
    assert open("a/metrics.jsonl").read() == open("b/metrics.jsonl").read()


def test_deterministic_is_asked_for_in_the_steps_alone(folder, monkeypatch):
    """And learns the same: a CPU is deterministic anyway."""
    seen, step = [], loop.train_step
    monkeypatch.setattr(
        loop,
        "train_step",
        lambda *args, **options: seen.append(torch.are_deterministic_algorithms_enabled()) or step(*args, **options),
    )
    assert call("--data", folder, "--out", "a", *SMALL) == 0
    assert call("--data", folder, "--out", "b", *SMALL, "--deterministic") == 0
    assert seen == [False] * 6 + [True] * 6
    assert not torch.are_deterministic_algorithms_enabled()
    assert open("a/metrics.jsonl").read() == open("b/metrics.jsonl").read()


def test_default_folders_do_not_collide(folder, capsys):
    assert call("--data", folder, *SMALL) == 0
    assert call("--data", folder, *SMALL, "--seed", "1") == 0
    assert call("--data", folder, *SMALL) == 0
    out = capsys.readouterr().out
    assert "runs/photos-2/checkpoint.safetensors" in out
    assert "is finished" in out


def test_unreadable_images_are_named_skipped_and_counted(folder, capsys):
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    whole = (folder / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    assert call("--data", folder, "--out", "out", *SMALL) == 0
    printed = capsys.readouterr()
    assert "2 images could not be used" in printed.out
    assert "broken.jpg" in printed.err
    assert "cut.png" in printed.err
    assert len(json.load(open("out/report.json"))["skipped"]) == 2


def test_pictures_are_of_held_out_images_that_could_be_read(labelled, monkeypatch, capsys):
    """A damaged image of val/ has the name of a sound one of train/, and the other way round."""
    images = {split: labelled / split / "images" for split in ("train", "val")}
    (images["val"] / "0.png").write_bytes(b"junk")
    Image.fromarray(draw(9)[0]).save(images["train"] / "5.png")
    (images["train"] / "6.png").write_bytes(b"junk")
    shown = []
    blank = Image.new("RGB", (9, 9))
    monkeypatch.setattr(groupspicture, "sheet_pages", lambda images, *_: shown.extend(images) or [blank])
    assert call("--data", labelled, "--out", "out", *SMALL) == 0
    assert [name for name, *_ in shown] == [f"{number}.png (middle)" for number in (5, 6, 7)]
    for number, (_, image, labels, truth) in zip((5, 6, 7), shown):
        # what is scored: columns 10 to 74 of 85, to which the 96 are scaled
        pixels, label = (part[:, 11:83] for part in draw(number))
        assert image.shape == pixels.shape
        # JPEG keeps the brightness of this noise; another image, or another column, differs by 13 and more
        assert abs(image.mean(-1) - pixels.mean(-1)).mean() < 5
        assert (truth == label).mean() > 0.97
        assert labels.shape == label.shape
    assert "could not be drawn" not in capsys.readouterr().out


def test_pictures_that_could_not_be_used_take_no_place_from_others(folder, monkeypatch):
    for number in range(6, 12):
        Image.fromarray(draw(number)[0]).save(folder / f"{number}.png")
        (folder / f"broken {number}.png").write_bytes(b"junk")
    shown = []
    blank = Image.new("RGB", (9, 9))
    monkeypatch.setattr(groupspicture, "sheet_pages", lambda images, *_: shown.extend(images) or [blank])
    assert call("--data", folder, "--out", "out", *SMALL) == 0
    assert len(shown) == 8


def test_an_image_that_went_since_is_left_out_of_the_picture(folder, monkeypatch, capsys):
    assert call("--data", folder, "--out", "out", *SMALL, "--prototypes", "3") == 0
    Path("out/groups.png").unlink()
    shown, picture = [], ImageFolder.picture

    def gone(self, index):
        if self.names[index] == "2.png":
            raise ImageError("2.png", "gone")
        return picture(self, index)

    monkeypatch.setattr(ImageFolder, "picture", gone)
    blank = Image.new("RGB", (9, 9))
    monkeypatch.setattr(groupspicture, "sheet_pages", lambda images, *_: shown.extend(images) or [blank])
    assert call("--data", folder, "--out", "out", *SMALL, "--prototypes", "3") == 0
    assert sorted(name for name, *_ in shown) == ["0.png", "4.png", "sub/1.png", "sub/3.png", "sub/5.png"]


@pytest.mark.parametrize("name", ["groups_picture", "curves_picture", "tree_picture"])
def test_a_picture_that_fails_does_not_lose_the_run(folder, monkeypatch, capsys, curves, name):
    everything = EVERYTHING | {"curves.png"}
    with monkeypatch.context() as patch:
        patch.setattr(runpictures, name, lambda *_: 1 / 0)
        assert call("--data", folder, "--out", "out", *SMALL) == 0
    out = capsys.readouterr().out
    file = name.replace("_picture", ".png")
    assert (
        f"warning    {file} could not be drawn (ZeroDivisionError: division by zero); the same command tries again"
        in out
    )
    assert out.strip().splitlines()[-1].startswith("next ")
    assert {p.name for p in Path("out").iterdir()} == everything - {file, file.replace("groups.png", "groups.jsonl")}
    assert call("--data", folder, "--out", "out", *SMALL) == 0
    assert {p.name for p in Path("out").iterdir()} == everything


def test_a_file_that_was_taken_away_is_made_again(folder, curves):
    assert call("--data", folder, "--out", "out", *SMALL) == 0
    before = files("out")
    for file in ("groups.png", "curves.png", "tree.png", "report.json", "checkpoint.safetensors"):
        Path("out", file).unlink()
        assert call("--data", folder, "--out", "out", *SMALL) == 0
        assert files("out") == before, file


def test_published_thresholds_warn_of_opposite_forces(folder, capsys):
    args = [
        "--data",
        folder,
        "--out",
        "out",
        *SMALL,
        "--threshold-within",
        "-0.9",
        "--threshold-across",
        "0.99",
        "--init",
        "random",
    ]
    assert call(*args) == 0
    assert "net forces differ in sign" in capsys.readouterr().out
    config = read_checkpoint("out/checkpoint.safetensors").config
    assert (config.granularity, config.thresholds(), config.init) == (
        None,
        (Thresholds(-0.9, 0.99, relative=False),),
        "random",
    )


BAD = [
    (["--data", "nowhere"], "--data nowhere: no such file or folder"),
    (["--data", "empty"], "--data empty: no images in it"),
    (["--steps", "-1"], "--steps: must be at least 0, got -1"),
    (["--steps", "many"], "--steps"),
    (["--batch-size", "1"], "--batch-size: must be at least 2"),
    (["--preset", "ade20k"], "--preset: 'ade20k' is not known; choose one of demo, folder"),
    (["--preset", "potsdam"], "--data: missing"),
    (["--backbone", "resnet"], "--backbone resnet: unknown"),
    (["--backbone", "nobody/nothing"], "--backbone nobody/nothing"),
    (["--impl", "cuda"], "--impl: 'cuda' is not known"),
    (["--granularity", "0.1", "0.1"], "--granularity: give one or more different numbers"),
    (["--granularity", "nan"], "--granularity: must be between -2 and 2, got nan"),
    (["--heads", "0"], "--heads: must be at least 1"),
    (
        ["--granularity", "0.1", "--threshold-within", "0.1", "--threshold-across", "0.2"],
        "--granularity: give either it alone, or both",
    ),
    (["--threshold-within", "0.1"], "--granularity: give either it alone, or both"),
    (["--device", "cuda:99"], "--device cuda:99"),
    (["--prototypes", "300"], "--prototypes: must be at most 255"),
    (["--prototypes", "1"], "--prototypes: must be at least 2"),
    (["--nonsense", "1"], "--nonsense"),
    (["--dropout", "1"], "--dropout: must be between 0 and 0.99"),
    (["--seed", str(2**63)], "--seed: must be below 2^63, got 9223372036854775808"),
    (["--granularity", "0.1", "0.10000001"], "--granularity: give one or more different numbers"),
    (["--data", ""], "--data: is empty; give a folder, or leave it out"),
    (["--cache", ""], "--cache: is empty"),
]


@pytest.mark.parametrize(("args", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(folder, capsys, monkeypatch, args, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (folder.parent / "empty").mkdir()
    data = [] if "--data" in args or "potsdam" in args else ["--data", folder]
    assert call(*data, "--out", "out", *SMALL, *args) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error
    assert "Traceback" not in error


def test_bad_data_is_one_line_and_exit_code_2(labelled, capsys):
    def fails(message):
        assert call("--data", labelled, "--out", "out", *SMALL) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        assert message in lines[0]

    mask = labelled / "val" / "labels" / "5.png"
    good = mask.read_bytes()
    Image.fromarray(np.zeros((5, 6), np.uint8)).save(mask)
    fails("5.png: the label is 6 x 5 pixels")
    Image.fromarray(np.full((72, 96), 7, np.uint8)).save(mask)
    fails("5.png: the number 7")
    mask.write_bytes(good)
    for image in (labelled / "train" / "images").iterdir():
        image.write_bytes(b"junk")
    fails("--data: none of the 5 images can be used")


@pytest.mark.parametrize(
    ("backbone", "grey", "number"), [(NETWORK, False, 2), (NETWORK, True, 0), ("filterbank", False, 0)]
)
def test_steps_follow_the_tree_where_they_help(folder, monkeypatch, capsys, backbone, grey, number):
    """By default: for colour pictures that a network sees."""
    monkeypatch.setattr(trainer, "TUNING", 2)
    for path in (path for path in folder.rglob("*") if grey and path.is_file()):
        Image.open(path).convert("L").save(path)
    small = [*SMALL]
    del small[small.index("--steps") : small.index("--steps") + 2]
    args = ("--data", folder, "--out", "out", *small, "--backbone", backbone)
    assert call(*args) == 0
    assert read_checkpoint("out/checkpoint.safetensors").config.steps == number
    assert not Path("out/curves.png").exists()  # of two steps
    assert ("then 2 steps of training" in capsys.readouterr().out) == bool(number)
    assert call(*args) == 0
    assert "this run is finished" in capsys.readouterr().out


def test_without_labels_of_val_the_training_images_are_measured(labelled, capsys):
    shutil.rmtree(labelled / "val" / "labels")
    assert call("--data", labelled, "--out", "out", *SMALL) == 0
    said = capsys.readouterr().out
    assert "set/val has a label: figures are taken on the training images" in said
    assert "scores     on the 5 training images; groups" in said


def test_an_output_folder_of_another_run(folder, capsys):
    assert call("--data", folder, "--out", "out", *SMALL) == 0
    before = files("out")
    assert call("--data", folder, "--out", "out", *SMALL, "--seed", "3") == 2
    assert "--out out: holds another run (seed is 0 there and 3 here)" in capsys.readouterr().err
    assert before == files("out")


def test_one_folder_is_one_run_however_it_is_typed(folder, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(folder.parent))
    for data, out in (("photos", "made"), ("photos/", "~/made"), ("./photos", "made/"), ("photos", "./made")):
        assert call("--data", data, "--out", out, *SMALL) == 0
    said = capsys.readouterr().out
    assert said.count("made: this run is finished") == 3
    assert "~" not in said  # no shell would replace it in what is quoted
    assert not Path("~").exists()


def test_a_folder_that_another_process_has(folder, capsys):
    """And the run that is refused takes nothing of it away."""
    Path("out").mkdir()
    lock = Lock(Path("out/.lock"))
    assert lock.take()
    lock.sign()
    assert call("--data", folder, "--out", "out", *SMALL) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: --out out: process {os.getpid()} on ")
    assert line.endswith(" is at work there; wait until it ends, or give another folder")
    assert {path.name for path in Path("out").iterdir()} == {".lock"}
    lock.release()
    assert call("--data", folder, "--out", "out", *SMALL) == 0
    assert {path.name for path in Path("out").iterdir()} == EVERYTHING


def test_an_output_folder_that_cannot_be_written_is_known_before_features_are_taken(folder, capsys):
    assert call("--data", folder, "--out", folder / "0.png" / "out", *SMALL) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line == f"error: --out {folder}/0.png/out: cannot be read (run.json: Not a directory); give another folder"


def test_a_run_that_fails_leaves_no_folder(folder, monkeypatch):
    monkeypatch.setattr(trainer, "open_features", lambda *_, **__: (_ for _ in ()).throw(UserError("no")))
    assert call("--data", folder, "--out", "a/b/c", *SMALL) == 2
    assert not Path("a").exists()


def test_a_state_that_is_damaged(folder, monkeypatch, capsys):
    assert call("--data", folder, "--out", "out", *SMALL) == 0
    Path("out/report.json").unlink()
    Path("out/training.safetensors").write_text("junk")
    assert call("--data", folder, "--out", "out", *SMALL) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: out/training.safetensors: damaged, or written by another version")
    assert error.endswith("; remove it to train from the first step, or give another --out")
    Path("out/training.safetensors").unlink()
    assert call("--data", folder, "--out", "out", *SMALL) == 0


def change_state(change):
    with safetensors.safe_open("out/training.safetensors", "pt") as file:
        header, tensors = json.loads(file.metadata()[STATE_KEY]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(header, tensors)
    safetensors.torch.save_file(tensors, "out/training.safetensors", {STATE_KEY: sealed(header, tensors)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h, t: t["heads.teacher"].view(-1)[3].fill_(float("nan")), "every head has values that are NaN"),
        (lambda h, t: t["optimizer.0.exp_avg"].view(-1)[3].fill_(float("inf")), "every head has values that are NaN"),
        (
            lambda h, t: t.update({"optimizer.0.exp_avg": t["optimizer.1.exp_avg"].clone()}),
            "the moments of parameter 0",
        ),
        (lambda h, t: t.update({"heads.teacher": t["heads.teacher"][:, :1].clone()}), "teacher is torch.float32"),
        (lambda h, t: h.update(step=-1), "its header holds values of the wrong kind"),
        (lambda h, t: h.update(step=7), "its header holds values of the wrong kind"),
        (lambda h, t: h.update(windows=[1]), "its header holds values of the wrong kind"),
        (lambda h, t: h.update(windows=[]), "its header holds values of the wrong kind"),
        (lambda h, t: h.update(reasons=[]), "its header holds values of the wrong kind"),
        (lambda h, t: h["config"].update(lr="x"), "--lr: must be a number"),
        (lambda h, t: h["config"].update(seed=5), "belongs to another run (seed is 5 there and 0 here)"),
    ],
)
def test_a_state_that_is_none_of_the_run(folder, capsys, change, words):
    assert call("--data", folder, "--out", "out", *SMALL) == 0
    before = files("out")
    Path("out/report.json").unlink()
    change_state(change)
    assert call("--data", folder, "--out", "out", *SMALL) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: out/training.safetensors: ")
    assert words in error
    assert error.endswith("; remove it to train from the first step, or give another --out")
    Path("out/training.safetensors").unlink()
    assert call("--data", folder, "--out", "out", *SMALL) == 0
    assert files("out") == before


def test_a_checkpoint_of_a_finished_run_that_is_damaged(folder, capsys):
    assert call("--data", folder, "--out", "out", *SMALL) == 0
    before, path = files("out"), Path("out/checkpoint.safetensors")
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    assert call("--data", folder, "--out", "out", *SMALL) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == (
        "error: out/checkpoint.safetensors: damaged, or written by another version (it has changed since it was "
        "written); remove it, and the same command writes it again"
    )
    path.unlink()
    assert call("--data", folder, "--out", "out", *SMALL) == 0
    assert files("out") == before


def test_lines_of_metrics_that_are_none_of_the_run_go(folder):
    assert call("--data", folder, "--out", "out", *SMALL) == 0
    before = files("out")
    Path("out/report.json").unlink()
    with open("out/metrics.jsonl", "a") as file:
        file.write('{"step": 2}\n{"step": "x", "head": "' + FIRST + '"}\n{"step": 1, "head": "mine"}\n')
    assert call("--data", folder, "--out", "out", *SMALL) == 0
    assert files("out") == before


def test_scores_of_the_last_step_are_counted_once(labelled, monkeypatch):
    of_head, seen = LabelSquares.of_head, []
    monkeypatch.setattr(LabelSquares, "of_head", lambda self, head: seen.append(1) or of_head(self, head))
    args = ["--data", labelled, *SMALL, "--granularity", "0.1", "0.2", "--init", "pca-kmeans"]
    assert call(*args, "--out", "a") == 0
    assert len(seen) == 2
    made = json.load(open("a/report.json"))
    for head, found in made["heads"].items():
        assert found["scores"]["hungarian"]["miou"] == metrics("a", head)[-1]["miou"]
    Path("a/report.json").unlink()  # rewritten from the saved state, after counting again
    assert call(*args, "--out", "a") == 0
    assert len(seen) == 4
    assert json.load(open("a/report.json")) == made
    # figures of an earlier step are not those of the end
    monkeypatch.setattr(steps.Run, "checkpoint_is_due", lambda self: self.done == 2)
    assert call(*args, "--out", "b") == 0
    assert len(seen) == 8
    assert json.load(open("b/report.json")) == made


@pytest.mark.parametrize(("crops", "more"), [("slide", "add images"), ("center", "add images, or --crops slide")])
def test_one_square_is_too_few(tmp_path, monkeypatch, capsys, crops, more):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(draw(0, 72, 72)[0]).save("one.png")
    assert call("--data", "one.png", "--out", "out", "--cache", "cache", *SMALL, "--crops", crops) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == f"error: --data: 1 square(s) of 64 pixels, but pairs of images need 2; {more}"


def test_images_smaller_than_a_patch(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    Image.fromarray(np.zeros((4, 30, 3), np.uint8)).save(tmp_path / "tiny" / "a.png")
    assert call("--data", "tiny", "--out", "out", "--cache", "cache", *SMALL) == 2
    assert "a.png" in capsys.readouterr().err


def test_fit_from_arrays_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    segmenter = smooseg_fast.fit(
        [draw(n)[0] for n in range(4)], size=64, eval_size=64, steps=3, batch_size=4, prototypes=3, progress=False
    )
    labels = segmenter.predict(draw(9, 50, 130)[0])
    assert labels.shape == (50, 130)
    assert labels.dtype == np.uint8
    assert {p.name for p in tmp_path.iterdir()} == {"cache"}
    path = segmenter.save(tmp_path / "one.safetensors")
    again = smooseg_fast.Segmenter.load(path, device="cpu")
    assert (again.predict(draw(9, 50, 130)[0]) == labels).all()
    with pytest.raises(UserError, match=r"images\[1\]: must be a uint8"):
        smooseg_fast.fit([draw(0)[0], np.zeros((3, 3))])
    with pytest.raises(UserError, match="granularty: is not a setting"):
        smooseg_fast.fit([draw(0)[0]], granularty=1)


def test_granularities_with_seeds(labelled, capsys):
    """Every head is saved as the run that learns it alone would have saved it."""
    many = ["--data", labelled, *SMALL, "--granularity", "0.1", "-0.05", "--heads", "2"]
    assert call(*many, "--out", "out") == 0
    out = capsys.readouterr().out
    names = [f"granularity_{g}_seed_{seed}" for g in ("0.1", "-0.05") for seed in (0, 1)]
    assert sorted(path.stem for path in Path("out/heads").iterdir()) == sorted(names)
    assert "2 granularities at once" in out
    assert "granularity 0.1, seed 0 (predicts): " in out
    scores = r"accuracy [\d.]+ ± [\d.]+ %  mIoU [\d.]+ ± [\d.]+ %"
    assert re.search(rf"granularity -0.05 +{scores}  \(\d+ groups, 2 seeds\)", out)
    report = json.load(open("out/report.json"))
    assert (report["default"], sorted(report["heads"])) == (names[0], sorted(names))
    assert report["health"] == report["heads"][names[0]]["health"]
    assert call("--data", labelled, "--out", "one", *SMALL, "--granularity", "-0.05", "--seed", "1") == 0
    alone, of_many = read_checkpoint("one/checkpoint.safetensors"), read_checkpoint(f"out/heads/{names[3]}.safetensors")
    for name, value in alone.head.state_dict().items():
        torch.testing.assert_close(value, of_many.head.state_dict()[name], rtol=1e-4, atol=1e-5)
    assert dataclasses.replace(alone.config, out=None) == dataclasses.replace(of_many.config, out=None)
    assert set(alone.report) == set(of_many.report)
    assert not Path("one/heads").exists()


def test_heads_whose_losses_are_no_numbers_are_named_and_left_out(folder, capsys, monkeypatch):
    step = loop.train_step

    def breaking(heads, *args, **options):
        with torch.no_grad():
            heads.student[0] = float("nan")
        return step(heads, *args, **options)

    monkeypatch.setattr(loop, "train_step", breaking)
    assert call("--data", folder, "--out", "out", *SMALL, "--granularity", "0.1", "0.2", "--prototypes", "3") == 0
    out = capsys.readouterr().out
    assert "warning    step 2: granularity 0.1, seed 0: loss is NaN or infinite; this head is dropped" in out
    report = json.load(open("out/report.json"))
    assert (report["default"], report["broken"]) == ("granularity_0.2_seed_0", ["granularity_0.1_seed_0"])
    assert read_checkpoint("out/checkpoint.safetensors").config.granularity == (0.2,)
    assert call("--data", folder, "--out", "none", *SMALL, "--granularity", "0.1", "--prototypes", "3") == 2
    assert "at step 2 the losses of every head are NaN or infinite" in capsys.readouterr().err
