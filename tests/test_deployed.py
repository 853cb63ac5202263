"""smooseg deploy: networks that other programs run, compared with what PyTorch gives."""

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_tiles import Blurred
from textures import draw
from weights import make_vit

from smooseg_fast import deploy
from smooseg_fast.backbones import load_backbone
from smooseg_fast.command import run
from smooseg_fast.config import TrainConfig
from smooseg_fast.errors import UserError
from smooseg_fast.segment import deployed
from smooseg_fast.segment.grouping import Grouping
from smooseg_fast.segment.model import Head
from smooseg_fast.segment.names import Names
from smooseg_fast.segment.segmenter import Segmenter

ONNX = all(find_spec(name) is not None for name in ("onnx", "onnxruntime", "onnxscript"))
needs_onnx = pytest.mark.skipif(not ONNX, reason="needs onnx, onnxruntime and onnxscript")


def segmenter_of(backbone, cut=None, merge=()):
    """A segmenter with a random head of six prototypes, merged by a cut of the tree and by names."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = Head(backbone.dim, 6, 16)
        head.teacher.normal_()
    chosen = object.__new__(Segmenter)
    chosen.head, chosen.backbone, chosen.grouping = head, backbone, Grouping(head, cut)
    chosen.names = Names(len(chosen.grouping), names={0: "roof"}, merge=[list(numbers) for numbers in merge])
    config = TrainConfig(scale=("native",), size=32, eval_size=32)
    chosen.checkpoint = SimpleNamespace(
        config=config, backbone_name="x", backbone_licence="y", step=3, shares=None, report={}
    )
    return chosen


def deployed_labels(segmenter, image):
    """Returns what predict gives without mirroring and refinement."""
    return segmenter.predict(image, mirror=False, refine="none", scale="native")


def runner(path, form):
    """Run a deployed file as its user would: without smooseg."""
    if form == "pt2":
        module = torch.export.load(path).module()
        return lambda images: tuple(part.detach().numpy() for part in module(torch.from_numpy(images)))
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: session.run(["labels", "scores"], {"images": images})


def description_in(path, form):
    if form == "pt2":
        extra = {"smooseg.json": ""}
        torch.export.load(path, extra_files=extra)
        return json.loads(extra["smooseg.json"])
    import onnx

    return json.loads({entry.key: entry.value for entry in onnx.load(path).metadata_props}["smooseg"])


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    path = tmp_path_factory.mktemp("vit") / "vit.pth"
    torch.save(make_vit(depth=1, side=32), path)
    return segmenter_of(load_backbone(str(path), "cpu", "float32"), np.array([0, 1, 2, 0, 1, 2]), merge=[(0, 2)])


@pytest.fixture(scope="module")
def colours():
    return segmenter_of(Blurred(reach=1), merge=[(0, 2)])


@pytest.mark.parametrize(("network", "form"), [("colours", "pt2"), pytest.param("vit", "onnx", marks=needs_onnx)])
def test_a_network_gives_the_labels_of_predict_at_any_size(network, tmp_path, form, request):
    segmenter, path = request.getfixturevalue(network), tmp_path / f"network.{form}"
    groups = [group.number for group in segmenter.groups]
    check, difference = deployed.deploy(segmenter, path, form)
    assert check == tmp_path / "network.check.npz"
    assert difference <= deployed.PARITY
    run_network = runner(path, form)
    with np.load(check) as file:
        labels, scores = run_network(file["images"])
        np.testing.assert_array_equal(labels, file["labels"])
        np.testing.assert_allclose(scores, file["scores"], atol=deployed.PARITY)
    # 32 pixels are the size of the table of positions, which is then taken as it is
    for height, width in ((32, 32), (72, 40)):
        image = np.ascontiguousarray(draw(4)[0][:height, :width])
        images = np.stack([image.transpose(2, 0, 1)] * 2).astype(np.float32) / 255
        labels, scores = run_network(images)
        assert labels.dtype == np.uint8
        assert scores.shape == (2, len(groups), height // 8, width // 8)
        assert np.abs(scores).max() <= 1 + 1e-6
        np.testing.assert_array_equal(labels[0], labels[1])
        assert set(np.unique(labels)) <= set(groups)  # 2 is merged into 0
        assert (labels[0] != deployed_labels(segmenter, image)).mean() < 1e-3
    told = description_in(path, form)
    assert (told["patch"], told["multiple_of"], told["least_side"]) == (8, 8, 16)
    assert [group["number"] for group in told["groups"]] == groups
    assert told["groups"][0]["name"] == "roof"


@pytest.mark.parametrize("family", ["dino", "registers"])
def test_positions_in_one_graph_are_those_of_every_size(family, tmp_path):
    options = {"registers": 4, "scaled": True} if family == "registers" else {}
    torch.save(make_vit(depth=1, side=32, **options), tmp_path / "vit.pth")
    network = deployed.network_of(segmenter_of(load_backbone(str(tmp_path / "vit.pth"), "cpu", "float32")))
    for h, w in ((4, 4), (2, 3), (4, 7), (9, 5)):  # 4 x 4 is the table itself
        images = torch.rand(2, 3, 8 * h, 8 * w)
        with torch.no_grad():
            plain = network(images)[1]
            with deployed.resized_in_graph(network):
                torch.testing.assert_close(network(images)[1], plain, atol=2e-6, rtol=0)


def test_a_file_that_differs_is_not_written(vit, tmp_path, monkeypatch):
    def wrong(program, target, text):
        target.write_bytes(b"x")
        return lambda images: (np.zeros((1, 1, 1)), np.full((1, 1, 1, 1), 2.0))

    monkeypatch.setattr(deployed, "to_program", wrong)
    monkeypatch.setattr(deployed, "exported", lambda network, patch: None)
    with pytest.raises(UserError, match="--format pt2: gives other results than PyTorch"):
        deployed.deploy(vit, tmp_path / "x.pt2", "pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_does_not_run_is_not_written(vit, tmp_path, monkeypatch):
    def failing(program, target, text):
        target.write_bytes(b"x")
        raise AssertionError("Guard failed: 5 == 4")

    monkeypatch.setattr(deployed, "to_program", failing)
    monkeypatch.setattr(deployed, "exported", lambda network, patch: None)
    with pytest.raises(UserError, match=r"does not run so \(AssertionError: Guard failed: 5 == 4\)"):
        deployed.deploy(vit, tmp_path / "x.pt2", "pt2")
    assert list(tmp_path.iterdir()) == []


class Choosing(Blurred):
    """Features that depend on a decision about values, which no graph has."""

    def extract(self, images):
        return super().extract(images if images.mean() > 0.5 else 1 - images)


def test_a_network_without_a_graph_is_one_line(capfd):
    network = deployed.network_of(segmenter_of(Choosing(reach=1)))
    with pytest.raises(UserError, match=r"^--backbone: cannot be exported for images of any size") as raised:
        deployed.exported(network, 8)
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


def test_several_scales_are_refused(vit, monkeypatch):
    monkeypatch.setattr(vit.checkpoint, "config", TrainConfig(scale=("native", "0.5")))
    with pytest.raises(UserError, match="trained at 2 scales"):
        deployed.network_of(vit)


def test_onnx_needs_its_packages(vit, monkeypatch, tmp_path):
    monkeypatch.setattr(deployed, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--format onnx: needs onnx, onnxruntime, onnxscript; run: pip install"):
        deployed.deploy(vit, tmp_path / "x.onnx", "onnx")


def test_the_command(trained, monkeypatch, capsys):
    """The export itself apart, which takes seconds for the built-in features."""
    asked = []

    def exported(segmenter, path, form):
        asked.append((len(segmenter.groups), path, form))
        return Path("x.check.npz"), 2e-7

    monkeypatch.setattr(deployed, "deploy", exported)
    args = ["--checkpoint", str(trained), "--out", "x.pt2"]
    assert run(deploy.main, [*args, "--format", "pt2", "--groups", "2"]) == 0
    assert asked == [(2, Path("x.pt2"), "pt2")]
    printed = capsys.readouterr().out
    assert "of 0..1, H and W multiples of 8, at least 16\n" in printed
    assert "scores differ from PyTorch's by at most 2.0e-07" in printed


def test_the_network_of_the_built_in_features(trained):
    """The module that is exported, against predict: every backbone goes through it."""
    segmenter = Segmenter.load(trained)
    network = deployed.network_of(segmenter)
    image = np.ascontiguousarray(draw(4)[0][:72, :96])
    with torch.no_grad():
        labels, scores = network(torch.from_numpy(image.transpose(2, 0, 1)[None]).float() / 255)
    np.testing.assert_array_equal(labels[0].numpy(), deployed_labels(segmenter, image))
    assert scores.shape == (1, len(segmenter.groups), 9, 12)
