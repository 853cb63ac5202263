"""Published SmooSeg checkpoints, converted or given to evaluate and predict directly, against the paper's formula."""

import dataclasses
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from weights import labels_by_hand, make_head, make_published, make_vit, save_with_omegaconf

import smooseg_fast
from smooseg_fast import convert, evaluate, predict, train
from smooseg_fast.backbones import load_backbone
from smooseg_fast.command import run
from smooseg_fast.segment.checkpoint import read_checkpoint
from smooseg_fast.segment.published import read_published

SETTINGS = {
    "dataset_name": "cityscapes",
    "res": 224,
    "max_steps": 3000,
    "model": {"dino_feat_type": "feat", "dino_patch_size": 8},
}
VIT = dict(dim=64, depth=1, patch=8, side=64)


@pytest.fixture(autouse=True)
def no_omegaconf(monkeypatch, tmp_path):
    for name in ("omegaconf", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def make(path, settings=SETTINGS, *, legacy=False, **options):
    """-> (file, tensors of the backbone, of the head)."""
    vit, head = make_vit(**{**VIT, **options}), make_head(options.get("dim", 64))
    if not legacy:
        return save_with_omegaconf(path, vit, head, settings), vit, head
    torch.save(make_published(vit, head, settings), path, _use_new_zipfile_serialization=False)
    return path, vit, head


def picture(height, width, seed=0):
    """Blocks of colours, so that features differ from place to place."""
    blocks = np.random.default_rng(seed).integers(0, 256, (-(-height // 40), -(-width // 40), 3), dtype=np.uint8)
    return blocks.repeat(40, 0).repeat(40, 1)[:height, :width].copy()


def assert_labels(labels, vit, head, image, **options):
    expected, margin = labels_by_hand(vit, head, image, **options)
    assert len(np.unique(expected)) > 2
    differ = labels != expected
    assert differ.mean() < 1e-3
    assert margin[differ].max(initial=0) < 1e-4  # where two prototypes are equally near, float32 may choose the other


@pytest.mark.parametrize(
    ("dataset", "size", "mirror", "legacy"),
    [
        ("cityscapes", (320, 328), True, False),
        ("potsdam", (224, 240), False, False),
        ("potsdam", (224, 224), True, True),
    ],
    ids=["320", "once", "legacy"],
)
def test_labels_are_those_of_the_formula(tmp_path, dataset, size, mirror, legacy):
    path, vit, head = make(tmp_path / "a.ckpt", {"dataset_name": dataset}, legacy=legacy)
    image = picture(*size)
    segmenter = smooseg_fast.Segmenter.load(path, device="cpu")
    assert segmenter.same_backbone
    labels = segmenter.predict(image, mirror=mirror)
    assert_labels(labels, vit, head, image, mirror=mirror)
    other = segmenter.predict(image, mirror=not mirror)
    assert (labels != other).mean() > 1e-3  # the mirror matters on this picture
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.ckpt"]  # in memory, nothing written


def test_labels_of_a_linear_projection(tmp_path):
    vit, head = make_vit(**VIT), make_head(64)
    head |= {name: torch.zeros_like(head[name]) for name in ("W2", "b2", "W3", "b3")}
    published = make_published(vit, head, {"dataset_name": "cityscapes"})
    published["state_dict"] = {name: v for name, v in published["state_dict"].items() if "cluster2" not in name}
    torch.save(published, tmp_path / "linear.ckpt")
    image = picture(320, 320)
    segmenter = smooseg_fast.Segmenter.load(tmp_path / "linear.ckpt", device="cpu")
    assert_labels(segmenter.predict(image), vit, head, image, mirror=True)


def test_labels_of_a_dinov2_checkpoint(tmp_path):
    options = dict(patch=14, side=70, scaled=True)
    path, vit, head = make(tmp_path / "potsdam.ckpt", {"dataset_name": "potsdam"}, **options)
    image = picture(224, 224)
    assert_labels(smooseg_fast.Segmenter.load(path, device="cpu").predict(image), vit, head, image, mirror=True)


@pytest.mark.parametrize(
    ("settings", "size", "preset"),
    [
        ({"dataset_name": "cityscapes"}, 320, "cityscapes"),
        ({"cfg": {"dataset_name": "cocostuff27"}}, 320, "cocostuff27"),
        ({"dataset": "Potsdam-3"}, 224, "potsdam"),
        ({"dataset_name": "my_scans"}, 320, "folder"),
        ({}, 320, "folder"),
    ],
)
def test_the_resolution_is_the_papers(tmp_path, settings, size, preset):
    path, *_ = make(tmp_path / "a.ckpt", settings)
    config = read_published(path)[0].config
    assert (config.eval_size, config.preset, config.resample) == (size, preset, "nearest")
    assert (config.prototypes, config.code_dim) == (5, 64)


def test_convert(tmp_path, capsys):
    path, vit, head = make(tmp_path / "cityscapes.ckpt")
    assert run(convert.main, [str(path), "--out", "made"]) == 0
    printed = capsys.readouterr().out
    for words in (
        "K = 5",
        "D = 64",
        "DINO ViT-64/8",
        "after 3000 steps",
        "dataset_name cityscapes",
        "res 224",
        "320 pixels",
    ):
        assert words in printed
    assert "smooseg_fast.predict --checkpoint made/checkpoint.safetensors" in printed
    assert "smooseg_fast.evaluate --preset cityscapes --checkpoint made/checkpoint.safetensors" in printed

    image = picture(320, 320)
    direct = smooseg_fast.Segmenter.load(path, device="cpu")
    expected = direct.predict(image)
    assert_labels(expected, vit, head, image, mirror=True)
    for place in ("made", "moved"):
        if place == "moved":
            shutil.move("made", tmp_path / "far" / "moved")
        file = Path("made" if place == "made" else tmp_path / "far" / "moved") / "checkpoint.safetensors"
        segmenter = smooseg_fast.Segmenter.load(file, device="cpu")
        assert segmenter.same_backbone
        np.testing.assert_array_equal(segmenter.predict(image), expected)
        assert segmenter.checkpoint.report["published"]["hyper_parameters"]["model.dino_feat_type"] == "feat"
    # without its folder it says what to give
    shutil.copy(file, tmp_path / "alone.safetensors")
    with pytest.raises(
        smooseg_fast.UserError, match=r"--backbone: missing; .*names ./backbone, .*or the file that it was made from"
    ):
        smooseg_fast.Segmenter.load(tmp_path / "alone.safetensors", device="cpu")
    again = smooseg_fast.Segmenter.load(tmp_path / "alone.safetensors", backbone=str(path), device="cpu")
    assert again.same_backbone
    np.testing.assert_array_equal(again.predict(image), expected)


def test_convert_again_and_into_anothers_folder(tmp_path, capsys):
    path, *_ = make(tmp_path / "a.ckpt")
    assert run(convert.main, [str(path), "--out", "made"]) == 0
    first = Path("made/checkpoint.safetensors").read_bytes()
    assert run(convert.main, [str(path), "--out", "made"]) == 0
    assert Path("made/checkpoint.safetensors").read_bytes() == first
    other, *_ = make(tmp_path / "b.ckpt", dim=128)
    capsys.readouterr()
    assert run(convert.main, [str(other), "--out", "made"]) == 2
    assert "--out made: holds another" in capsys.readouterr().err
    assert Path("made/checkpoint.safetensors").read_bytes() == first


def test_what_was_loaded_can_be_saved_as_ours(tmp_path):
    path, *_ = make(tmp_path / "a.ckpt")
    segmenter = smooseg_fast.Segmenter.load(path, device="cpu")
    saved = segmenter.save(tmp_path / "ours.safetensors")
    assert read_checkpoint(saved).backbone_name == str(path)
    image = picture(64, 64)
    np.testing.assert_array_equal(
        smooseg_fast.Segmenter.load(saved, device="cpu").predict(image), segmenter.predict(image)
    )


def test_evaluate_and_predict_take_the_file_itself(tmp_path, capsys):
    path, vit, head = make(tmp_path / "a.ckpt", {"dataset_name": "potsdam", "res": 224})
    for kind in ("images", "labels"):
        (tmp_path / "set" / kind).mkdir(parents=True)
    images = [picture(224, 224, seed) for seed in range(2)]
    expected = np.zeros((5, 2), np.int64)
    for number, image in enumerate(images):
        labels = (image[..., 0] > 100).astype(np.uint8)
        Image.fromarray(image).save(f"set/images/{number}.png")
        Image.fromarray(labels).save(f"set/labels/{number}.png")
        np.add.at(expected, (labels_by_hand(vit, head, image, mirror=True)[0], labels), 1)

    assert (
        run(predict.main, ["--checkpoint", str(path), "--images", "set/images", "--out", "masks", "--device", "cpu"])
        == 0
    )
    for number, image in enumerate(images):
        assert_labels(np.array(Image.open(f"masks/masks/{number}.png")), vit, head, image, mirror=True)
    assert json.load(open("masks/shares.json"))["model"]["published"]["hyper_parameters"]["res"] == 224

    assert run(evaluate.main, ["--checkpoint", str(path), "--data", "set", "--out", "scores", "--device", "cpu"]) == 0
    counts = np.array(json.load(open("scores/scores.json"))["confusion"])
    assert np.abs(counts - expected).sum() <= 1e-4 * expected.sum()  # the features are kept in fp32
    assert "warning" not in capsys.readouterr().err
    # another backbone of the same size is used, and said
    torch.save(make_vit(**VIT, seed=9), "other.pth")
    args = [
        "--checkpoint",
        str(path),
        "--images",
        "set/images",
        "--out",
        "masks2",
        "--device",
        "cpu",
        "--backbone",
        "other.pth",
    ]
    assert run(predict.main, args) == 0
    assert "other.pth is not, weight for weight, the backbone" in capsys.readouterr().err


def test_without_lightning_or_omegaconf_and_in_a_fresh_process(tmp_path):
    path, *_ = make(tmp_path / "a.ckpt")
    code = "import sys\nfor name in ('omegaconf', 'pytorch_lightning', 'transformers'): sys.modules[name] = None\n"
    code += "from pathlib import Path\nfrom smooseg_fast.segment.published import read_published\n"
    code += f"print(read_published(Path({str(path)!r}))[0].report)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "'model.dino_patch_size': 8" in done.stdout


# -------------------------------------------------------------------------------------------------------- refused


class Calls:
    def __reduce__(self):
        return exec, ("open('ran', 'w')",)


def line_of(command, args, capsys):
    capsys.readouterr()
    assert run(command, args) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def commands(path):
    return [
        (convert.main, [str(path), "--out", "made"]),
        (evaluate.main, ["--checkpoint", str(path), "--data", "set"]),
        (predict.main, ["--checkpoint", str(path), "--images", "set", "--out", "masks"]),
        (train.main, ["--data", "set", "--backbone", str(path), "--out", "run"]),
        (predict.main, ["--checkpoint", "ok.ckpt", "--images", "set", "--out", "masks", "--backbone", str(path)]),
    ]


@pytest.mark.parametrize("where", ["hyper_parameters", "state_dict", "bare"])
def test_a_file_that_would_run_code_does_nothing(tmp_path, capsys, where):
    make(tmp_path / "ok.ckpt")
    Path("set").mkdir()
    Image.fromarray(picture(64, 64)).save("set/a.png")
    Image.fromarray(picture(64, 64, 1)).save("set/b.png")
    value = make_published(make_vit(**VIT), make_head(64))
    if where == "hyper_parameters":
        value["hyper_parameters"] = Calls()
    else:
        value["state_dict"]["x"] = Calls()
    path = tmp_path / "evil.ckpt"
    path.write_bytes(pickle.dumps(Calls())) if where == "bare" else torch.save(value, path)
    words = "no file of torch.save" if where == "bare" else "asks for builtins.exec"
    for command, args in commands(path):
        line = line_of(command, args, capsys)
        assert "evil.ckpt" in line
        assert words in line
    assert not Path("ran").exists()
    assert not any(Path(name).exists() for name in ("made", "masks"))
    if where != "bare":
        with pytest.raises(FileNotFoundError), open("ran"):
            pass
        torch.load(path, weights_only=False)
        assert Path("ran").exists()  # it would have


def test_a_file_of_before_pytorch_1_6_holds_weights_alone(tmp_path, capsys):
    path = save_with_omegaconf(tmp_path / "a.ckpt", make_vit(**VIT), make_head(64), SETTINGS, legacy=True)
    for command, args in commands(path)[:3]:
        assert "a.ckpt: dates from before PyTorch 1.6 and holds more than weights (" in line_of(command, args, capsys)


def without(value, name, replacement=None):
    del value["state_dict"][name]
    if replacement is not None:
        value["state_dict"][name] = replacement
    return value


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: {"state_dict": {"a": torch.ones(1)}}, "no checkpoint of SmooSeg"),
        (lambda v: [1], "no checkpoint of SmooSeg"),
        (lambda v: make_vit(**VIT), "weights of a backbone alone go with --backbone"),
        (lambda v: without(v, "prediction.local_clusters"), "prediction.local_clusters is missing"),
        (lambda v: without(v, "projection.cluster2.2.bias"), "projection.cluster2.2.bias is missing"),
        (
            lambda v: without(v, "projection.cluster2.0.weight", torch.ones(64, 32, 1, 1)),
            "hidden.weight is torch.float32 [64, 32] and not numbers [64, 64]",
        ),
        (lambda v: without(v, "projection.cluster1.0.weight", torch.ones(64, 64, 3, 3)), "and not numbers [576, 576]"),
        (
            lambda v: without(v, "prediction.global_clusters", torch.full((5, 64), torch.nan)),
            "teacher has values that are NaN",
        ),
        (lambda v: without(v, "prediction.global_clusters", torch.ones(300, 64)), "teacher is torch.float32 [300, 64]"),
        (lambda v: make_published(make_vit(**VIT), make_head(64, 300)), "300 prototypes, and 1 to 255 are possible"),
        (lambda v: without(v, "prediction.global_clusters", "text"), "is no tensor"),
        (lambda v: without(v, "net.model.norm.bias"), "norm.bias is missing"),
        (lambda v: without(v, "net.model.patch_embed.proj.weight"), "it has no patch_embed.proj.weight"),
        (lambda v: {**v, "hyper_parameters": {"dino_feat_type": "KK"}}, "was trained on 'KK' of the backbone"),
        (
            lambda v: make_published(make_vit(**{**VIT, "dim": 128}), make_head(64)),
            "takes 64 channels, its backbone gives 128",
        ),
    ],
)
def test_other_layouts_are_refused(tmp_path, capsys, change, words):
    torch.save(change(make_published(make_vit(**VIT), make_head(64))), tmp_path / "a.ckpt")
    for command, args in commands(tmp_path / "a.ckpt")[:3]:
        assert words in line_of(command, args, capsys)


def test_convert_of_what_is_no_file_of_torch(tmp_path, capsys):
    Path("a.txt").write_text("x")
    assert "no such file" in line_of(convert.main, ["none.ckpt", "--out", "made"], capsys)
    assert "a.txt: is no file of torch.save" in line_of(convert.main, ["a.txt", "--out", "made"], capsys)
    assert "FILE" in line_of(convert.main, ["--out", "made"], capsys)
    path, *_ = make(tmp_path / "a.ckpt")
    content = path.read_bytes()
    for length in (len(content) // 3, len(content) - 30):
        path.write_bytes(content[:length])
        assert "a.ckpt: cut short or damaged" in line_of(convert.main, [str(path), "--out", "made"], capsys)
    assert not Path("made").exists()


def test_a_weights_file_is_looked_for_next_to_the_checkpoint_that_names_it(tmp_path, monkeypatch):
    path, vit, _ = make(tmp_path / "a.ckpt")
    torch.save(vit, "vit.pth")
    checkpoint = dataclasses.replace(read_published(path)[0], backbone_name="vit.pth")
    checkpoint.write("ours.safetensors")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert smooseg_fast.Segmenter.load(tmp_path / "ours.safetensors", device="cpu").same_backbone
    (tmp_path / "vit.pth").unlink()
    with pytest.raises(smooseg_fast.UserError, match=r"--backbone vit.pth: unknown; give .*DINOv3 .pth"):
        smooseg_fast.Segmenter.load(tmp_path / "ours.safetensors", device="cpu")


def test_what_a_file_says_does_not_reach_the_terminal(tmp_path, capsys):
    value = make_published(make_vit(**VIT), make_head(64), {"dataset_name": "\x1b[31mcityscapes\n\x07"})
    torch.save(value, "a.ckpt")
    assert run(convert.main, ["a.ckpt", "--out", "made"]) == 0
    assert r"dataset_name \x1b[31mcityscapes \x07" in capsys.readouterr().out
    value["state_dict"]["net.model.\x1b]0;x\x07"] = torch.ones(1)
    torch.save(value, "a.ckpt")
    assert r"\x1b]0;x\x07 has no place" in line_of(convert.main, ["a.ckpt", "--out", "other"], capsys)


def test_a_backbone_may_be_that_of_a_checkpoint(tmp_path):
    path, vit, _ = make(tmp_path / "a.ckpt")
    torch.save(vit, tmp_path / "vit.pth")
    assert (
        load_backbone(str(path)).digest
        == load_backbone(str(tmp_path / "vit.pth")).digest
        == read_published(path)[1].digest()
    )
