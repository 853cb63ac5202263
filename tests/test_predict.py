"""predict as a user runs it: what is written, and what the same command does after a stop, a change or a mishap."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from listing import find_images
from PIL import Image
from test_trainer import SMALL
from textures import draw

import smooseg_fast
from smooseg_fast import evaluate, predict, similarity, train
from smooseg_fast.backbones import Backbone
from smooseg_fast.command import run
from smooseg_fast.config import TrainConfig
from smooseg_fast.datasets.images import resize_short_side
from smooseg_fast.errors import UserError
from smooseg_fast.segment import segmenter
from smooseg_fast.segment.grouping import Grouping
from smooseg_fast.segment.segmenter import Segmenter
from smooseg_fast.show import items, predictions, sheet
from smooseg_fast.system import signals
from smooseg_fast.system.locks import Lock
from smooseg_fast.system.processes import ALONE


def test_predict_names_skips_and_counts_images_smaller_than_a_patch(trained, tmp_path, capsys):
    photos = tmp_path / "some"
    photos.mkdir()
    Image.fromarray(draw(0)[0]).save(photos / "whole.png")
    Image.fromarray(draw(0)[0][:4]).save(photos / "tiny.png")
    assert run(predict.main, ["--checkpoint", str(trained), "--images", str(photos), "--out", "made"]) == 0
    printed = capsys.readouterr()
    assert "segmented  1 of 2 images, 1 could not be used" in printed.out
    assert (
        f"skipped: {photos / 'tiny.png'}: 96 x 4 pixels, less than one patch of the backbone (8 pixels); take it out"
        in printed.err
    )
    shares = json.load(open("made/shares.json"))
    assert shares["skipped"] == {"tiny.png": "96 x 4 pixels, less than one patch of the backbone (8 pixels)"}
    assert not (tmp_path / "made" / "masks" / "tiny.png").exists()


def test_predict_writes_masks_overlays_shares_and_a_sheet(trained, tmp_path, capsys):
    photos = tmp_path / "mixed"
    (photos / "deep").mkdir(parents=True)
    image = draw(20, 90, 140)[0]
    Image.fromarray(image).save(photos / "a.jpg", quality=95)
    Image.fromarray(image).save(photos / "a.png")
    Image.fromarray(image[:, :70]).convert("L").save(photos / "deep" / "grey.tif")
    Image.fromarray(image).convert("P").save(photos / "deep" / "palette.bmp")
    Image.fromarray(image).convert("RGBA").save(photos / "deep" / "alpha.webp", lossless=True)
    (photos / "broken.png").write_bytes(b"nothing")
    assert run(predict.main, ["--checkpoint", str(trained), "--images", str(photos), "--out", "made"]) == 0
    printed = capsys.readouterr()
    assert "segmented  5 of 6 images, 1 could not be used" in printed.out
    assert "broken.png" in printed.err
    made = tmp_path / "made"
    masks = sorted(p.relative_to(made / "masks").as_posix() for p in (made / "masks").rglob("*.png"))
    assert masks == ["a.png", "a.png.png", "deep/alpha.png", "deep/grey.png", "deep/palette.png"]
    mask = Image.open(made / "masks" / "deep" / "grey.png")
    assert (mask.mode, mask.size) == ("P", (70, 90))
    labels = smooseg_fast.Segmenter.load(trained, device="cpu").predict(photos / "a.png")
    assert (np.array(Image.open(made / "masks" / "a.png.png")) == labels).all()
    shares = json.load(open(made / "shares.json"))
    assert set(shares["images"]) == {"a.jpg", "a.png", "deep/alpha.webp", "deep/grey.tif", "deep/palette.bmp"}
    assert shares["images"]["a.png"] == {
        str(k): pytest.approx((labels == k).mean(), abs=1e-6) for k in np.unique(labels)
    }
    assert sum(shares["mean"].values()) == pytest.approx(1, abs=1e-4)
    assert list(shares["skipped"]) == ["broken.png"]
    assert Image.open(made / "sheet.jpg").width == 1600
    assert Image.open(made / "overlays" / "a.png.jpg").size == (140, 90)


def test_predict_on_the_labelled_layout_leaves_the_masks_out(trained, labelled, capsys):
    assert (
        run(predict.main, ["--checkpoint", str(trained), "--images", str(labelled), "--out", "made", "--no-mirror"])
        == 0
    )
    assert "segmented  8 of 8 images" in capsys.readouterr().out
    assert set(json.load(open("made/shares.json"))["images"]) == {
        f"{'train' if n < 5 else 'val'}/images/{n}.png" for n in range(8)
    }


def test_predict_on_masks_alone(trained, labelled, capsys):
    for image in (labelled / "val" / "images").iterdir():
        image.unlink()
    assert run(predict.main, ["--checkpoint", str(trained), "--images", str(labelled / "val"), "--out", "made"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: --images {labelled / 'val'}: all 3 image files in it are masks")
    assert "\n" not in error
    assert not (labelled.parent / "made").exists()


# where a pixel's label comes from

PATCH = 8


class MeanColours(Backbone):
    """Features that depend on the patch's own pixels alone."""

    def extract(self, images):
        b, _, s, t = images.shape
        return images.view(b, 3, s // PATCH, PATCH, t // PATCH, PATCH).mean((3, 5)).flatten(2).mT - 0.5


def taps(pixels, patches, covered):
    """For each pixel of a side the two nearest of `patches`, which cover `covered` pixels, and the second's weight."""
    centres = np.clip((np.arange(pixels) + 0.5) * patches / covered - 0.5, 0, patches - 1)
    first = np.floor(centres).astype(int)
    return first, np.minimum(first + 1, patches - 1), centres - first


@pytest.mark.parametrize("tile", [640, 3 * PATCH])
@pytest.mark.parametrize("mirror", [True, False])
@pytest.mark.parametrize(("height", "width", "short_side"), [(37, 61, 37), (61, 37, 37), (45, 83, 70), (90, 43, 29)])
def test_labels_lie_where_their_pixels_are(monkeypatch, height, width, short_side, mirror, tile):
    """Neither side is whole patches, so the codes cover more than the image. Against the definition, pixel by pixel."""
    rng = np.random.default_rng(height)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    prototypes = torch.from_numpy(rng.standard_normal((7, 3))).float()
    chosen = object.__new__(Segmenter)  # one that has learnt nothing
    chosen.checkpoint = SimpleNamespace(config=TrainConfig(resample="bilinear"), report={"published": {}})
    chosen.backbone = MeanColours(name="colours", digest="colours", patch=PATCH, dim=3)
    chosen.head = SimpleNamespace(
        teacher=prototypes, student=prototypes, projection=lambda features: features, basis=None
    )
    chosen.grouping = Grouping(chosen.head)
    monkeypatch.setattr(segmenter, "TILE", tile)
    labels = chosen.predict(image, mirror=mirror, short_side=short_side)

    resized = resize_short_side(image, short_side, "bilinear")
    below, beyond = (-side % PATCH for side in resized.shape[:2])
    assert below > 0
    assert beyond > 0
    padded = np.pad(resized, ((0, below), (0, beyond), (0, 0)), mode="symmetric")
    features, grid = chosen.backbone(torch.from_numpy(padded).permute(2, 0, 1)[None])
    codes = features[0].unflatten(0, grid).double().numpy()
    h, w = codes.shape[:2]
    top, bottom, down = taps(height, h, round(padded.shape[0] * height / resized.shape[0]))
    left, right, across = taps(width, w, round(padded.shape[1] * width / resized.shape[1]))
    rows = codes[top] * (1 - down)[:, None, None] + codes[bottom] * down[:, None, None]
    pixels = rows[:, left] * (1 - across)[:, None] + rows[:, right] * across[:, None]
    cosines = pixels @ (prototypes.double() / prototypes.double().norm(dim=1, keepdim=True)).numpy().T
    second, best = np.sort(cosines, axis=-1)[..., -2:].transpose(2, 0, 1)
    clear = best - second > 1e-3 * np.abs(codes).max()
    assert clear.mean() > 0.9
    assert labels.shape == (height, width)
    np.testing.assert_array_equal(labels[clear], cosines.argmax(-1)[clear])


# a stop, several processes, a mishap


@pytest.fixture
def photos(tmp_path):
    """Six images, the fourth of which cannot be read."""
    (tmp_path / "mine" / "sub").mkdir(parents=True)
    for number in range(6):
        Image.fromarray(draw(20 + number)[0]).save(tmp_path / "mine" / ("sub" if number > 3 else ".") / f"{number}.png")
    (tmp_path / "mine" / "3.png").write_bytes(b"junk")
    return tmp_path / "mine"


@pytest.fixture
def segmented(monkeypatch):
    """The number of images given to the segmenter, and what is to happen at one of them."""
    seen, events, plain = [], {}, Segmenter.predict

    def counting(self, image, **options):
        seen.append(image)
        if len(seen) in events:
            events.pop(len(seen))()
        return plain(self, image, **options)

    monkeypatch.setattr(Segmenter, "predict", counting)
    seen_and_events = type("Seen", (), {"__len__": lambda self: len(seen), "at": events})()
    return seen_and_events


def call(checkpoint, photos, out, *args):
    return run(predict.main, ["--checkpoint", str(checkpoint), "--images", str(photos), "--out", str(out), *args])


def content(folder):
    """Every file but the journals, whose lines may come in another order; without times and title of the page."""
    return {
        p.relative_to(folder).as_posix(): re.sub(rb'"times":\[\[.*?\]\]|"title":".*?"', b"", p.read_bytes())
        for p in Path(folder).rglob("*")
        if p.is_file() and p.suffix != ".jsonl" and p.name != "manifest.csv"
    }


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_same_command_goes_on_after_a_stop(trained, photos, segmented, capsys, monkeypatch, number):
    monkeypatch.setattr(signals, "PATIENCE_S", 60.0)  # however busy the machine is
    assert call(trained, photos, "whole") == 0
    assert len(segmented) == 5
    segmented.at[7] = lambda: signal.raise_signal(number)
    assert call(trained, photos, "cut") == 128 + number
    said = capsys.readouterr().err
    assert "interrupted; 2 of 6 images are done, in cut\n" in said
    assert f"resume     python -m smooseg_fast.predict --checkpoint {trained} --images {photos} --out cut\n" in said
    assert list(json.load(open("cut/shares.json"))["images"]) == ["0.png", "1.png"]
    assert Image.open("cut/sheet.jpg").width == 1600
    assert len(segmented) == 7
    assert call(trained, photos, "cut") == 0
    assert len(segmented) == 10
    printed = capsys.readouterr()
    assert "2 of 6 images are done in cut, by this checkpoint and with these settings" in printed.out
    assert "segmented  5 of 6 images, 1 could not be used" in printed.out
    assert "3.png" in printed.err
    assert content("cut") == content("whole")
    # once more: nothing is left to do, the sheet and the shares cover everything again
    assert call(trained, photos, "cut") == 0
    assert len(segmented) == 10
    assert "5 of 6 images are done in cut" in capsys.readouterr().out
    assert content("cut") == content("whole")


def test_a_stop_at_the_last_image_is_none(trained, photos, segmented):
    segmented.at[5] = lambda: signal.raise_signal(signal.SIGINT)
    assert call(trained, photos, "made") == 0
    assert len(json.load(open("made/shares.json"))["images"]) == 5


def test_a_stop_before_the_first_image_leaves_nothing(trained, photos, monkeypatch, capsys):
    picture = Segmenter.picture

    def stopped(self, image, page):
        signal.raise_signal(signal.SIGINT)
        return picture(self, photos / "3.png")

    monkeypatch.setattr(Segmenter, "picture", stopped)
    assert call(trained, photos, "made") == 130
    assert "interrupted; no image was done yet" in capsys.readouterr().err
    assert not Path("made").exists()


def test_images_none_of_which_can_be_used_are_an_error_and_leave_nothing(trained, photos, capsys):
    for file in photos.rglob("*.png"):
        file.write_bytes(b"junk")
    assert call(trained, photos, "made") == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert error.startswith(f"error: --images {photos}: none of the 6 images can be used (first: 0.png: not an image")
    assert not Path("made").exists()


@pytest.mark.parametrize(
    ("args", "difference"),
    [
        (["--no-mirror"], "mirror is True there and False here"),
        (["--short-side", "72"], "short_side is 64 there and 72 here"),
    ],
)
def test_a_folder_is_of_one_set_of_settings(trained, photos, segmented, capsys, args, difference):
    assert call(trained, photos, "made") == 0
    before = content("made")
    assert call(trained, photos, "made", *args) == 2
    assert f"error: --out made: holds another run ({difference}); give another folder" in capsys.readouterr().err
    assert content("made") == before
    # a flag that states the default, and the checkpoint's place, make no difference
    shutil.move(trained, "moved.safetensors")
    assert call("moved.safetensors", photos, "made", "--short-side", "64") == 0
    assert len(segmented) == 5


def test_a_folder_is_of_one_checkpoint(trained, labelled, photos, segmented, capsys):
    assert call(trained, photos, "made") == 0
    before = content("made")
    assert run(train.main, ["--data", str(labelled), "--out", "other", *SMALL, "--seed", "1"]) == 0
    segmented_by_training = len(segmented)
    assert call("other/checkpoint.safetensors", photos, "made") == 2
    assert "error: --out made: holds another run (checkpoint is 'step 6, " in capsys.readouterr().err
    assert content("made") == before
    assert len(segmented) == segmented_by_training


def test_a_folder_is_of_one_backbone(labelled, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(tmp_path))
    source = "def means(images):\n    b, _, s, t = images.shape\n"
    source += "    return images.view(b, 3, s // 8, 8, t // 8, 8).mean((3, 5)) - 0.5\n"
    (tmp_path / "theirs.py").write_text(source)
    named = ["--backbone", "theirs:means"]
    assert run(train.main, ["--data", str(labelled), "--out", "out", *SMALL, *named]) == 0
    assert call("out/checkpoint.safetensors", photos, "made", *named) == 0
    (tmp_path / "theirs.py").write_text(source + "# changed\n")
    assert call("out/checkpoint.safetensors", photos, "made", *named) == 2
    assert "holds another run (backbone is" in capsys.readouterr().err


@pytest.mark.parametrize("theirs", ["masks/0.png", "overlays/0.jpg", "sheet.jpg", "shares.json"])
def test_files_of_others_are_not_written_over(trained, photos, capsys, theirs):
    Path("made", theirs).parent.mkdir(parents=True)
    Path("made", theirs).write_bytes(b"drawn by hand")
    assert call(trained, photos, "made") == 2
    name = theirs.split("/")[0]
    assert f"error: --out made: holds {name} but no predict.json; give another folder" in capsys.readouterr().err
    assert content("made") == {theirs: b"drawn by hand"}


def test_an_image_that_changed_is_done_again(trained, photos, segmented):
    assert call(trained, photos, "made") == 0
    status = (photos / "0.png").stat()
    os.utime(
        photos / "0.png", ns=(status.st_atime_ns, status.st_mtime_ns + 1)
    )  # as if rewritten with the same number of bytes
    assert call(trained, photos, "made") == 0
    assert len(segmented) == 6
    status = (photos / "1.png").stat()
    Image.fromarray(draw(50, 64, 64)[0]).save(photos / "1.png")
    os.utime(photos / "1.png", ns=(status.st_atime_ns, status.st_mtime_ns))  # other bytes with the time of the old ones
    assert call(trained, photos, "made") == 0
    assert len(segmented) == 7
    assert Image.open("made/masks/1.png").size == Image.open("made/overlays/1.jpg").size == (64, 64)
    assert call(trained, photos, "again") == 0
    assert content("made") == content("again")


def test_an_image_that_was_mended_is_done_and_one_that_went_is_forgotten(trained, photos, segmented):
    assert call(trained, photos, "made") == 0
    Image.fromarray(draw(23)[0]).save(photos / "3.png")
    (photos / "0.png").unlink()
    assert call(trained, photos, "made") == 0
    assert len(segmented) == 6
    shares = json.load(open("made/shares.json"))
    assert list(shares["images"]) == ["1.png", "2.png", "3.png", "sub/4.png", "sub/5.png"]
    assert shares["skipped"] == {}


@pytest.mark.parametrize("file", ["masks/sub/4.png", "overlays/sub/4.jpg"])
def test_what_was_taken_away_is_made_again(trained, photos, segmented, file):
    assert call(trained, photos, "made") == 0
    before = content("made")
    Path("made", file).unlink()
    assert call(trained, photos, "made") == 0
    assert len(segmented) == 6
    assert content("made") == before


@pytest.mark.parametrize("lost", ["", "half", "all"])
def test_a_kill_between_the_mask_and_its_record(trained, photos, segmented, lost):
    assert call(trained, photos, "made") == 0
    before, journal, records = content("made"), Path("made/done.jsonl"), journal_of("made")
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text({"": "".join(lines[:-1]), "half": "".join(lines)[:-9], "all": ""}[lost])
    assert call(trained, photos, "made") == 0
    assert len(segmented) == 5 + (5 if lost == "all" else 1)
    assert content("made") == before
    assert len(journal.read_text().splitlines()) == len(lines)
    assert journal_of("made") == records


def test_two_processes_share_the_images(trained, photos, segmented):
    """They go on where one process was stopped, and end with its files; one of them cannot read 3.png."""
    assert call(trained, photos, "one") == 0
    segmented.at[7] = lambda: signal.raise_signal(signal.SIGINT)
    assert call(trained, photos, "two") == 130
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words += ["-m", "smooseg_fast.predict", "--checkpoint", trained, "--images", photos, "--out", "two"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 of 6 images are done in two") == 1
    assert done.stdout.count("segmented  5 of 6 images, 1 could not be used") == 1
    assert done.stderr.count(f"skipped: {photos / '3.png'}: not an image") == 1
    assert content("two") == content("one")
    journals = [sorted(Path(out, "done.jsonl").read_text().splitlines()) for out in ("one", "two")]
    assert len(journals[0]) == len(journals[1])
    assert journal_of("one") == journal_of("two")
    rows = [list(csv.reader(open(f"{out}/manifest.csv", newline=""))) for out in ("one", "two")]
    assert [row[:2] + row[3:] for row in rows[0]] == [row[:2] + row[3:] for row in rows[1]]
    assert all(float(row[2]) > 0 for row in rows[1][1:] if not row[3])


def test_a_folder_that_another_command_writes_into(trained, photos, capsys):
    lock = Lock(Path("made/.lock"))
    assert lock.take()
    lock.sign()
    assert call(trained, photos, "made") == 2
    assert f"error: --out made: process {os.getpid()} on " in capsys.readouterr().err
    assert [path.name for path in Path("made").iterdir()] == [".lock"]


@pytest.mark.parametrize("name", ["0.png", "2.png"])
def test_a_full_disk_is_named_and_the_same_command_goes_on(trained, photos, segmented, monkeypatch, capsys, name):
    replace = os.replace

    def full(temporary, path):
        if Path(path).name == name:
            raise OSError(28, "No space left on device")
        replace(temporary, path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert call(trained, photos, "made") == 2
    assert f"made/masks/{name}: cannot be written (No space left on device); free some space" in capsys.readouterr().err
    assert call(trained, photos, "made") == 0
    assert len(segmented) == 6  # one of them a second time
    assert call(trained, photos, "again") == 0
    assert content("made") == content("again")


def test_a_mask_of_the_same_name_that_was_another_images(trained, photos, segmented):
    """a.jpg is written as a.png, and an a.bmp next to it keeps its suffix; then the a.bmp is alone."""
    for file in photos.rglob("*.png"):
        file.unlink()
    Image.fromarray(draw(1)[0]).save(photos / "a.jpg")
    assert call(trained, photos, "made") == 0
    Image.fromarray(draw(2)[0]).save(photos / "a.bmp")
    first = Path("made/masks/a.png").read_bytes()
    assert call(trained, photos, "made") == 0
    assert len(segmented) == 2
    assert Path("made/masks/a.png").read_bytes() == first
    shutil.move(photos / "a.jpg", "away.jpg")
    for _ in range(2):
        assert call(trained, photos, "made") == 0
        assert len(segmented) == 3
    assert Path("made/masks/a.png").read_bytes() == Path("made/masks/a.bmp.png").read_bytes()
    shutil.move("away.jpg", photos / "a.jpg")
    (photos / "a.bmp").unlink()
    assert (
        call(trained, photos, "made") == 0
    )  # a.jpg was done once as a.png, but what lies there now is the mask of a.bmp
    assert len(segmented) == 4
    assert Path("made/masks/a.png").read_bytes() == first


def test_no_two_images_share_a_mask():
    names = ["a.jpg", "a.png", "a.jpg.png", "b.jpg", "b.jpg.tif", "c/a.jpg", "d.png"]
    stems = items.output_stems([Path(name) for name in names])
    assert stems == ["a", "a.png", "a.jpg.png", "b", "b.jpg.tif", "c/a", "d"]
    assert items.output_stems([Path("a.bmp"), Path("a.jpg")]) == ["a.bmp", "a"]
    # to the file systems of macOS and Windows IMG.png and img.png are one name
    assert items.output_stems([Path("IMG.JPG"), Path("img.png"), Path("x.jpg")]) == ["IMG", "img.png", "x"]


def test_what_does_not_fit_into_memory_is_skipped_and_said_in_one_line(trained, photos, monkeypatch, capsys):
    shutil.move(photos / "3.png", photos / "new\nline\x1b[2J.png")
    plain = segmenter.code_bands

    def full(*args):
        monkeypatch.setattr(segmenter, "code_bands", plain)
        raise MemoryError

    monkeypatch.setattr(segmenter, "code_bands", full)
    assert call(trained, photos, "made") == 0
    assert len(json.load(open("made/shares.json"))["images"]) == 4
    small, broken = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped: ")]
    assert small.startswith(
        f"skipped: {photos / '0.png'}: does not fit into memory with its short side at 64 pixels; give a smaller"
    )
    assert r"new line\x1b[2J.png: not an image of a kind that can be read" in broken


def test_names_as_long_as_a_file_system_takes(trained, photos):
    for name in ("x" * 251, "\u5199" * 83 + "xx"):
        shutil.copy(photos / "0.png", photos / f"{name}.png")
    assert call(trained, photos, "made") == 0
    assert len(json.load(open("made/shares.json"))["images"]) == 7


@pytest.mark.parametrize("out", ["mine/predicted", "mine", "link/made"])
def test_what_was_made_among_the_images_is_not_taken_for_images(trained, photos, segmented, out):
    Path("link").symlink_to("mine/sub")
    for _ in range(2):
        assert call(trained, "mine", out) == 0
        assert len(segmented) == 5
    assert len(json.load(open(f"{out}/shares.json"))["images"]) == 5
    shutil.move("mine/0.png", photos / "sub" / "0.png")  # other pictures next to the outputs still count as images
    assert call(trained, "mine", out) == 0
    assert len(segmented) == 6


def test_what_any_command_made_among_the_images_is_not_taken_for_images(trained, photos, labelled, monkeypatch, capsys):
    """A run, two predictions, an evaluation and a look at closeness, typed in the folder of photos."""
    mine = find_images(photos)
    monkeypatch.chdir(photos)
    assert run(train.main, ["--data", ".", *SMALL, "--granularity", "0", "0.1"]) == 0
    checkpoint = "runs/mine/checkpoint.safetensors"
    assert call(checkpoint, ".", "coarse") == 0
    assert call(checkpoint, ".", "fine", "--no-mirror") == 0
    assert run(evaluate.main, ["--checkpoint", checkpoint, "--data", str(labelled)]) == 0
    assert run(similarity.main, ["--checkpoint", checkpoint, "--data", "."]) == 0
    pictures = [file for file in photos.rglob("*") if file.suffix in (".png", ".jpg")]
    assert len(pictures) == 6 + 2 + 2 * (5 + 5 + 1) + 2
    assert find_images(photos) == mine
    capsys.readouterr()
    assert call(checkpoint, "coarse", "again") == 2
    assert "found only other files (1 .jsonl, 1 .json), next to smooseg's own output" in capsys.readouterr().err


def test_images_of_two_commands_in_one_folder(trained, photos, segmented):
    assert call(trained, photos / "sub", "made") == 0
    assert call(trained, photos / "0.png", "made") == 0
    assert list(json.load(open("made/shares.json"))["images"]) == ["0.png"]
    assert call(trained, photos / "sub", "made") == 0
    assert list(json.load(open("made/shares.json"))["images"]) == ["4.png", "5.png"]
    assert len(segmented) == 3


def test_images_that_differ_in_their_folder_alone(trained, segmented):
    for number, folder in enumerate(("one", "two")):
        Path(folder).mkdir()
        Image.fromarray(draw(number)[0]).save(f"{folder}/tile.bmp")
        os.utime(f"{folder}/tile.bmp", (315532800, 315532800))  # 1980, as out of an archive
    masks = []
    for folder in ("one", "two", "two", os.path.abspath("two")):
        assert call(trained, folder, "made") == 0
        masks.append(Path("made/masks/tile.png").read_bytes())
    assert masks[0] != masks[1] == masks[2] == masks[3]
    assert len(segmented) == 2


def test_the_sheet_covers_at_most_so_many_images_spread_over_all(trained, photos, monkeypatch):
    shown = []
    blank = Image.new("RGB", (9, 9))
    monkeypatch.setattr(predictions, "sheet_pages", lambda images, *_: shown.extend(images) or [blank])
    monkeypatch.setattr(predictions, "PAGE", 3)
    monkeypatch.setattr(predictions, "SHEET_PAGES", 1)
    for _ in range(2):
        assert call(trained, photos, "made") == 0
        assert [name for name, *_ in shown] == ["0.png", "1.png", "sub/4.png"]
        for name, image, labels, _ in shown:
            assert (image == np.array(Image.open(photos / name))).all()  # too small for a thumbnail
            assert (labels == np.array(Image.open(f"made/masks/{name}"))).all()
        shown.clear()


def test_all_images_are_on_pages_and_old_pages_go(trained, photos, monkeypatch, capsys):
    for module in (predictions, sheet):
        monkeypatch.setattr(module, "PAGE", 2)
    assert call(trained, photos, "made") == 0
    count = len(json.load(open("made/shares.json"))["images"])
    pages = [f"{number}.jpg" for number in range(2, -(-count // 2) + 1)]
    assert pages
    assert sorted(path.name for path in Path("made/sheets").iterdir()) == pages
    assert "look at    made/sheet.jpg, made/sheets, made/overlays\n" in capsys.readouterr().out
    assert "sheets" in Path("made/.smooseg").read_text()  # their pictures are no photos
    assert call(trained, photos / "0.png", "made") == 0
    assert not list(Path("made/sheets").iterdir())
    assert "look at    made/sheet.jpg, made/overlays\n" in capsys.readouterr().out


def damage_mask(made):
    path = made / "masks/0.png"
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


def change_journal(change):
    def damage(made):
        journal = made / "done.jsonl"
        first, *others = journal.read_text().splitlines()
        journal.write_text("\n".join([json.dumps({**json.loads(first), **change}), *others]) + "\n")

    return damage


DAMAGES = {
    "a bit of a mask": damage_mask,
    "a mask cut short": lambda made: (made / "masks/0.png").write_bytes((made / "masks/0.png").read_bytes()[:-9]),
    "an empty mask": lambda made: (made / "masks/0.png").write_bytes(b""),
    "an empty overlay": lambda made: (made / "overlays/0.jpg").write_bytes(b""),
    "a group that is none": change_journal({"shares": {"x0": 0.5}}),
    "a share that is another": change_journal({"shares": {"0": 0.25}}),
    "a share that is none": change_journal({"shares": {"0": "0.5"}}),
    "shares that are a list": change_journal({"shares": [0.5]}),
    "a stem that is a list": change_journal({"stem": ["0"]}),
    "a stamp that is none": change_journal({"stamp": None}),
    "sizes that are others": change_journal({"bytes": [1, 2]}),
    "a checksum that is none": change_journal({"crc": 7}),
    "deep brackets": lambda made: (made / "done.jsonl").write_text(
        "[" * 100_000 + "\n" + (made / "done.jsonl").read_text().partition("\n")[2]
    ),
    "bytes that are no text": lambda made: (made / "done.jsonl").write_bytes(
        b"\xff\xfe\x00\n" + (made / "done.jsonl").read_bytes().partition(b"\n")[2]
    ),
}


def journal_of(folder):
    """The last line of each image counts; how long it took is not compared."""
    lines = map(json.loads, open(f"{folder}/done.jsonl"))
    return {record["stem"]: record | {"seconds": None} for record in lines}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_was_damaged_is_made_again(trained, photos, segmented, damage):
    assert call(trained, photos, "made") == 0
    before, journal = content("made"), journal_of("made")
    DAMAGES[damage](Path("made"))
    assert call(trained, photos, "made") == 0
    assert len(segmented) == 6
    assert content("made") == before
    assert journal_of("made") == journal


def test_a_record_that_is_damaged_is_one_line(trained, photos, capsys):
    assert call(trained, photos, "made") == 0
    for record in ("", "{", "[" * 100_000, "[]", "null", '{"mirror": 1e999}', '{"checkpoint": {}}', "\x00"):
        Path("made/predict.json").write_text(record)
        before = content("made")
        capsys.readouterr()
        assert call(trained, photos, "made") == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert error.startswith("error: --out made: ")
        assert "give another folder" in error
        assert content("made") == before


def test_a_folder_that_becomes_anothers_before_it_is_claimed(tmp_path):
    first, second = (
        predictions.Predictions(tmp_path / "made", {"mirror": mirror}, ALONE, groups=(), merge=[])
        for mirror in (True, False)
    )
    with first.claimed():
        (first.path / "masks").mkdir()
        with pytest.raises(UserError, match="is at work there; wait until it ends"), second.claimed():
            pass
    with pytest.raises(UserError, match=r"holds another run \(mirror is True there and False here\)"), second.claimed():
        pass


def test_names_that_are_no_text(trained, photos):
    name = os.fsdecode(b"stra\xdfe.png")
    shutil.copy(photos / "0.png", photos / name)
    for _ in range(2):
        assert call(trained, photos, "made") == 0
    assert name in json.load(open("made/shares.json", encoding="utf-8"))["images"]
    assert Path("made/masks", name).exists()
