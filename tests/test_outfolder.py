"""Folders that belong to one set of settings, and journals that survive a stop at any byte."""

import json
import os
from pathlib import Path

import pytest

from smooseg_fast.errors import UserError
from smooseg_fast.system.files import write_json
from smooseg_fast.system.outfolder import Journal, OutFolder


def open_folder(path, **settings):
    return OutFolder(path, {"a": 1, "b": float("nan"), **settings}, record="r.json", made=("things", "stuff"))


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


def test_opening_leaves_nothing_behind(tmp_path):
    open_folder(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_of_others_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out .*file: is a file; give a folder"):
        open_folder(tmp_path / "file")
    for name in ("stuff", "things"):
        (tmp_path / name).mkdir()
        with pytest.raises(UserError, match=rf"holds {name} but no r\.json; give another folder"):
            open_folder(tmp_path)
    for content in ("{", "[]", '"a"'):
        (tmp_path / "r.json").write_text(content)
        with pytest.raises(UserError, match=r"its r\.json cannot be read .*; give another folder"):
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
    """As one below a folder that is another user's alone."""

    def stat(self, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(UserError, match=r"^--out .*out: cannot be read \(Permission denied\); give another folder$"):
        open_folder(tmp_path / "out")


def test_json_holds_names_that_are_no_text(tmp_path):
    name = os.fsdecode(b"stra\xc3\x9fe \xff.png")
    path = write_json(tmp_path / "a.json", {name: 1})
    assert "straße" in path.read_text(encoding="utf-8")
    assert json.loads(path.read_text(encoding="utf-8")) == {name: 1}
