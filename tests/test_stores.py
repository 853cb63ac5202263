"""Images and predictions in stores, on web servers and in archives: the same data sets and masks as on a disk."""

import csv
import functools
import http.server
import io
import json
import pickle
import signal
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image
from test_trainer import SMALL
from textures import draw

from smooseg_fast import UserError, evaluate, exporting, fit, predict, train
from smooseg_fast.command import run
from smooseg_fast.datasets import open_dataset, open_splits
from smooseg_fast.datasets.images import ImageError, read_image
from smooseg_fast.datasets.shards import expanded, pair_of
from smooseg_fast.errors import WriteError
from smooseg_fast.segment.segmenter import Segmenter
from smooseg_fast.system import outfolder, patience, signals, stores
from smooseg_fast.system.files import write_json
from smooseg_fast.system.outfolder import Journal, mark_as_ours
from smooseg_fast.system.patience import StoreError
from smooseg_fast.system.stores import Remote, entries, is_url, place


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(patience, "WAIT_S", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def memory():
    """An empty store."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    stores._recent.clear()
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def encoded(pixels, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return buffer.getvalue()


PHOTOS = [draw(30 + number) for number in range(4)]


def upload(system, folder, labels=True):
    for number, (image, label) in enumerate(PHOTOS):
        system.pipe_file(f"{folder}/images/{number}.png", encoded(image))
        if labels:
            system.pipe_file(f"{folder}/labels/{number}.png", encoded(label))


@pytest.fixture
def served(tmp_path):
    """A folder, and its address on a web server of this machine."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


# names


@pytest.mark.parametrize(
    ("url", "name", "stem", "below", "parent"),
    [
        ("s3://bucket/a/b.png", "b.png", "b", "s3://bucket/a/b.png/c", "s3://bucket/a"),
        ("s3://bucket", "bucket", "bucket", "s3://bucket/c", "s3://"),
        ("memory://", "", "", "memory://c", "memory://"),
        ("zip://::/x/y.zip", "y.zip", "y", "zip://c::/x/y.zip", "zip://::/x/y.zip"),
        ("zip://a/b.png::s3://k/y.zip", "b.png", "b", "zip://a/b.png/c::s3://k/y.zip", "zip://a::s3://k/y.zip"),
        ("https://h/a%20b.jpg?sign=x/y.z", "a b.jpg", "a b", None, None),
    ],
)
def test_the_parts_of_a_url(url, name, stem, below, parent):
    remote = Remote(url, 5, "stamp", 7)
    assert (remote.name, remote.stem) == (name, stem)
    assert below is None or (remote / "c", remote.parent) == (below, parent)
    again = pickle.loads(pickle.dumps(remote))
    assert (again, again.size, again.stamp, again.offset) == (url, 5, "stamp", 7)


def test_what_is_a_url():
    assert is_url("s3://b")
    assert not any(map(is_url, ("C:\\x", "C:/x", "a/b", Path("s3://b"), "x.tar")))
    assert place("file:///a%20b") == Path("/a b")
    assert place("~") == Path.home()


def test_local_paths_never_import_fsspec(tmp_path):
    """`torch.load` and others may; reading images does not."""
    code = (
        "import sys; sys.modules['fsspec'] = None\n"
        "from smooseg_fast.datasets import open_dataset\n"
        "import numpy as np; from PIL import Image\n"
        f"Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save({str(tmp_path / 'a.png')!r})\n"
        f"print(open_dataset({str(tmp_path)!r}, 'train').image(0).shape)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "(9, 9, 3)\n", done.stderr


# listing and reading


def same(dataset, photos=PHOTOS, labels=True):
    assert len(dataset) == len(photos)
    for index, (image, label) in enumerate(photos):
        assert np.array_equal(dataset.image(index), image)
        assert not labels or np.array_equal(dataset.label(index), label)


def test_a_folder_with_splits_in_a_store(memory):
    upload(memory, "/set/train")
    upload(memory, "/set/val")
    memory.pipe_file("/set/classes.txt", b"left\nright\n")
    memory.pipe_file("/set/train/images/.hidden.png", b"")
    train_set, val = open_splits("memory://set")
    assert (train_set.name, val.name, val.held_out, train_set.class_names) == (
        "set/train",
        "set/val",
        True,
        ("left", "right"),
    )
    same(train_set)
    same(val)
    before = train_set.fingerprint()
    assert open_dataset("memory://set/", "train").fingerprint() == before
    memory.pipe_file("/set/train/images/2.png", encoded(PHOTOS[0][0]))
    assert open_dataset("memory://set", "train").fingerprint() != before
    single = open_dataset("memory://set/train/images/1.png", "train")
    assert single.names == ("1.png",)
    same(single, PHOTOS[1:2], labels=False)


def test_what_smooseg_wrote_into_a_store_is_not_read(memory):
    upload(memory, "/set", labels=False)
    memory.pipe_file("/set/out/masks/0.png", encoded(PHOTOS[0][1]))
    mark_as_ours(Remote("memory://set/out"), "masks")
    assert len(open_dataset("memory://set", "train")) == 4


@pytest.mark.parametrize("url", ["zip://set::{}", "{}"])
def test_a_zip_archive(tmp_path, memory, url):
    archive = tmp_path / "photos.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for number, (image, label) in enumerate(PHOTOS):
            file.writestr(f"set/images/{number}.png", encoded(image))
            file.writestr(f"set/labels/{number}.png", encoded(label))
    same(open_dataset(url.format(archive), "train"))
    memory.pipe_file("/a/photos.zip", archive.read_bytes())
    same(open_dataset(url.format("memory://a/photos.zip"), "train"))


def test_a_web_server(served):
    pytest.importorskip("aiohttp")
    folder, address = served
    (folder / "in ner").mkdir()
    for name, (image, _) in zip(("a.png", "in ner/ä b.png"), PHOTOS):
        (folder / name).write_bytes(encoded(image))
    dataset = open_dataset(address, "train")
    assert dataset.names == ("a.png", "in ner/ä b.png")
    same(dataset, PHOTOS[:2], labels=False)
    assert np.array_equal(read_image(f"{address}/a.png"), PHOTOS[0][0])
    before = dataset.fingerprint()
    (folder / "a.png").write_bytes(encoded(PHOTOS[3][0][:50]))
    assert open_dataset(address, "train").fingerprint() != before
    with pytest.raises(UserError, match=f"^--data {address}/nope: no such file or folder; check the address$"):
        open_dataset(f"{address}/nope", "train")


def test_a_web_page_that_lists_nothing_is_one_line(served):
    pytest.importorskip("aiohttp")
    folder, address = served
    (folder / "index.html").write_text("<html>hello</html>")
    with pytest.raises(UserError, match=f"^--data {address}: the server's page there lists no files; give an address"):
        open_dataset(address, "train")


def test_a_private_repository_names_the_login(monkeypatch):
    """The hub says of it that it is not there."""

    def hidden(folder):
        raise FileNotFoundError(2, "Repository Not Found")

    monkeypatch.setattr("smooseg_fast.datasets.listing.entries", hidden)
    with pytest.raises(UserError, match=r"^--data hf://datasets/a/b: no such .* for a private one run hf auth login"):
        open_dataset("hf://datasets/a/b", "train")


# tar shards


def test_braces_and_samples():
    assert list(expanded("a-{08..10}.tar")) == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert list(expanded("{a,b}-{0..1}.tar")) == ["a-0.tar", "a-1.tar", "b-0.tar", "b-1.tar"]
    assert pair_of([".jpg", ".png", ".txt"]) == (".jpg", ".png")
    assert pair_of([".png", ".seg.png"]) == (".png", ".seg.png")
    assert pair_of([".png", ".txt"]) is None
    assert pair_of([".left.jpg", ".right.jpg"]) is None


def write_shards(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(2):
        with tarfile.open(folder / f"s-{shard:03}.tar", "w") as tar:
            for number in (2 * shard, 2 * shard + 1):
                image, label = PHOTOS[number]
                files = {".bmp": encoded(image, "BMP"), ".seg.png": encoded(label), ".txt": b"a caption"}
                for ending, content in files.items():
                    entry = tarfile.TarInfo(f"./{number:04}{ending}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return "s-{000..001}.tar"


def test_tar_shards_on_a_disk_in_a_store_and_on_a_web_server(tmp_path, memory, served, monkeypatch):
    folder, address = served
    pattern = write_shards(folder)
    for shard in range(2):
        memory.pipe_file(f"/shards/s-{shard:03}.tar", (folder / f"s-{shard:03}.tar").read_bytes())
    places = [f"{folder}/{pattern}", f"memory://shards/{pattern}"]
    try:
        import aiohttp  # noqa: F401

        places.append(f"{address}/{pattern}")
    except ImportError:
        pass
    for where in places:
        for _ in range(2):  # the second time by the index in the cache
            dataset = open_dataset(where, "train")
            assert dataset.names == tuple(f"s-00{number // 2}/000{number}.bmp" for number in range(4))
            same(dataset)
        monkeypatch.setattr("smooseg_fast.datasets.shards._entries", None)
        assert open_dataset(where, "train").fingerprint() == dataset.fingerprint()
        monkeypatch.undo()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert len(list((tmp_path / "cache" / "smooseg_fast").glob("tar-*.json"))) == 2 * len(places)
    assert len(open_dataset(f"{folder}/s-001.tar", "train")) == 2
    with pytest.raises(UserError, match=r"^--data .*/s-002.tar: no such file"):
        open_dataset(f"{folder}/s-{{000..002}}.tar", "train")
    Path(folder, "s-001.tar").write_bytes(b"\x1f\x8b" + bytes(2000))
    with pytest.raises(UserError, match=r"^--data .*/s-001.tar: is no whole tar file"):
        open_dataset(f"{folder}/{pattern}", "train")


# what goes wrong


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("memory://nothing/here", "--data memory://nothing/here: no such file or folder; check the address"),
        ("nosuch://a/b", "nosuch://a: nosuch:// is not known; known are "),
        ("zip://a::/no/such.zip", "zip://::/no/such.zip: the archive is not there; check its path"),
        ("zip://such.zip", "zip://such.zip: names no archive; give such.zip, or zip://::such.zip"),
        ("s3://", "s3://: names no bucket; give s3://BUCKET/FOLDER"),
        ("zip://::memory://junk/x.zip", "zip://::memory://junk/x.zip: is no zip archive, or damaged; copy it again"),
        ("memory://junk/x.zip", "zip://::memory://junk/x.zip: is no zip archive, or damaged; copy it again"),
        ("memory://junk", "--data memory://junk: no images in it; looked for "),
    ],
)
def test_an_address_that_leads_nowhere_is_one_line(memory, url, error):
    memory.pipe_file("/junk/x.zip", b"junk")
    with pytest.raises(UserError) as raised:
        open_dataset(url, "train")
    assert str(raised.value).startswith(error)
    assert "\n" not in str(raised.value)


def test_a_protocol_without_its_package_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"^s3://bucket: needs a package that is not installed; pip install s3fs$"):
        open_dataset("s3://bucket/photos", "train")


class Broken:
    """A connection that breaks the first times."""

    def __init__(self, system, monkeypatch, method, times, error=None):
        self.plain, self.left, self.error = getattr(system, method), times, error or OSError("connection reset")
        self.calls = []
        monkeypatch.setattr(system, method, self)

    def __call__(self, path, *args, **options):
        self.calls.append(path)
        if self.left:
            self.left -= 1
            raise self.error
        return self.plain(path, *args, **options)


def test_a_broken_connection_is_tried_again_and_then_is_the_images_own_error(memory, monkeypatch):
    upload(memory, "/set", labels=False)
    broken = Broken(memory, monkeypatch, "cat_file", patience.TRIES - 1)
    assert np.array_equal(read_image("memory://set/images/0.png"), PHOTOS[0][0])
    assert len(broken.calls) == patience.TRIES
    broken.left = patience.TRIES
    with pytest.raises(ImageError) as raised:
        read_image("memory://set/images/1.png")
    why = (
        "cannot be fetched (connection reset, 4 times); "
        "check the address, the connection and your rights, and run the command again"
    )
    assert str(raised.value) == f"memory://set/images/1.png: {why}"
    assert isinstance(raised.value.path, Remote)
    with pytest.raises(ImageError, match=r"^memory://set/images/9.png: is gone since the files were listed; run the"):
        read_image("memory://set/images/9.png")


class NoCredentialsError(Exception):
    """Has the name of botocore's error."""


class Answered(OSError):
    """Has a status in its cause, as s3fs raises what botocore answers."""

    def __init__(self, status):
        super().__init__("Bad Request")
        self.__cause__ = Exception("caused it")
        self.__cause__.response = {"ResponseMetadata": {"HTTPStatusCode": status}}


@pytest.mark.parametrize(
    ("url", "error", "what"),
    [
        ("s3://b/x", NoCredentialsError("Unable to locate credentials"), "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and"),
        ("s3://b/x", Answered(400), "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and"),  # expired, says its HEAD
        ("s3://b/x", Answered(301), "set AWS_DEFAULT_REGION to the region of the bucket"),
        ("s3://b/x", OSError("the region 'us-east-1' is wrong; expecting 'eu-west-1'"), "set AWS_DEFAULT_REGION to"),
        ("s3://b/x", ValueError("Invalid endpoint: 127.0.0.1:9"), "check AWS_ENDPOINT_URL"),
        (
            "gs://b/x",
            OSError("Forbidden: b/o you may not"),
            "run gcloud auth application-default login, or set GOOGLE_",
        ),
        ("gs://b/x", StoreError(5, "Forbidden: b/o you may not, 4 times"), "run gcloud auth application-default"),
        ("hf://datasets/a/b", PermissionError(13, "gated"), "run hf auth login, or set HF_TOKEN"),
        ("az://b/x", Answered(403), "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"),
        ("https://h/x", Answered(403), "check the address, the connection and your rights"),
        ("s3://b/x", OSError("connection reset"), "check the address, the connection and your rights"),
    ],
    ids=str,
)
def test_a_refusal_names_what_to_set(url, error, what):
    assert patience.remedy(url, error).startswith(what)


# the last two: its package repeated the attempt for long, but a timeout is one attempt
@pytest.mark.parametrize(
    ("error", "repeated_s", "times"),
    [
        (NoCredentialsError("none"), 25.0, 1),
        (Answered(400), 25.0, 1),
        (Answered(503), 25.0, patience.TRIES),
        (OSError("Name or service not known"), -1.0, 1),
        (TimeoutError("late"), -1.0, patience.TRIES),
    ],
    ids=str,
)
def test_what_another_try_does_not_change_is_tried_once(memory, monkeypatch, error, repeated_s, times):
    monkeypatch.setattr(patience, "REPEATED_S", repeated_s)
    broken = Broken(memory, monkeypatch, "cat_file", 99, error)
    with pytest.raises(StoreError):
        Remote("memory://set/0.png").read_bytes()
    assert len(broken.calls) == times


def test_a_server_that_says_nothing_is_given_up(memory, monkeypatch):
    monkeypatch.setattr(patience, "PATIENCE_S", -1.0)
    broken = Broken(memory, monkeypatch, "cat_file", 99)
    with pytest.raises(StoreError, match=r"connection reset$"):
        Remote("memory://set/0.png").read_bytes()
    assert len(broken.calls) == 1


def test_a_missing_bucket_is_not_made(memory, monkeypatch):
    monkeypatch.setattr(stores, "BUCKETS", ("memory",))
    Broken(memory, monkeypatch, "pipe_file", 99, FileNotFoundError("The specified bucket does not exist"))
    monkeypatch.setattr(memory, "makedirs", None)
    with pytest.raises(WriteError, match=r"^memory://b/x.json: cannot be written \(The specified bucket does not"):
        write_json(Remote("memory://b/x.json"), {})


def test_a_listing_is_tried_again(memory, monkeypatch):
    """Emptying its cache asks the store, too, as the hub's does."""
    upload(memory, "/set", labels=False)
    broken = Broken(memory, monkeypatch, "invalidate_cache", patience.TRIES - 1)
    assert len(open_dataset("memory://set/images", "train")) == 4
    assert len(broken.calls) >= patience.TRIES


def test_a_file_that_came_short_is_fetched_again(memory, monkeypatch):
    upload(memory, "/set", labels=False)
    (file,) = (file for file, _ in entries(Remote("memory://set/images")) if file.name == "0.png")
    plain, cut = memory.cat_file, [True]
    monkeypatch.setattr(memory, "cat_file", lambda path, **options: plain(path)[: -9 if cut.pop() else None])
    cut.insert(0, False)
    assert np.array_equal(read_image(file), PHOTOS[0][0])
    assert not cut


def test_writing_where_nothing_can_be_written(memory, tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a.zip", "w"):
        pass
    with pytest.raises(WriteError, match=r"^zip://x.json::.*: cannot be written, because it lies in an archive"):
        write_json(Remote(f"zip://x.json::{tmp_path / 'a.zip'}"), {})
    Broken(memory, monkeypatch, "pipe_file", 99, PermissionError(13, "Access Denied"))
    with pytest.raises(WriteError, match=r"^memory://a/x.json: cannot be written \(Access Denied\)"):
        write_json(Remote("memory://a/x.json"), {})


# a journal


def test_a_journal_in_a_store(memory, monkeypatch):
    journal = Journal.at(Remote("memory://out/done.jsonl"))
    assert journal.read() == []
    journal.rewrite([{"n": 0}])
    journal.append({"n": 1})
    assert [record["n"] for record in Journal.at(journal.path).read()] == [0]  # not flushed yet
    journal.flush()
    monkeypatch.setattr(outfolder, "FLUSH_S", 0.0)
    journal.append({"n": 2})
    again = Journal.at(journal.path)
    assert [record["n"] for record in again.read()] == [0, 1, 2]
    again.rewrite(again.read())
    assert memory.find("/out") == ["/out/done.jsonl"]
    assert [record["n"] for record in Journal.at(journal.path).read()] == [0, 1, 2]


# commands


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The checkpoint of a short run on images in a store, whose features are in a cache."""
    root = tmp_path_factory.mktemp("store")
    upload(fsspec.filesystem("memory"), "/set")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        patch.setattr("smooseg_fast.backbones.precision.has_matrix_units", lambda: False)
        patch.setattr("smooseg_fast.backbones.precision.has_dot_products", lambda: False)
        words = ["--data", "memory://set", "--out", str(root / "run"), "--cache", str(root / "cache"), *SMALL]
        assert run(train.main, words) == 0
    return root / "run" / "checkpoint.safetensors"


def call(trained, images, out, *args):
    return run(predict.main, ["--checkpoint", str(trained), "--images", str(images), "--out", str(out), *args])


def test_predictions_from_and_into_a_store_are_those_of_a_disk(trained, memory, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    upload(memory, "/set", labels=False)
    for number, (image, _) in enumerate(PHOTOS):
        (tmp_path / "set" / "only").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "set" / "only" / f"{number}.png")
    memory.pipe_file("/set/images/4.png", b"junk")
    assert call(trained, tmp_path / "set" / "only", "disk") == 0
    assert call(trained, "memory://set/images", "memory://out") == 0
    printed = capsys.readouterr()
    assert "memory://out/masks; memory://out/" in printed.out
    assert "look at    memory://out/sheet.jpg, memory://out/overlays\n" in printed.out
    assert "skipped: memory://set/images/4.png: not an image" in printed.err
    for kind, suffix in (("masks", "png"), ("overlays", "jpg")):
        for number in range(4):
            name = f"{kind}/{number}.{suffix}"
            assert memory.cat_file(f"/out/{name}") == Path("disk", name).read_bytes(), name
    assert json.loads(memory.cat_file("/out/shares.json"))["mean"] == json.load(open("disk/shares.json"))["mean"]
    assert {"sheet.jpg", "groups.json", "predict.json"} <= {Path(file).name for file in memory.find("/out")}
    rows = list(csv.reader(io.StringIO(memory.cat_file("/out/manifest.csv").decode())))
    assert rows[0] == ["image", "mask", "seconds", "error"]
    assert [row[:2] for row in rows[1:5]] == [[f"{number}.png", f"masks/{number}.png"] for number in range(4)]
    assert rows[5][:3] == ["4.png", "", ""]
    assert rows[5][3].startswith("not an image")

    # exports from, into and of a store are those of a disk
    for made in ("coco", "labelstudio"):
        assert run(exporting.main, ["--predictions", "disk", "--format", made]) == 0
        assert run(exporting.main, ["--predictions", "memory://out", "--format", made]) == 0
        assert run(exporting.main, ["--predictions", "memory://out", "--format", made, "--out", "memory://more"]) == 0
    told = capsys.readouterr().out
    assert "written    memory://out/exports/labelstudio.json (" in told
    assert "Add Source Storage, memory://set/images, and" in told
    local, remote, more = (
        json.loads(content)
        for content in (
            Path("disk/exports/coco.json").read_bytes(),
            memory.cat_file("/out/exports/coco.json"),
            memory.cat_file("/more/coco.json"),
        )
    )
    assert (remote["annotations"], remote["images"]) == (local["annotations"], local["images"])
    assert remote == more
    tasks = json.loads(memory.cat_file("/out/exports/labelstudio.json"))
    assert [task["data"]["image"] for task in tasks] == [f"memory://set/images/{number}.png" for number in range(4)]
    assert memory.isfile("/out/exports/labelstudio.xml")

    # the same command has nothing left to do; a mask that went is made again
    before = memory.cat_file("/out/masks/2.png")
    memory.rm_file("/out/masks/2.png")
    seen, plain = [], Segmenter.predict
    monkeypatch.setattr(Segmenter, "predict", lambda *args, **options: seen.append(1) or plain(*args, **options))
    assert call(trained, "memory://set/images", "memory://out") == 0
    assert len(seen) == 1
    assert memory.cat_file("/out/masks/2.png") == before
    assert "3 of 5 images are done in memory://out" in capsys.readouterr().out
    assert call(trained, "memory://set/images", "memory://out", "--refine", "none") == 2
    assert capsys.readouterr().err.startswith("error: --out memory://out: holds another run (refine is")


def test_a_stop_keeps_what_a_store_has_and_a_full_one_is_named(trained, memory, monkeypatch, capsys):
    upload(memory, "/set", labels=False)
    seen, plain = [], Segmenter.predict

    def counting(self, *args, **options):
        seen.append(1)
        if len(seen) == 3:
            signal.raise_signal(signal.SIGINT)
        return plain(self, *args, **options)

    monkeypatch.setattr(Segmenter, "predict", counting)
    monkeypatch.setattr(signals, "PATIENCE_S", 60.0)  # the image under way ends, however busy the machine is
    assert call(trained, "memory://set", "memory://out") == 130
    assert "3 of 4 images are done, in memory://out" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        Broken(memory, patch, "pipe_file", 10**6, OSError("quota exceeded"))
        assert call(trained, "memory://set", "memory://out") == 2
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
        assert "memory://out/predict.json: cannot be written (quota exceeded, 4 times)" in line
    assert call(trained, "memory://set", "memory://out") == 0
    assert len(seen) == 4


def test_features_of_a_store_come_from_the_cache(trained, memory, monkeypatch, capsys):
    upload(memory, "/set")
    words = [
        "--checkpoint",
        str(trained),
        "--data",
        "memory://set",
        "--refine",
        "none",
        "--cache",
        str(trained.parent / "more"),
    ]
    fetched = Broken(memory, monkeypatch, "cat_file", 0)
    assert run(evaluate.main, [*words, "--out", "memory://figures"]) == 0
    assert json.loads(memory.cat_file("/figures/scores.json"))["images"] == 4
    assert memory.isfile("/figures/confusion.png")
    assert sum(path.startswith("/set/images") for path in fetched.calls) == 4  # each once
    assert "extracted  4 squares" in capsys.readouterr().err
    assert run(evaluate.main, [*words, "--out", "memory://figures"]) == 0
    assert "extracted" not in capsys.readouterr().err


def test_a_path_that_must_be_on_a_disk(tmp_path, capsys):
    for main, words in (
        (train.main, ["--out", "memory://run"]),
        (train.main, ["--cache", "s3://b/cache"]),
        (predict.main, ["--checkpoint", "hf://a/b", "--images", "x", "--out", "y"]),
    ):
        assert run(main, words) == 2
        flag, url = words[:2]
        assert capsys.readouterr().err.startswith(f"error: {flag} {url}: lies in a store, and this must be on a disk;")
    with pytest.raises(UserError, match=r"^out memory://run: lies in a store"):
        fit([], out="memory://run")
