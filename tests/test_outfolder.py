"""Folders that belong to one set of settings, and journals that survive a stop at any byte."""

import json
import os
import subprocess
import sys

import pytest
from listing import find_images

from smooseg_fast.config import TrainConfig
from smooseg_fast.errors import UserError
from smooseg_fast.learn.runfolder import RunFolder
from smooseg_fast.system import files
from smooseg_fast.system.files import write_json
from smooseg_fast.system.outfolder import Journal, OutFolder, mark_as_ours, written_by_us


def open_folder(path, **settings):
    return OutFolder(path, {"a": 1, "b": float("nan"), **settings}, record="r.json", outputs=("things", "stuff"))


def test_a_folder_takes_the_same_settings_again_and_no_others(tmp_path):
    path = tmp_path / "new" / "out"
    open_folder(path).claim()
    assert json.loads((path / "r.json").read_text()) == {"a": 1, "b": None}
    (path / "things").mkdir()
    open_folder(path)
    with pytest.raises(
        UserError, match=r"^--out .*out: holds another run \(a is 1 there and 2 here\); give another folder"
    ):
        open_folder(path, a=2)
    with pytest.raises(UserError, match=r"\(a is 1 there and not set here\)"):
        open_folder(path, a=None)


def test_a_claimed_folder_names_its_output(tmp_path):
    open_folder(tmp_path).claim()
    assert written_by_us(tmp_path) == {"things", "stuff"}
    mark_as_ours(tmp_path, "more")
    assert written_by_us(tmp_path) == {"things", "stuff", "more"}
    assert (tmp_path / ".smooseg").read_text().startswith("smooseg wrote the files")
    before = (tmp_path / ".smooseg").stat().st_ino
    mark_as_ours(tmp_path, "stuff")
    assert (tmp_path / ".smooseg").stat().st_ino == before  # nothing new, nothing written
    assert written_by_us(tmp_path / "nowhere") == set()


def test_a_run_in_the_folder_of_photos_does_not_hide_them(tmp_path):
    for name in ("a.png", "sub/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    photos = find_images(tmp_path)
    RunFolder(tmp_path, TrainConfig(backbone="filterbank")).claim()
    (tmp_path / "samples").mkdir()
    for name in ("groups.png", "curves.png", "tree.png", "samples/0.png"):
        (tmp_path / name).write_bytes(b"")
    assert find_images(tmp_path) == photos


def test_pictures_of_somebody_else_are_not_written_over(tmp_path):
    (tmp_path / "groups.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds groups\.png but no run\.json; give another folder"):
        RunFolder(tmp_path, TrainConfig(backbone="filterbank"))


def test_resuming_drops_a_line_of_metrics_that_was_cut_short(tmp_path):
    """At every byte of the last line: the whole lines stay, the half one goes, and the next record stands on a line of
    its own.
    """
    folder = RunFolder(tmp_path, TrainConfig(backbone="filterbank"))
    head = TrainConfig(backbone="filterbank").variants()[0].name
    figures = {"perplexity": 2.0, "image_information": 0.25}
    records = [{"step": step, "head": head, "total": 0.5 * step, **figures} for step in (1, 2)]
    folder.metrics.append(*records)
    whole = folder.metrics.path.read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(first, len(whole)):
        folder.metrics.path.write_bytes(whole[:length])
        kept = folder.resume(step=9)
        assert (
            kept == records[: 1 + (length == len(whole) - 1)]
        )  # without its line break alone the last record is whole
        folder.metrics.append({"step": 3, "head": head, "total": 1.5})
        lines = folder.metrics.path.read_text().splitlines()
        assert [json.loads(line) for line in lines] == [*kept, {"step": 3, "head": head, "total": 1.5}]


ILLEGAL = {
    "perplexity": [None, "2", [], True],
    "total": ["x", {}],
    "step": [None, 1.0, True],
    "head": [None, [], 7],
    "more": ["x", {}],
}


def test_lines_of_metrics_that_are_damaged_go_and_are_counted(tmp_path, capsys):
    folder = RunFolder(tmp_path, TrainConfig(backbone="filterbank"))
    head = TrainConfig(backbone="filterbank").variants()[0].name
    whole = {"step": 1, "head": head, "total": 0.5, "perplexity": 2.0, "image_information": 0.25, "miou": None}
    diverged = dict.fromkeys(whole) | {"step": 2, "head": head}
    damaged = [whole | {name: value} for name, values in ILLEGAL.items() for value in values]
    damaged += [{name: value for name, value in whole.items() if name != lost} for lost in ("total", "perplexity")]
    folder.metrics.append(whole, *damaged, diverged)
    assert folder.resume(step=9) == [whole, diverged]
    assert f"metrics.jsonl: {len(damaged)} of its lines are not as they were written" in capsys.readouterr().err
    assert folder.resume(step=9) == [whole, diverged]
    assert capsys.readouterr().err == ""


def test_temporary_files_go_that_no_living_process_writes(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    gone = tmp_path / f".a.{files.HOST}.{process.pid}.part.png"
    alive, elsewhere = tmp_path / f".a.{files.HOST}.{os.getpid()}.part.png", tmp_path / ".a.1.1.part.png"
    for path in (gone, alive, elsewhere):
        path.write_bytes(b"")
    mark_as_ours(tmp_path, "a.png")
    assert not gone.exists()
    assert alive.exists()
    assert elsewhere.exists()
    os.utime(elsewhere, (0, 0))
    mark_as_ours(tmp_path, "a.png")
    assert not elsewhere.exists()
    assert alive.exists()


def test_opening_leaves_nothing_behind(tmp_path):
    open_folder(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_of_others_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"--out .*file: cannot be read \(r\.json: Not a directory\); give another folder"
    ):
        open_folder(tmp_path / "file")
    for name in ("stuff", "things"):
        (tmp_path / name).mkdir()
        with pytest.raises(UserError, match=rf"holds {name} but no r\.json; give another folder"):
            open_folder(tmp_path)
    for content in ("{", "[]", '"a"'):
        (tmp_path / "r.json").write_text(content)
        with pytest.raises(UserError, match=r"cannot be read \(r\.json: .*\); give another folder"):
            open_folder(tmp_path)


def test_a_journal_cut_at_any_byte_keeps_its_whole_lines(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    assert journal.read() == []
    records = [{"n": 1, "name": "straße\u2028\udcff"}, {"n": 2, "x": {"0": 0.5}}]
    for record in records:
        journal.append(record)
    whole = journal.path.read_bytes()
    first = len(whole.splitlines(keepends=True)[0])
    for length in range(len(whole) + 1):
        journal.path.write_bytes(whole[:length])
        found = journal.read()
        assert found == records[: (length >= first - 1) + (length >= len(whole) - 1)]
        journal.rewrite(found)
        assert journal.path.read_bytes() == b"".join(
            whole.splitlines(keepends=True)[: len(found)]
        )  # no half line stays
        journal.append({"n": 3})
        assert journal.read() == [*found, {"n": 3}]


def test_a_journal_leaves_out_what_is_no_record(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    journal.path.write_bytes(b'\n[1]\n"a"\n\xff\xfe\n{"n": 1}\n{"n": \n')
    assert journal.read() == [{"n": 1}]


def test_numbers_that_json_lacks_become_null(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    journal.append({"n": float("inf")})
    assert journal.read() == [{"n": None}]


def test_a_journal_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere/j\.jsonl: cannot be written"):
        Journal(tmp_path / "nowhere" / "j.jsonl").append({})


def test_a_journal_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\); change its permissions"):
        Journal(tmp_path).read()


def test_a_folder_that_cannot_be_looked_into_is_named(tmp_path, monkeypatch):
    """It may lie below another user's private folder."""

    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("smooseg_fast.system.outfolder.read_text", forbidden)
    with pytest.raises(UserError, match=r"^--out .*out: cannot be read \(r\.json: Permission denied\); give another"):
        open_folder(tmp_path / "out")


def test_json_holds_names_that_are_no_text(tmp_path):
    name = os.fsdecode(b"stra\xc3\x9fe \xff.png")
    path = write_json(tmp_path / "a.json", {name: 1})
    assert "straße" in path.read_text(encoding="utf-8")
    assert json.loads(path.read_text(encoding="utf-8")) == {name: 1}
