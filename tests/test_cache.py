"""The cache as a whole: who may use what at once, what is looked at, listed, removed and made room for."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_store import CALLS, LAST_CALL, SLIDE, FakeBackbone, extract, photos, shards, small_shards, undisturbed  # noqa: F401

import smooseg_fast
from smooseg_fast import cache
from smooseg_fast.command import run
from smooseg_fast.errors import UserError
from smooseg_fast.features import cachefolder, store
from smooseg_fast.features import extract as extracting
from smooseg_fast.features.cachefolder import CacheFolder
from smooseg_fast.system import locks
from smooseg_fast.system.locks import Lock
from smooseg_fast.system.sizes import parse_size

pytestmark = pytest.mark.skipif(locks.fcntl is None, reason="needs locks on files")
HERE = Path(__file__).parent


def call(*args):
    return run(cache.main, [str(a) for a in args])


def flip(path):
    """One bit of the features."""
    content = path.read_bytes()
    path.write_bytes(content[:-7] + bytes([content[-7] ^ 16]) + content[-6:])


# locks


def test_one_alone_or_many_together(tmp_path):
    path = tmp_path / "new" / "lock"
    one, two, three = Lock(path), Lock(path), Lock(path)
    assert one.take(shared=True)
    assert two.take(shared=True)
    assert not three.take()
    one.release()
    assert not three.take()
    two.release()
    assert three.take()
    assert three.real
    assert not one.take(shared=True)
    assert not two.take()
    three.release(remove=True)
    assert not path.exists()
    assert one.take()
    copy = os.dup(one._file)  # in a child that began before it could forget
    one.release()
    assert two.take()
    two.release()
    os.close(copy)
    assert one.take()
    del one  # a store that nobody refers to any more is not in use
    assert two.take()


def test_a_lock_on_a_file_that_was_taken_away_is_none(tmp_path, monkeypatch):
    """Between opening and locking: who comes next would make another file and lock that."""
    path, plain, taken = tmp_path / "lock", locks.fcntl.flock, []

    def flock(file, how):
        if not taken:
            path.unlink()
        taken.append(file)
        plain(file, how)

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    lock = Lock(path)
    assert lock.take()
    assert len(taken) == 2
    assert not Lock(path).take()


def test_a_child_does_not_hold_the_locks_of_its_parent(tmp_path):
    lock = Lock(tmp_path / "lock")
    assert lock.take()
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        os.write(ready[1], b".")
        os.read(go[0], 1)
        os._exit(0)
    try:
        os.read(ready[0], 1)
        assert not Lock(tmp_path / "lock").take()  # the child has not released it
        lock._close()  # the kernel does so when the parent is killed
        assert Lock(tmp_path / "lock").take()
    finally:
        os.write(go[1], b".")
        os.waitpid(child, 0)
        for file in (*ready, *go):
            os.close(file)


def test_where_there_are_no_locks_everybody_goes_on(photos, tmp_path, monkeypatch):  # noqa: F811
    def none(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", none)
    assert Lock(tmp_path / "lock").take()
    assert not Lock(tmp_path / "lock").real
    backbone = FakeBackbone()
    extract(photos, tmp_path / "cache")
    extract(photos, tmp_path / "cache", backbone)
    assert backbone.calls == 0
    assert call("rm", "--all", "--cache", tmp_path / "cache") == 0
    assert not shards(tmp_path / "cache")


@pytest.mark.parametrize("used", [True, False])
def test_a_cache_that_may_only_be_read(photos, tmp_path, monkeypatch, used):  # noqa: F811
    extract(photos, tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob("*/used")
    if not used:
        path.unlink()
    plain = os.open

    def forbidden(name, flags, *mode):
        if flags & (os.O_CREAT | os.O_RDWR):
            raise PermissionError(13, "Permission denied")
        return plain(name, flags, *mode)

    monkeypatch.setattr(locks.os, "open", forbidden)  # and not by permissions, which root does not need
    backbone = FakeBackbone()
    features = extract(photos, tmp_path / "cache", backbone)
    assert len(features) == 8
    assert backbone.calls == 0
    assert features._lock.real == used  # a file that may only be read can be locked
    assert (CacheFolder(tmp_path / "cache").stores()[0].remove() is None) == used


# two runs at once


def start(photos, cache, stop_at=0):  # noqa: F811
    paths = [str(Path(smooseg_fast.__file__).parents[1]), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, HERE / "extracting.py", photos, cache, str(stop_at)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(list(map(str, command)), env=environment, **pipes)


def until(stream, word):
    for line in stream:
        if word in line:
            return line
    raise AssertionError(f"ended without {word!r}")


def content(cache):
    return {path.name: path.read_bytes() for path in shards(cache)}


@pytest.mark.parametrize("killed", [False, True])
def test_two_processes_make_the_same_features_at_once(photos, tmp_path, undisturbed, killed):  # noqa: F811
    """The second waits for what the first makes; when the first is killed it makes the rest."""
    first, second = start(photos, tmp_path / "cache", stop_at=6), None
    try:
        assert until(first.stdout, "reached")
        second = start(photos, tmp_path / "cache")
        assert f"waiting: process {first.pid} on " in until(second.stderr, "waiting")
        if killed:
            first.send_signal(signal.SIGKILL)
        else:
            first.stdin.write("\n")
            first.stdin.flush()
        ends = [each.communicate(timeout=60)[0] for each in (first, second)]
    finally:
        for each in filter(None, (first, second)):
            each.kill()
            each.wait()
    assert first.returncode == (-signal.SIGKILL if killed else 0)
    assert second.returncode == 0
    calls, digest = json.loads(ends[1])
    if killed:
        assert calls == LAST_CALL - sum(CALLS[:2])  # the third call of the third shard was the sixth
    else:
        assert json.loads(ends[0]) == [LAST_CALL, digest]
        assert calls == 0
    assert content(tmp_path / "cache") == undisturbed
    (folder,) = (tmp_path / "cache").iterdir()
    assert {path.name for path in folder.iterdir()} == {*undisturbed, "meta.json", "used"}


def test_what_a_killed_process_left_half_written_goes_at_once(photos, tmp_path, undisturbed):  # noqa: F811
    paths = shards(tmp_path / "undisturbed")
    paths[3].unlink()
    left = paths[0].with_name(".shard-00003.4711.part.safetensors")
    left.write_bytes(b"half")
    extract(photos, tmp_path / "undisturbed", **SLIDE)
    assert not left.exists()


# reading and checking


def test_a_large_finished_store_is_opened_by_its_headers(photos, tmp_path, undisturbed, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(extracting, "CHECKED_BYTES", 0)
    home = tmp_path / "undisturbed"
    victim = shards(home)[2]
    assert call("verify", "--cache", home) == 0
    assert f"read {len(undisturbed)} files of 1 stores in {home}: none damaged" in capsys.readouterr().out
    flip(victim)
    backbone = FakeBackbone()
    extract(photos, home, backbone, **SLIDE)
    assert backbone.calls == 0
    assert call("verify", "--cache", home) == 2
    out, err = capsys.readouterr()
    assert f"damaged: {victim} (photos, {victim.parent.name[:8]}): its features have changed" in out
    assert (
        f"error: {home}: 1 damaged files removed; the next run that needs them recomputes them: repeat the command"
        in err
    )
    assert not victim.exists()
    extract(photos, home, backbone, **SLIDE)
    assert backbone.calls == CALLS[2]
    assert content(home) == undisturbed
    assert call("verify", victim.parent.name[:5], "--cache", home) == 0


def test_verify_tells_of_damage_that_it_may_not_remove(photos, tmp_path, undisturbed, monkeypatch, capsys):  # noqa: F811
    victim = shards(tmp_path / "undisturbed")[1]
    flip(victim)

    def refused(path, **options):
        raise PermissionError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "unlink", refused)
    assert call("verify", "--cache", tmp_path / "undisturbed") == 2
    out, err = capsys.readouterr()
    assert f"cannot be removed: {victim} (Read-only file system)" in out
    assert "1 of 1 damaged files cannot be removed; remove them as the user who owns them" in err


def test_all_of_an_unfinished_store_is_looked_at(photos, tmp_path, undisturbed, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(extracting, "CHECKED_BYTES", 0)
    home = tmp_path / "undisturbed"
    first, *_, last, _ = shards(home)
    last.unlink()
    flip(first)
    backbone = FakeBackbone()
    extract(photos, home, backbone, **SLIDE)
    assert backbone.calls == CALLS[0] + CALLS[-2]
    assert (
        f"damaged: {first}: its features have changed since they were written; it will be recomputed"
        in capsys.readouterr().err
    )
    assert content(home) == undisturbed


def test_features_of_an_older_version_are_named_and_recomputed(photos, tmp_path, monkeypatch, capsys):  # noqa: F811
    home = tmp_path / "cache"
    with monkeypatch.context() as patch:
        for module in (store, cachefolder):
            patch.setattr(module, "FORMAT", store.FORMAT - 1)
        extract(photos, home)
    (old,) = home.iterdir()
    (shard,) = shards(home)
    shard.write_bytes(b"of another kind")
    (old / "used").unlink()  # still older versions have none
    capsys.readouterr()
    extract(photos, home, size=12)
    assert "older version" not in capsys.readouterr().err  # it holds other squares
    backbone = FakeBackbone()
    extract(photos, home, backbone)
    assert backbone.calls > 0
    said = f"{old} was written by an older version and will be recomputed; to free its"
    assert said in (err := capsys.readouterr().err)
    assert f"python -m smooseg_fast.cache rm {old.name[:8]}" in err
    assert call("ls", "--cache", home) == 0
    assert re.search(rf"^{old.name[:8]} .* older version$", capsys.readouterr().out, re.MULTILINE)
    assert call("verify", "--cache", home) == 0
    assert f"written by an older version, and not read: {old.name[:8]}; " in capsys.readouterr().out
    assert shard.exists()
    assert not (old / "used").exists()  # to look is not to use


# ls, rm


@pytest.fixture
def three(photos, tmp_path):  # noqa: F811
    """Stores of 8, 12 and 16 pixels, in a folder with other things; the first was used last -> their folders."""
    home = tmp_path / "cache"
    (home / "notes").mkdir(parents=True)
    (home / "notes" / "shard-00000.safetensors").write_text("mine")
    found = []
    for days, size in ((0, 8), (2, 12), (40, 16)):
        before = set(home.iterdir())
        extract(photos, home, size=size)
        (new,) = set(home.iterdir()) - before
        os.utime(new / "used", times=(time.time() - 86_400 * days,) * 2)
        found.append(new)
    return found


def names(home):
    return {path.name for path in home.iterdir()} - {"notes"}


def test_ls_shows_what_there_is(three, photos, capsys):  # noqa: F811
    home, stamps = three[0].parent, [(path / "used").stat().st_mtime for path in three]
    (three[0] / "shard-00000.safetensors").rename(three[0] / "shard-00001.safetensors")  # a hole
    features = extract(photos, home, size=12)
    assert call("ls", "--cache", home) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["key", "dataset", "backbone", "size", "crops", "images", "GB", "last", "used", "state"]
    table = {line.split()[0]: line for line in lines[1:4]}
    assert set(table) == {path.name[:8] for path in three}
    assert re.search(r"photos +fake +8 +center +10 +0\.00 .* partial, 0 %$", table[three[0].name[:8]])
    assert table[three[1].name[:8]].endswith(" complete, in use")
    assert table[three[2].name[:8]].endswith(time.strftime(" %Y-%m-%d %H:%M  complete", time.localtime(stamps[2])))
    assert lines[3].startswith(three[2].name[:8])  # the last used first
    assert (three[2] / "used").stat().st_mtime == stamps[2]  # to look is not to use
    assert (three[1] / "used").stat().st_mtime > stamps[1] + 86_400
    assert re.fullmatch(rf"[\d.]+ kB in {re.escape(str(home))}", lines[5])
    assert len(features) == 8
    assert call("ls", "--cache", home / "nowhere") == 0
    assert "holds no features" in capsys.readouterr().out


def column(out, name):
    """Return the cells below a word of the first line, by key."""
    head, *lines = out.split("\n\n")[0].splitlines()
    place = head.index(name)
    return {line.split()[0]: line[place:].split()[0] for line in lines}


@pytest.mark.parametrize(
    ("name", "values", "changes"),
    [
        ("precision", ["float32", "bfloat16"], {}),
        ("weights", ["f00d", "beef"], {}),
        ("resample", ["nearest", "bilinear"], {"resample": "bilinear"}),
        ("mirror", ["False", "True"], {"mirror": True}),
        ("scale", ["fit", "native"], {"scale": ("native",)}),
        ("margin", ["0", "4"], {"margin": 4}),
        ("batch", ["3", "2"], {"batch_size": 2}),
        ("files", None, {}),
    ],
)
def test_ls_tells_what_differs_between_rows_of_equal_settings(photos, tmp_path, capsys, name, values, changes):  # noqa: F811
    home, backbone, found = tmp_path / "cache", FakeBackbone(), []
    extract(photos, home, size=12)  # nothing to be told apart from
    assert call("ls", "--cache", home) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith(" state")
    for turn in (0, 1):
        if turn:
            backbone.precision = "bfloat16" if name == "precision" else backbone.precision
            backbone.digest = "beef" if name == "weights" else backbone.digest
        if turn and name == "files":
            os.utime(photos / "0.png", times=(1, 1))
        before = set(home.iterdir())
        extract(photos, home, backbone, **(changes if turn else {}))
        found += [path.name[:8] for path in set(home.iterdir()) - before]
    capsys.readouterr()
    assert call("ls", "--cache", home) == 0
    out = capsys.readouterr().out
    told = column(out, name)
    assert len(found) == len(told) - 1 == 2
    assert told[found[0]] != told[found[1]]
    if values:
        assert [told[key] for key in found] == values
        assert set(cache.DETAILS) & set(out.splitlines()[0].split()) == {name}


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"images": "ten", "size": [1], "dataset": "a\\u001b[31m\\nb", "format": 2}']
)
def test_ls_of_a_store_whose_description_is_not_ours(three, capsys, content):
    (three[1] / "meta.json").write_text(content)
    assert call("ls", "--cache", three[0].parent) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert len([line for line in out.splitlines() if line.startswith(tuple(path.name[:8] for path in three))]) == 3


def test_rm_by_key_by_age_and_everything(three, capsys):
    home = three[0].parent
    assert call("rm", three[1].name[:6].upper(), "--cache", home) == 0
    assert names(home) == {three[0].name, three[2].name}
    out = capsys.readouterr().out
    assert re.match(rf"removed photos, {three[1].name[:8]}: [\d.]+ kB\nfreed [\d.]+ kB in ", out)
    assert call("rm", "--older", "30", "--cache", home) == 0
    assert names(home) == {three[0].name}
    (three[0] / "notes.txt").write_text("mine")
    assert call("rm", "--all", "--cache", home) == 0
    assert [path.name for path in three[0].iterdir()] == ["notes.txt"]
    assert (home / "notes" / "shard-00000.safetensors").exists()


def test_rm_leaves_what_is_in_use(three, photos, capsys):  # noqa: F811
    home, features = three[0].parent, extract(photos, three[0].parent, size=12)
    before = features.load()
    assert call("rm", "--all", "--cache", home) == 2
    assert f"error: {three[1].name[:8]}: in use by a run, and not removed" in capsys.readouterr().err
    assert names(home) == {three[1].name}
    shutil.rmtree(three[1])  # by hand it goes, and harms nobody
    assert (features.load() == before).all()
    features.close()
    extract(photos, home, size=12)
    assert call("rm", "--all", "--cache", home) == 0
    assert names(home) == set()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["rm"], "rm: say what to remove, in one way: KEY ..., --older DAYS or --all"),
        (["rm", "--all", "--older", "3"], "rm: say what to remove, in one way"),
        (["rm", "--older", "-1"], "--older: must be at least 0, got -1.0"),
        (["rm", "--older", "nan"], "--older: must be at least 0, got nan"),
        (["rm", "xyz"], "xyz: no store has this key; python -m smooseg_fast.cache ls shows the keys in"),
        (["rm", ""], "KEY: is empty"),
        (["verify", "xyz"], "xyz: no store has this key"),
        (["lss"], "lss: is not a command of python -m smooseg_fast.cache; did you mean ls"),
    ],
)
def test_what_is_refused(three, capsys, args, message):
    home = three[0].parent
    assert call(*args, *(["--cache", home] if args else [])) == 2
    assert f"error: {message}" in capsys.readouterr().err
    assert len(names(home)) == 3


# the limit


def test_room_is_made_by_removing_the_longest_unused(three, photos, capsys):  # noqa: F811
    home = three[0].parent
    sizes = [cachefolder.StoreFolder(path).nbytes for path in three]
    features = extract(
        photos, home, size=12
    )  # in use: neither this, nor that of 16 pixels, which was used longer ago, has to be last
    os.utime(three[1] / "used", times=(0, 0))
    capsys.readouterr()
    extract(photos, home, size=20, limit=10 * sum(sizes))
    assert len(names(home)) == 4
    features_24 = 6 * 6 * 5 * 2 * 8
    extract(photos, home, size=24, limit=sum(each.nbytes for each in CacheFolder(home).stores()) + features_24)
    assert three[2].name not in names(home)
    assert {three[0].name, three[1].name} < names(home)
    assert f"removed: features of photos, {three[2].name[:8]} (" in capsys.readouterr().err
    extract(photos, home, size=28, limit=1)
    assert three[1].name in names(home)  # in use
    assert len(names(home)) == 2
    assert re.search(
        r"warning: .* is [\d.]+ kB above --cache-limit 0\.0 kB; everything else in it is in use",
        capsys.readouterr().err,
    )
    assert features.load().any()


def test_what_cannot_be_removed_ends_no_run(three, photos, small_shards, monkeypatch, capsys):  # noqa: F811
    plain = Path.unlink

    def forbidden(path, **options):
        if path.parent == three[2]:
            raise PermissionError(13, "Permission denied")
        plain(path, **options)

    monkeypatch.setattr(Path, "unlink", forbidden)
    assert len(extract(photos, three[0].parent, size=24, limit=1)) == 8
    assert capsys.readouterr().err.count("above --cache-limit") == 1  # and not for each of four shards
    assert names(three[0].parent) > {three[2].name}
    assert len(names(three[0].parent)) == 2
    assert call("rm", three[2].name, "--cache", three[0].parent) == 2
    assert (
        f"error: {three[2]}: cannot be removed (Permission denied); remove it as the user who owns it"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("text", "size"),
    [("50GB", 50e9), ("1.5 TiB", 1.5 * 2**40), ("500mb", 5e8), (".5GB", 5e8), ("8kB", 8000), ("2KiB", 2048)],
)
def test_sizes(text, size):
    assert parse_size(text, "--cache-limit") == size


@pytest.mark.parametrize(
    "text", ["", "50", "GB", "0GB", "-3GB", "50 parsecs", "1e3GB", "50GBB", "nan", "0.0000000001kB"]
)
def test_what_is_no_size(text):
    with pytest.raises(
        UserError, match=r"--cache-limit .*: no size; give a number above 0 with its unit, such as 50GB"
    ):
        parse_size(text, "--cache-limit")
