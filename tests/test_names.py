"""Names, merges and colours of groups: they follow their fine groups, stay in the checkpoint, and reach all outputs."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_trainer import SMALL, call
from textures import draw

import smooseg_fast
from smooseg_fast import choose, evaluate, name, predict
from smooseg_fast.command import new_names, run
from smooseg_fast.errors import UserError
from smooseg_fast.learn.runpictures import different
from smooseg_fast.measure.scores import hungarian, proposed_names, scores_table
from smooseg_fast.segment.checkpoint import read_checkpoint
from smooseg_fast.segment.colours import palette
from smooseg_fast.segment.names import UNNAMED, Group, Names, Naming, read_groups

# a tree's cuts: group 1 splits into 1 and 3, then group 0 into 0 and 4
THREE, FOUR, FIVE = (np.array(cut) for cut in ([0, 0, 1, 1, 2], [0, 0, 1, 3, 2], [0, 4, 1, 3, 2]))


def test_a_name_follows_its_group_to_cuts_that_have_it():
    given = Names(3, {0: "sky", 1: "road"}, {2: (1, 2, 3)})
    naming = UNNAMED.changed(THREE, given)
    assert naming.at(THREE) == given
    assert naming.at(FOUR) == Names(4, {0: "sky"}, {2: (1, 2, 3)})  # the road has split
    assert naming.at(FIVE) == Names(5, {}, {2: (1, 2, 3)})
    finer = naming.changed(FIVE, Names(5, {4: "cloud"}))
    assert finer.at(THREE).names == {0: "sky", 1: "road"}  # names that another cut alone shows stay
    assert finer.at(THREE).colours == {}  # taken away where it was seen
    assert [group.name for group in finer.at(FIVE).listed()] == ["group 0", "group 1", "group 2", "group 3", "cloud"]
    moved = finer.changed(THREE, Names(3, {2: "cloud"}))  # a name belongs to one group
    assert moved.at(FIVE).names == {2: "cloud"}


def test_merges_hold_where_whole_groups_fill_them():
    naming = UNNAMED.changed(FOUR, Names(4, {1: "ground"}, merge=[[1, 2]]))
    assert naming.at(FOUR).merge == [[1, 2]]
    assert naming.at(FIVE) == Names(5, {1: "ground"}, merge=[[1, 2]])
    assert naming.at(THREE) == Names(3)  # group 1 is more than what was merged
    naming = UNNAMED.changed(THREE, Names(3, {0: "all"}, merge=[[0, 1]]))
    assert naming.at(FIVE) == Names(5, {0: "all"}, merge=[[0, 1, 3, 4]])  # parts stay together
    naming = naming.changed(FIVE, Names(5, {0: "two"}, merge=[[0, 2]]))  # overlaps, so the merge of before goes
    assert naming.at(THREE) == Names(3)
    assert naming.at(FOUR).merge == []


def test_merged_groups_taken_apart_have_their_names_back():
    naming = UNNAMED.changed(THREE, Names(3, {0: "sky", 1: "road"}))
    merged = naming.changed(THREE, Names(3, {0: "both"}, merge=[[0, 1]]))
    assert merged.at(THREE).names == {0: "both"}
    assert merged.apart(THREE, [0]).at(THREE) == Names(3, {0: "sky", 1: "road"})


def test_a_naming_survives_json():
    naming = UNNAMED.changed(FOUR, Names(4, {1: "Straße №7"}, {0: (0, 127, 255)}, [[1, 2]]))
    content = json.loads(json.dumps(naming.as_json()))
    assert Naming.from_json(content, 5) == naming
    for damage in (
        {"merges": [[0, 1], [1, 2]]},
        {"names": [[[5], "x"]]},
        {"colours": [[[0], "red"]]},
        {"names": [[[0], ""]]},
    ):
        with pytest.raises((ValueError, UserError)):
            Naming.from_json(content | damage, 5)


def test_merging_is_a_lookup_and_numbers_stay():
    names = Names(6, {1: "wall"}, {4: (9, 9, 9)}, [[1, 3], [2, 5]])
    assert names.numbers == [0, 1, 2, 4]
    labels = np.array([0, 1, 2, 3, 4, 5, 255], np.uint8)
    assert names.table[labels].tolist() == [0, 1, 2, 1, 4, 2, 255]
    rows = np.arange(12).reshape(6, 2)
    assert names.merged(rows).tolist() == [[0, 1], [8, 10], [14, 16], [8, 9]]
    first, wall, *_, last = names.listed([0.1, 0.2, 0.3, 0.05, 0.05, 0.3])
    assert first == Group(0, "group 0", tuple(palette(1)[0].tolist()), 0.1)
    assert (wall.name, wall.share, wall.caption, first.caption) == ("wall", pytest.approx(0.25), "1 wall", "0")
    assert (last.number, last.colour) == (4, (9, 9, 9))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "is no names file; it needs"),
        ({"groups": 3, "name": {}}, "holds 'name'; a names file holds"),
        ({"groups": 3, "names": {"3": "x"}}, "there is no group 3; the 3 groups are 0 to 2"),
        ({"groups": 3, "names": {"x": "x"}}, "'x' is not the number of a group"),
        ({"groups": 3, "names": {"0": "x", "2": "x"}}, "'x' names groups 0 and 2; merge them: 0,2=x"),
        ({"groups": 3, "names": {"0": " "}}, "' ' is no name; give printable text"),
        ({"groups": 3, "names": {"0": "a\nb"}}, "is no name"),
        ({"groups": 3, "names": {"0": "x" * 61}}, "has 61 characters; give a name of at most 60"),
        ({"groups": 3, "colours": {"0": "red"}}, "'red' is no colour; give #rrggbb"),
        ({"groups": 3, "merge": [[1]]}, "a merge needs two groups or more"),
        ({"groups": 3, "merge": [[0, 1], [1, 2]]}, "group 1 is merged twice"),
        ({"groups": 3, "merge": 7}, "merge must be lists of group numbers"),
        ({"groups": 3, "merge": [[0, 1]], "names": {"1": "x"}}, "group 1 is merged into 0; name 0"),
    ],
)
def test_a_names_file_that_is_wrong_is_one_line(content, message, tmp_path):
    (tmp_path / "names.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        Names.read(tmp_path / "names.json")
    assert str(error.value).startswith(f"--file {tmp_path / 'names.json'}: ")
    assert message in str(error.value)


def test_names_that_labels_propose():
    counts = np.array([[90, 5, 5], [10, 30, 40], [0, 9, 100], [7, 0, 0]])
    assert proposed_names(counts, ["sky", "road", "tree"]) == {0: "sky", 2: "tree"}  # most of 1 is no road
    table = scores_table({"hungarian": hungarian(counts)}, ["sky", "road", "tree"], ["0 sky", "1", "2", "3"])
    assert table.splitlines()[2].split()[:3] == ["sky", "0", "sky"]


# of a run


@pytest.fixture
def fine(labelled):
    """The folder of a run with a tree, on labelled images."""
    assert call("--data", labelled, "--out", "out", *SMALL, "--prototypes", "9", "--groups", "4") == 0
    return Path("out")


def test_names_of_a_run_reach_predictions_and_evaluation(fine, labelled, capsys):
    """One run, so that it is trained once: list, name, merge, predict, rename, take apart, choose, evaluate."""
    naming = ["--run", "out"]
    assert run(name.main, naming) == 0
    printed = capsys.readouterr().out
    assert "out: 4 groups\ngroup  name" in printed
    assert "\nlook at    out/groups.png, out/report.html for which number is what\n" in printed
    assert printed.splitlines()[-1] == "next       such as python -m smooseg_fast.name --run out 0=road 1,2=building"
    images = Path("images")
    images.mkdir()
    for number in range(2):
        Image.fromarray(draw(number)[0]).save(images / f"{number}.png")
    args = ["--checkpoint", "out/checkpoint.safetensors", "--images", "images", "--out", "made"]
    assert run(predict.main, args) == 0
    plain = np.array(Image.open("made/masks/0.png"))
    overlay = Path("made/overlays/0.jpg").read_bytes()

    assert run(name.main, [*naming, "3=road", "--colour", "3=#102030"]) == 0
    assert "3  road" in capsys.readouterr().out
    assert json.load(open("out/names.json")) == {
        "groups": 4,
        "names": {"3": "road"},
        "colours": {"3": "#102030"},
        "merge": [],
    }
    segmenter = smooseg_fast.Segmenter.load("out/checkpoint.safetensors", device="cpu")
    assert [group.name for group in segmenter.groups] == ["group 0", "group 1", "group 2", "road"]
    assert sum(group.share for group in segmenter.groups) == pytest.approx(1)
    assert len(segmenter.at(2).groups) == 2
    renamed = segmenter.named(Names(4, {1: "sea"}, merge=[[0, 2]]))
    assert [group.name for group in renamed.groups] == ["group 0", "sea", "group 3"]
    assert renamed.digest == segmenter.digest  # nothing was learnt
    with pytest.raises(UserError, match="names: there is no group 4; the 4 groups are 0 to 3"):
        segmenter.named(Names(4, {4: "sea"}))

    with pytest.MonkeyPatch.context() as patch:  # names, colours and merges are drawn from the masks
        patch.setattr(smooseg_fast.Segmenter, "predict", lambda *_, **__: 1 / 0)
        assert run(predict.main, args) == 0
        assert (np.array(Image.open("made/masks/0.png")) == plain).all()
        assert Image.open("made/masks/0.png").getpalette()[9:12] == [0x10, 0x20, 0x30]
        assert Path("made/overlays/0.jpg").read_bytes() != overlay
        assert run(name.main, [*naming, "0,2=ground"]) == 0
        assert run(predict.main, args) == 0
    merged = np.where(plain == 2, 0, plain)
    assert (np.array(Image.open("made/masks/0.png")) == merged).all()
    groups = read_groups("made/groups.json")
    assert [(group.number, group.name) for group in groups] == [(0, "ground"), (1, "group 1"), (3, "road")]
    assert groups[2].colour == (0x10, 0x20, 0x30)
    shares = json.load(open("made/shares.json"))
    assert shares["groups"] == 3
    assert {str(group.number): group.share for group in groups if group.share} == shares["mean"]
    segmenter = smooseg_fast.Segmenter.load("out/checkpoint.safetensors", device="cpu")
    assert (segmenter.predict("images/0.png", mirror=True) == merged).all()

    for whole in ([], ["--whole"]):
        evaluation = ["--checkpoint", "out/checkpoint.safetensors", "--data", str(labelled), *whole]
        assert run(evaluate.main, evaluation) == 0
        scores = json.load(open("out/evaluation/scores.json"))
        assert scores["groups"] == len(scores["confusion"]) == 3
        assert scores["names"] == ["ground", "group 1", "road"]
        assert [cluster["cluster"] for cluster in scores["hungarian"]["clusters"]] == [0, 1, 3]
    printed = capsys.readouterr().out
    assert "class" in printed
    assert "group" in printed

    assert run(choose.main, [*naming, "--groups", "3"]) == 0
    assert json.load(open("out/names.json"))["groups"] == 3
    capsys.readouterr()
    assert run(choose.main, [*naming, "--groups", "4"]) == 0
    printed = capsys.readouterr().out
    assert "has 4 groups (3 after merging) now; it had 3 (2 after merging)\n" in printed
    assert "\nname       python -m smooseg_fast.name --run out lists the groups, to name them\n" in printed
    assert run(name.main, naming) == 0  # names that are taken are not proposed
    assert capsys.readouterr().out.endswith("next       such as python -m smooseg_fast.name --run out 1=building\n")
    assert json.load(open("out/names.json"))["names"] == {"0": "ground", "3": "road"}
    before = read_checkpoint("out/checkpoint.safetensors").naming
    Path("out/tree.png").unlink()  # what the run writes again keeps the names
    assert call("--data", labelled, "--out", "out", *SMALL, "--prototypes", "9", "--groups", "4") == 0
    assert read_checkpoint("out/checkpoint.safetensors").naming == before
    assert run(name.main, [*naming, "--apart", "0"]) == 0
    assert run(predict.main, args) == 0  # the masks of merged groups do not tell: segmented again
    assert (np.array(Image.open("made/masks/0.png")) == plain).all()

    proposed = json.load(open("out/report.json"))["scores"]["proposed"]
    assert proposed
    assert run(name.main, [*naming, "--from-labels"]) == 0
    given = json.load(open("out/names.json"))["names"]
    assert given == proposed | {"3": "road"}  # a given name stays
    capsys.readouterr()
    assert run(name.main, naming) == 0
    printed = capsys.readouterr().out
    assert "--from-labels" not in printed  # nothing is left for them
    assert ("next       such as" in printed) == (len(given) < 4)

    Path("names.json").write_text(json.dumps({"groups": 2, "names": {"0": "one"}}))
    assert run(name.main, [*naming, "--file", "names.json"]) == 0
    assert "smooseg_fast.choose --run out --groups 2" in capsys.readouterr().out
    assert read_checkpoint("out/checkpoint.safetensors").at(2).names.names == {0: "one"}

    kept = Path("out/checkpoint.safetensors").read_bytes()
    for words, message in {
        "9=x": "N=NAME 9=x: group 9 does not exist; the groups are 0, 1, 2, 3",
        "9": "N=NAME: '9' has no =; write 3=road, without spaces",
        "3=a 3=b": "N=NAME 3=b: group 3 stands in this line twice; give it one name",
        "x=3": "N=NAME x=3: 'x' is not the number of a group",
        "1,1=a": "N=NAME 1,1=a: has a group twice",
        "0=road": "N=NAME: 'road' names groups 0 and 3; merge them: 0,3=road",
        "--colour 3=red": "--colour 3=red: 'red' is no colour",
        "--apart 3": "--apart 3: nothing is merged into group 3; no merges are in use",
        "--file nowhere.json": "--file nowhere.json: cannot be read (No such file or directory); give the path of the",
        "3=a --from-labels": "--file: give either it, or --from-labels, or names",
    }.items():
        assert run(name.main, [*naming, *words.split()]) == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")
    assert Path("out/checkpoint.safetensors").read_bytes() == kept
    assert run(name.main, ["out", "3=a"]) == 2
    assert capsys.readouterr().err == "error: --run: missing; did you mean --run out\n"
    Path("begun").mkdir()
    Path("begun/run.json").write_text("{}")
    for folder, message in {
        "nowhere": "holds no finished run; give the --out folder of training",
        "out/checkpoint.safetensors": "holds no finished run; did you mean out",
        ".": "holds no finished run; did you mean out",
        "begun": "is not finished; run the same smooseg train again, which resumes it",
    }.items():
        for main, words in ((name.main, []), (choose.main, ["--groups", "2"])):
            assert run(main, ["--run", folder, *words]) == 2
            assert capsys.readouterr().err == f"error: --run {folder}: {message}\n"


def test_names_that_are_new():
    names = Names(3, {0: "road", 2: "sky"})
    assert new_names(names, {"0": "tree", "1": "road"}) == new_names(names, None) == {}
    assert new_names(names, {"0": "tree", "1": "wall"}) == {1: "wall"}


def test_merging_again_takes_groups_along():
    names = Names(6, {1: "wall", 4: "sea"}, {5: (1, 2, 3)}, [[1, 3]])
    merged = name.changed(names, name.NameConfig(run="x", names=("1,5=", "4=")))
    assert merged == Names(6, {1: "wall"}, {1: (1, 2, 3)}, [[1, 3, 5]])
    assert name.changed(merged, name.NameConfig(run="x", names=("1=",), colour=("1=",))) == Names(6, merge=[[1, 3, 5]])
    assert name.changed(merged, name.NameConfig(run="x", names=("1,3,5=wall",))) == merged  # the same command again
    with pytest.raises(UserError, match="group 3 is merged into 1; the groups are 0, 1, 2, 4"):
        name.changed(merged, name.NameConfig(run="x", names=("3=x",)))


class Rows:
    """A store of images whose features are random, but for some that repeat others."""

    grid = (2, 2)

    def __init__(self, seeds):
        import torch

        self.names = [f"{number}.png" for number in range(len(seeds))]
        self._rows = torch.stack([torch.randn(4, 16, generator=torch.Generator().manual_seed(s)) for s in seeds])

    def rows(self, index):
        return self._rows[index]


def test_near_duplicates_take_no_place_from_other_images():
    seeds = [0, 0, 1, 0, 2, 1, 3, 0]
    chosen = different(Rows(seeds), 4)
    assert sorted(seeds[int(image.split(".")[0])] for image in chosen) == [0, 1, 2, 3]
    assert len(different(Rows(seeds), 20)) == 8
    assert different(Rows([7]), 3) == {"0.png"}
    assert math.isclose(len(different(Rows(list(range(64))), 8)), 8)
