"""Groups of a trained head: its tree in the checkpoint, other numbers looked up in it, and the picture of it."""

import dataclasses
import itertools
import json
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from test_trainer import SMALL, call
from textures import draw

import smooseg_fast
from smooseg_fast import choose, evaluate, predict
from smooseg_fast.command import run
from smooseg_fast.errors import UserError
from smooseg_fast.learn import loop
from smooseg_fast.learn import run as steps
from smooseg_fast.learn.typical import SIDE, around
from smooseg_fast.segment.checkpoint import FORMAT, KEY, read_checkpoint, sealed
from smooseg_fast.segment.grouping import Grouping
from smooseg_fast.show.tree import splits_of, tree_picture

FINE = [*SMALL, "--prototypes", "9"]


@pytest.fixture
def fine(folder):
    """The folder of a run with nine fine groups at most."""
    assert call("--data", folder, "--out", "out", *FINE) == 0
    return Path("out")


def test_scores_are_those_of_the_best_prototype_of_a_group():
    g = torch.Generator().manual_seed(0)
    codes, teacher = torch.randn(4, 7, 6, generator=g), torch.randn(5, 6, generator=g)
    grouping = Grouping(SimpleNamespace(teacher=teacher), np.array([1, 0, 1, 2, 0]))
    cosines = torch.nn.functional.cosine_similarity(codes[:, :, None], teacher, dim=-1)
    expected = torch.stack([cosines[..., [1, 4]].amax(-1), cosines[..., [0, 2]].amax(-1), cosines[..., 3]], -1)
    torch.testing.assert_close(grouping.scores(codes), expected)
    assert len(grouping) == 3
    assert torch.equal(grouping.prototypes, torch.eye(3))
    # without a tree, codes are labelled as ever
    plain = Grouping(SimpleNamespace(teacher=teacher))
    assert plain.scores(codes) is codes
    assert plain.prototypes is teacher


def test_a_segmenter_at_other_numbers_of_groups(fine):
    segmenter = smooseg_fast.Segmenter.load(fine / "checkpoint.safetensors", device="cpu")
    image, most, trained = draw(3, 90, 120)[0], segmenter.checkpoint.fine.most, len(segmenter.groups)
    assert 2 < most <= 9
    before = np.zeros(len(segmenter.checkpoint.fine.tree), int)
    for groups in range(1, most + 1):
        other = segmenter.at(groups)
        assert len(other.groups) == groups
        assert other.predict(image).max() < groups
        if groups != trained:  # with that number, the trained head predicts
            moved = other.grouping.groups != before
            assert (other.grouping.groups[moved] >= groups - (2 if groups - 1 == trained else 1)).all()
            before = other.grouping.groups
    assert segmenter.at(trained).grouping.head is segmenter.checkpoint.head
    heights = segmenter.checkpoint.fine.tree.heights
    assert len(segmenter.at(cut=float(heights[-1]) - 0.01).groups) == 1
    assert len(segmenter.at(cut=float(heights[-1])).groups) == 2
    assert segmenter.at(2).digest != segmenter.at(3).digest
    for arguments in ({"groups": most + 1}, {"groups": 0}):
        with pytest.raises(UserError, match=rf"^--groups \d+: the tree can be cut into 1 to {most} groups; give such"):
            segmenter.at(**arguments)


def test_a_head_without_a_tree_has_one_number(folder):
    segmenter = smooseg_fast.fit(
        folder, size=64, eval_size=64, steps=2, batch_size=4, prototypes=3, init="random", progress=False
    )
    assert len(segmenter.groups) == 3
    with pytest.raises(UserError, match=r"^--groups 2: the checkpoint was learnt without a tree; its 3 groups are"):
        segmenter.at(2)
    with pytest.raises(UserError, match=r"^--groups 2: is a cut of the tree; with --init random, give --prototypes$"):
        smooseg_fast.fit(folder, groups=2, init="random", steps=2)
    with pytest.raises(UserError, match=r"^--groups 9: is more than the 4 prototypes; give more --prototypes$"):
        smooseg_fast.fit(folder, groups=9, prototypes=4)


def test_fit_with_a_number(folder):
    settings = dict(size=64, eval_size=64, steps=4, batch_size=4, prototypes=9, progress=False)
    segmenter = smooseg_fast.fit(folder, groups=3, **settings)
    assert len(segmenter.groups) == segmenter.checkpoint.trained == 3
    assert segmenter.checkpoint.report["tree"]["why"] == "as asked"
    assert segmenter.checkpoint.report["tree"]["number"] is None
    smooseg_fast.fit(folder, groups=3, out="out", **settings)
    with pytest.raises(UserError, match=r"--out out: holds another run \(groups is 3 there and 4 here\)"):
        smooseg_fast.fit(folder, groups=4, out="out", **settings)


def test_training_starts_from_the_groups_of_the_tree(folder):
    """The trained head labels nearly as the tree where the learning rate is 0: a prototype is the mean of a group."""
    settings = dict(size=64, eval_size=64, batch_size=4, groups=3, prototypes=9, progress=False)
    trained = smooseg_fast.fit(folder, steps=1, lr=0.0, lr_prototypes=0.0, **settings)
    assert trained.grouping.groups is None
    untrained = smooseg_fast.fit(folder, steps=0, **settings)
    assert len(untrained.groups) == untrained.grouping.groups.max() + 1 == 3
    assert untrained.head is untrained.checkpoint.fine.head
    image = draw(3, 90, 120)[0]
    assert (trained.predict(image) == untrained.predict(image)).mean() > 0.9


def test_a_run_without_steps(labelled, capsys):
    """The default: the tree alone, at the number that is chosen without labels."""
    args = ["--data", labelled, "--out", "out", *FINE, "--steps", "0"]
    assert call(*args) == 0
    out = capsys.readouterr().out
    assert "learnt" not in out
    assert "settled" not in out
    checkpoint = read_checkpoint("out/checkpoint.safetensors")
    assert checkpoint.step == 0
    report = json.load(open("out/report.json"))
    groups = report["tree"]["groups"]
    assert len(report["health"]["shares"]) == groups == len(checkpoint.grouping)
    shares = np.bincount(checkpoint.grouping.groups, checkpoint.fine.tree.shares)
    assert report["health"]["shares"] == pytest.approx(shares)
    assert report["scores"]["groups"] == groups
    assert {path.name for path in Path("out").iterdir()} == {
        ".smooseg",
        "checkpoint.safetensors",
        "report.json",
        "run.json",
        "groups.png",
        "groups.jsonl",
        "tree.png",
        "report.html",
        "tiles.jsonl",
        "metrics.jsonl",
    }
    assert call(*args) == 0
    assert "is finished, step 0 of 0" in capsys.readouterr().out
    assert call("--data", labelled, "--out", "x", *SMALL, "--steps", "0", "--init", "random") == 2
    assert "error: --steps 0: --init random makes no groups without training; give --steps" in capsys.readouterr().err


def test_choose_is_a_lookup_and_can_be_undone(fine, capsys):
    before = (fine / "checkpoint.safetensors").read_bytes()
    first = read_checkpoint(fine / "checkpoint.safetensors")
    picture = (fine / "tree.png").read_bytes()
    assert first.groups is None
    other = 2 if first.trained != 2 else 3
    assert run(choose.main, ["--run", "out", "--groups", str(other)]) == 0
    printed = capsys.readouterr().out
    assert f"out/checkpoint.safetensors has {other} groups now; it had {first.trained}" in printed
    assert printed.strip().splitlines()[-1] == (
        "next       python -m smooseg_fast.predict --checkpoint out/checkpoint.safetensors "
        f"--images {first.config.data} --out out/predictions_{other}"
    )
    assert read_checkpoint(fine / "checkpoint.safetensors").groups == other
    assert (fine / "tree.png").read_bytes() != picture
    assert call("--data", first.config.data, "--out", "out", *FINE) == 0  # finished, and says what is chosen now
    assert f"--out out/predictions_{other}" in capsys.readouterr().out
    assert run(choose.main, ["--run", "out", "--cut", str(float(first.fine.tree.heights[-1]))]) == 0
    assert read_checkpoint(fine / "checkpoint.safetensors").groups == 2
    assert run(choose.main, ["--run", "out", "--groups", str(first.trained)]) == 0
    assert (fine / "checkpoint.safetensors").read_bytes() == before
    assert (fine / "tree.png").read_bytes() == picture


def test_choose_a_least_share(fine, capsys):
    """Parts of the tree below the share join their nearest group, in masks and picture too, until another choice."""
    first = read_checkpoint(fine / "checkpoint.safetensors")
    tree = first.fine.tree
    share = float(np.median(tree.shares[tree.shares > 0])) * 1.01  # some fine groups are below it
    most = len(tree.splits(share)) + 1
    assert 1 < most < first.fine.most
    assert run(choose.main, ["--run", "out", "--share", repr(share)]) == 0
    assert f"has {most} groups now" in capsys.readouterr().out
    chosen = read_checkpoint(fine / "checkpoint.safetensors")
    assert (chosen.share, chosen.groups or chosen.trained) == (share, most)
    assert chosen.grouping.groups.tolist() == tree.cut(most, least_share=share).tolist()
    assert (np.bincount(chosen.grouping.groups, tree.shares) >= share).all()
    segmenter = smooseg_fast.Segmenter.load(fine / "checkpoint.safetensors", device="cpu")
    assert segmenter.at(2).checkpoint.share == share  # another number keeps it
    assert segmenter.at(most, share=0).grouping.groups is None or segmenter.at(most, share=0).digest != segmenter.digest
    assert segmenter.predict(draw(3, 90, 120)[0]).max() < most
    assert len(splits_of(tree, most, share)) == most - 1
    assert run(choose.main, ["--run", "out", "--groups", str(most + 1), "--share", repr(share)]) == 2
    message = (
        f"error: --groups {most + 1}: the tree can be cut into 1 to {most} groups of at least {100 * share:g} % of"
    )
    assert capsys.readouterr().err.startswith(message)
    height = repr(float(tree.heights[-1]))
    assert run(choose.main, ["--run", "out", "--cut", height, "--share", repr(share)]) == 0
    expected = int(tree.cut(threshold=float(height), least_share=share).max()) + 1
    assert f"has {expected} groups now" in capsys.readouterr().out
    assert run(choose.main, ["--run", "out", "--groups", str(first.trained)]) == 0
    assert read_checkpoint(fine / "checkpoint.safetensors").share == 0
    with pytest.raises(UserError, match=r"^--share: must be between 0 and 1, got 2"):
        segmenter.at(share=2)


def test_choose_says_what_is_wrong(fine, capsys):
    for args, message in (
        (["--run", "out", "4"], "error: 4: belongs to no flag; did you mean --groups 4"),
        (["--run", "out"], "error: --groups: missing; give it, or --cut with a height of tree.png"),
        (["--run", "out", "--groups", "2", "--cut", "0.1"], "error: --groups: give either it or --cut"),
        (
            ["--run", "out", "--groups", "2", "--cut", "0.1", "--share", "0.1"],
            "error: --groups: give either it or --cut",
        ),
        (["--run", "out", "--groups", "200"], "error: --groups 200: the tree can be cut into 1 to "),
        (["--run", "nowhere", "--groups", "2"], "error: --run nowhere: holds no finished run; give the --out folder"),
    ):
        assert run(choose.main, args) == 2
        assert capsys.readouterr().err.startswith(message)


def test_predict_and_evaluate_take_a_number(trained, labelled, capsys):
    checkpoint = ["--checkpoint", str(trained)]
    images = ["--images", str(labelled / "val" / "images")]
    assert run(predict.main, [*checkpoint, *images, "--groups", "3", "--out", "three"]) == 0
    assert json.load(open("three/shares.json"))["groups"] == 3
    assert max(np.asarray(Image.open(mask)).max() for mask in Path("three/masks").rglob("*.png")) <= 2
    assert run(predict.main, [*checkpoint, *images, "--groups", "2", "--out", "three"]) == 2
    assert "--out three: holds another run (groups is 3 there and 2 here)" in capsys.readouterr().err
    for whole in ([], ["--whole"]):
        assert run(evaluate.main, [*checkpoint, "--data", str(labelled), "--groups", "4", "--out", "e", *whole]) == 0
        scores = json.load(open("e/scores.json"))
        assert (scores["groups"], np.shape(scores["confusion"])) == (4, (4, 2))
    assert run(evaluate.main, [*checkpoint, "--data", str(labelled), "--groups", "99"]) == 2
    assert "--groups 99: the tree can be cut into 1 to " in capsys.readouterr().err


def test_masks_at_several_numbers_in_one_pass(trained, labelled, capsys, monkeypatch):
    args = ["--checkpoint", str(trained), "--images", str(labelled / "val" / "images")]
    assert run(predict.main, [*args, "--groups", "3", "--out", "three"]) == 0
    assert run(predict.main, [*args, "--groups", "2", "3", "5", "--out", "many"]) == 0
    assert "look at    many/groups_5/sheet.jpg" in capsys.readouterr().out
    masks = [path.relative_to("three") for path in Path("three/masks").rglob("*.png")]
    assert masks
    for mask in masks:
        assert (Path("many/groups_3") / mask).read_bytes() == (Path("three") / mask).read_bytes()
    for number in (2, 3, 5):
        assert json.load(open(f"many/groups_{number}/shares.json"))["groups"] == number
    # what is missing alone is made
    Path("many/groups_2", masks[0]).unlink()
    asked = []
    predict_at = smooseg_fast.Segmenter.predict_at
    monkeypatch.setattr(
        smooseg_fast.Segmenter,
        "predict_at",
        lambda self, image, numbers, **options: asked.append(numbers) or predict_at(self, image, numbers, **options),
    )
    assert run(predict.main, [*args, "--groups", "5", "2", "--out", "many"]) == 0
    assert asked == [[2]]
    printed = capsys.readouterr().out
    assert f"{len(masks)} of {len(masks)} images are done in many/groups_5" in printed
    assert f"{len(masks) - 1} of {len(masks)} images are done in many/groups_2" in printed
    assert run(predict.main, [*args, "--groups", "3", "3", "--out", "x"]) == 2
    assert "error: --groups: give one or more different numbers, got (3, 3)" in capsys.readouterr().err
    assert run(predict.main, [*args, "--groups", "3", "99", "--out", "x"]) == 2
    assert "error: --groups 99: the tree can be cut into" in capsys.readouterr().err
    assert not Path("x").exists()


def test_the_report_has_the_tree(fine):
    report, checkpoint = json.load(open("out/report.json")), read_checkpoint("out/checkpoint.safetensors")
    tree = report["tree"]
    assert tree["groups"] == checkpoint.trained == len(report["health"]["shares"])
    assert (tree["fine"], tree["most"]) == (len(checkpoint.fine.tree), checkpoint.fine.most)
    assert tree["why"].startswith("chosen without labels")
    assert tree["number"]["groups"] == tree["groups"]
    assert len(checkpoint.fine.head.teacher) == len(checkpoint.fine.tree) <= checkpoint.config.prototypes


def test_a_resumed_run_keeps_its_tree(folder, monkeypatch):
    assert call("--data", folder, "--out", "whole", *FINE) == 0
    with monkeypatch.context() as patch:
        step, calls = loop.train_step, []

        def interrupted(*args, **options):
            calls.append(1)
            if len(calls) == 4:
                signal.raise_signal(signal.SIGINT)
            return step(*args, **options)

        patch.setattr(loop, "train_step", interrupted)
        assert call("--data", folder, "--out", "cut", *FINE) == 130
    monkeypatch.setattr(steps, "grow", None)
    assert call("--data", folder, "--out", "cut", *FINE) == 0
    whole, cut = (read_checkpoint(f"{name}/checkpoint.safetensors") for name in ("whole", "cut"))
    assert whole.report == cut.report
    whole, cut = whole.fine.tensors(), cut.fine.tensors()
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("closeness", lambda t: t[:1], "closeness of the tree is not finite float64"),
        ("weight", lambda t: t.float(), "weight of the tree is not finite float64"),
        ("shares", lambda t: t * float("nan"), "shares of the tree is not finite float64"),
        ("typical", lambda t: t[..., :2].contiguous(), "typical patches of the tree are not uint8"),
    ],
)
def test_a_damaged_tree_is_one_line(fine, name, change, message):
    path = fine / "checkpoint.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors[f"fine.{name}"] = change(tensors[f"fine.{name}"])
    safetensors.torch.save_file(tensors, path, {KEY: sealed(json.loads(header[KEY]), tensors)})
    with pytest.raises(UserError, match=message):
        read_checkpoint(path)


def test_a_file_of_an_older_format_and_a_number_that_is_none(fine):
    path = fine / "checkpoint.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    content = json.loads(header[KEY])
    for change, message in (
        ({"format": FORMAT - 1}, f"format {FORMAT - 1}, this version reads {FORMAT}"),
        ({"groups": 77}, "--groups 77: the tree can"),
    ):
        safetensors.torch.save_file(tensors, path, {KEY: sealed(content | change, tensors)})
        with pytest.raises(UserError, match=message) as error:
            read_checkpoint(path)
        assert str(error.value).endswith("; copy it again or train again")


# pictures


def test_the_picture_shows_every_group_and_its_numbers_stay(fine):
    checkpoint = read_checkpoint("out/checkpoint.safetensors")
    sizes = [tree_picture(checkpoint.at(groups), "title").size for groups in range(1, checkpoint.fine.most + 1)]
    assert {width for width, _ in sizes} == {1600}
    splits = splits_of(checkpoint.fine.tree, checkpoint.fine.most)
    assert [split.number for split in splits] == list(range(1, checkpoint.fine.most))
    assert all(split.parent < split.number for split in splits)
    assert all(one.height <= other.height for one, other in itertools.pairwise(splits))
    bare = dataclasses.replace(checkpoint, fine=dataclasses.replace(checkpoint.fine, typical=None), report={})
    assert tree_picture(bare, "title").size == sizes[bare.trained - 1]


def test_typical_patches_are_cut_out_where_they_lie(fine):
    typical = read_checkpoint("out/checkpoint.safetensors").fine.typical
    assert typical.shape[1:] == (SIDE, SIDE, 3)
    assert typical.float().std() > 1
    square = np.zeros((64, 64, 3), np.uint8)
    square[24:32, 40:48] = 200  # patch (3, 5) of 8 x 8
    patch = around(square, 3 * 8 + 5, (8, 8))
    third = SIDE // 3
    assert patch[third + 4 : 2 * third - 4, third + 4 : 2 * third - 4].min() > 190
    assert patch[: third - 4].max() < 10
    assert around(square, 0, (8, 8)).max() == 0  # at the border, the patches next to it
    assert around(None, 5, (8, 8)).max() == 0
