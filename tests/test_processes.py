"""Several processes: each learns whole heads, one writes and speaks, and all end together."""

import contextlib
import io
import itertools
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from PIL import Image
from test_evaluation import made_up_labels
from test_extracting import Short
from test_store import FakeBackbone
from test_trainer import SMALL, call, files

from smooseg_fast import command, similarity, train
from smooseg_fast.backbones.filterbank import Filterbank
from smooseg_fast.datasets import open_dataset
from smooseg_fast.datasets.cutting import Cutting
from smooseg_fast.datasets.folder import open_folder
from smooseg_fast.datasets.images import ImageError
from smooseg_fast.errors import UserError
from smooseg_fast.features import store
from smooseg_fast.features.extract import open_or_extract, require_same_images
from smooseg_fast.features.job import FeatureOptions, Job
from smooseg_fast.features.store import read_shard
from smooseg_fast.learn import loop, monitors
from smooseg_fast.learn.shares import Shares
from smooseg_fast.learn.trainer import require_same_state
from smooseg_fast.measure.confusion import LabelSquares
from smooseg_fast.segment.checkpoint import read_training_state
from smooseg_fast.segment.model import Head, Heads
from smooseg_fast.system import processes as joining
from smooseg_fast.system.processes import ALONE, Processes, joined
from smooseg_fast.system.signals import Interrupted

CPU = torch.device("cpu")

# two processes that work for these tests


def serve(rank, port, pipe):
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    with joined() as processes:
        while (job := pipe.recv()) is not None:
            function, args = job
            try:
                pipe.send(function(processes, *args))
            except Exception as error:
                pipe.send(error)
                raise


@pytest.fixture(autouse=True)
def one_thread():
    """Give this process the threads of those that it is compared with: sums depend on them in their last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pair():
    """Call a function of this file in both processes, with the processes first; -> what each returned."""
    context = multiprocessing.get_context("forkserver")  # one process imports for both
    context.set_forkserver_preload(["torch.distributed", "smooseg_fast.train", "smooseg_fast.learn.trainer"])
    ends = [context.Pipe() for _ in range(2)]
    port = free_port()
    workers = [
        context.Process(target=serve, args=(rank, port, there), daemon=True) for rank, (_, there) in enumerate(ends)
    ]
    for worker in workers:
        worker.start()

    def both(function, *args):
        for here, _ in ends:
            here.send((function, args))
        results = [here.recv() if here.poll(60) else TimeoutError("no answer") for here, _ in ends]
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    yield both
    for here, _ in ends:  # to both before either is waited for, because they end together
        with contextlib.suppress(BrokenPipeError):
            here.send(None)
    for worker in workers:
        worker.join(10)
        worker.kill()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# whole heads


@pytest.mark.parametrize("size", range(1, 8))
def test_heads_are_shared_out_in_order(size):
    for heads in range(1, 8):
        shares = [Shares(heads, Processes(rank, size)) for rank in range(size)]
        parts = [list(range(heads))[share.part] for share in shares]
        assert list(itertools.chain(*parts)) == list(range(heads))
        lengths = [len(part) for part in parts]
        assert lengths == shares[0].lengths
        assert max(lengths) - min(lengths) <= 1
        assert lengths == sorted(lengths, reverse=True)  # the first process always has a head


def gathered(processes, heads):
    """Heads and a state [H,...] of all, cut and put together again; with the first process's own values where there is
    no head axis.
    """
    shares = Shares(heads, processes)
    state = Heads([Head(6, 3, 4, seed) for seed in range(heads)]).state_dict()
    losses = {"total": torch.arange(heads) + 0.5, "mean": torch.tensor([3.0, 4.0]), "step": torch.tensor(7)}
    part = shares.of(state | losses)
    whole = shares.everywhere(part if len(part["student"]) else {})
    same = all(torch.equal(whole[name], value) for name, value in state.items())
    return same, {name: whole[name].tolist() for name in losses}


@pytest.mark.parametrize("heads", [1, 2, 5])
def test_heads_are_put_together_again(pair, heads):
    losses = {"total": [head + 0.5 for head in range(heads)], "mean": [3.0, 4.0], "step": 7}
    assert gathered(ALONE, heads) == (True, losses)
    assert pair(gathered, heads) == [(True, losses)] * 2


def learn_in(processes, place, args):
    """`smooseg_fast.train` in a folder, printing nothing; -> what it printed."""
    os.chdir(place)
    os.environ["XDG_CACHE_HOME"] = str(place / "cache")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        train.main([str(arg) for arg in args], processes)
    return printed.getvalue()


def close(one, two, rel=1e-5):
    """The runs in two folders, to rounding."""
    assert {path.name for path in Path(one).rglob("*")} == {path.name for path in Path(two).rglob("*")}
    for line, other in zip(open(f"{one}/metrics.jsonl"), open(f"{two}/metrics.jsonl"), strict=True):
        record, other = json.loads(line), json.loads(other)
        assert record.pop("head") == other.pop("head")
        assert record == pytest.approx(other, rel=rel, abs=rel)
    states = [safetensors.torch.load_file(f"{out}/training.safetensors") for out in (one, two)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=rel, atol=rel, msg=name)


def test_a_process_without_a_head_changes_nothing(pair, labelled, tmp_path):
    """Bit for bit; the second process makes features and counts labels."""
    args = ["--data", "set", *SMALL, "--granularity", "0.06"]
    learn_in(ALONE, tmp_path, [*args, "--out", "one", "--cache", "a"])
    printed, _ = pair(learn_in, tmp_path, [*args, "--out", "two", "--cache", "b"])
    assert "processes  2: all share features and evaluation; heads learnt by each: 1, 0\n" in printed
    assert weights("one") == weights("two")
    assert open("one/metrics.jsonl").read() == open("two/metrics.jsonl").read()
    assert json.load(open("one/report.json")) == json.load(open("two/report.json"))
    assert files("a") == files("b")


def weights(out):
    """The run's state as bytes by name, without its settings, which have the folder's name."""
    state = safetensors.torch.load_file(f"{out}/training.safetensors")
    return {name: value.numpy().tobytes() for name, value in state.items()}


def test_two_processes_learn_the_heads_of_one(pair, labelled, tmp_path):
    args = ["--data", "set", *SMALL, "--granularity", "0.06", "0.1", "-0.05"]
    expected = learn_in(ALONE, tmp_path, [*args, "--out", "one"])
    printed, _ = pair(learn_in, tmp_path, [*args, "--out", "two"])

    def shape(text):  # the first word of each line
        return [line.split()[0] for line in text.splitlines() if not line.startswith("processes")]

    assert "processes  2: all share features and evaluation; heads learnt by each: 2, 1\n" in printed
    assert shape(printed) == shape(expected)
    close("one", "two")
    one, two = (json.load(open(f"{out}/report.json")) for out in ("one", "two"))
    assert {name: head["scores"] for name, head in one["heads"].items()} == {
        name: head["scores"] for name, head in two["heads"].items()
    }


def test_a_run_resumes_with_any_number_of_processes(pair, folder, tmp_path, monkeypatch):
    args = ["--data", "photos", *SMALL, "--granularity", "0.06", "0.1", "-0.05", "--prototypes", "3"]
    learn_in(ALONE, tmp_path, [*args, "--out", "whole"])
    step, calls = loop.train_step, []

    def stopped(*args, **options):
        calls.append(1)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        return step(*args, **options)

    monkeypatch.setattr(loop, "train_step", stopped)
    assert call(*args, "--out", "cut") == 130
    assert read_training_state("cut/training.safetensors").step == 4
    printed, _ = pair(learn_in, tmp_path, [*args, "--out", "cut"])
    assert "resume     from step 4 of 6" in printed
    close("whole", "cut")


def learn_drifting(processes, place, args):
    """Learn as if every head drifted from the first line of metrics on."""
    plain, monitors.drifts = monitors.drifts, lambda information: True
    try:
        return learn_in(processes, place, args)
    finally:
        monitors.drifts = plain


def test_on_drift_stop_ends_all_at_one_step(pair, labelled, tmp_path):
    args = ["--data", "set", *SMALL, "--granularity", "0.06", "0.1", "--out", "out", "--on-drift", "stop"]
    printed, _ = pair(learn_drifting, tmp_path, [*args, "--steps", "50", "--log-every", "5"])
    assert "stop       at step 5 of 50, as --on-drift stop asks: every head drifts" in printed
    assert read_training_state("out/training.safetensors").step == 5
    assert len(json.load(open("out/report.json"))["heads"]) == 2


def test_a_stream_of_two(pair, folder, tmp_path):
    """One process has the head, and both enter every window."""
    args = ["--data", "photos", *SMALL, "--granularity", "0.06", "--prototypes", "3", "--steps", "8"]
    args += ["--cache-limit", "80kB"]
    learn_in(ALONE, tmp_path, [*args, "--out", "one", "--cache", "a"])
    pair(learn_in, tmp_path, [*args, "--out", "two", "--cache", "b"])
    assert read_training_state("two/training.safetensors").windows == (3, 2)
    assert weights("one") == weights("two")
    assert open("one/metrics.jsonl").read() == open("two/metrics.jsonl").read()


# exchanges


def exchanges(processes):
    rank = processes.rank
    return {
        "sum": processes.sum(torch.tensor([2**62 - 1, rank])).tolist(),
        "largest": processes.largest(rank),
        "decide": processes.decide(rank == 0),
        "all": processes.all(("of", rank)),
        "error": [str(error) for error in processes.all(ImageError(f"{rank}.png", "torn"))],
    }


def test_exchanges(pair):
    found = pair(exchanges)
    assert found[0] == found[1]
    assert found[0].pop("error")[1].startswith("1.png: torn; copy it again")
    assert found[0] == {
        "sum": [2**63 - 2, 1],
        "largest": 1,
        "decide": True,
        "all": [("of", 0), ("of", 1)],
    }


@pytest.mark.parametrize("alone", [0, 16])  # the one label of all belongs to the first process, or to the second
def test_one_label_is_enough_wherever_it_is(pair, alone):
    assert [found.sum() for found in pair(count_one, alone)] == [400, 400]


def count_one(processes, alone):
    made = made_up_labels(20, 20, classes=1, only=(alone,))
    codes = torch.ones(20, 16, 6)
    return LabelSquares(made, made, Cutting(size=20), processes).confusion(lambda index: codes[index], torch.ones(1, 6))


def confusion(processes):
    g = torch.Generator().manual_seed(0)
    codes, prototypes = torch.randn(50, 16, 6, generator=g), torch.randn(5, 6, generator=g)
    made = made_up_labels(50, 20)
    return LabelSquares(made, made, Cutting(size=20), processes).confusion(lambda index: codes[index], prototypes)


def test_confusion_counts_sum_exactly(pair):
    expected = confusion(ALONE)
    assert expected.sum() > 10_000
    for found in pair(confusion):
        np.testing.assert_array_equal(found, expected)


# features


def extract(processes, photos, cache, shard_bytes, settings):
    before, store.SHARD_BYTES = store.SHARD_BYTES, shard_bytes
    backbone = FakeBackbone()
    try:
        options = FeatureOptions(size=8, cache=cache, batch_size=3, processes=processes, **settings)
        made = open_or_extract(open_dataset(photos, "train"), backbone, options)
    finally:
        store.SHARD_BYTES = before
    return backbone.calls, made.names, made.skipped, made.rows(range(len(made))).numpy()


@pytest.fixture
def photos(tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "photos"
    folder.mkdir()
    for number, size in enumerate(
        [(8, 8), (8, 16), None, (30, 10), (9, 9), (12, 40), (8, 8), (16, 9), (11, 13), (9, 8), None]
    ):
        file = folder / f"{number:02d}.png"
        if size is None:
            file.write_bytes(b"no image")
        else:
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file)
    return folder


SETTINGS = [{"crops": "slide"}, {"mirror": True}, {"crops": "tiles", "scale": ("2", "1")}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 100], ids="{} rows a shard".format)
def test_the_store_is_the_same_to_the_byte(pair, photos, tmp_path, settings, rows):
    """The backbone's features tell the size of their batch and the column of each patch."""
    shard_bytes = rows * 4 * 5 * 2
    calls, names, skipped, expected = extract(ALONE, photos, tmp_path / "one", shard_bytes, settings)
    together = pair(extract, photos, tmp_path / "two", shard_bytes, settings)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert sum(found[0] for found in together) == calls
    if rows < 100:  # otherwise there is a single shard, which one process makes
        assert min(found[0] for found in together) >= calls // 4  # both had their share
    for _, *found in together:
        assert found[:2] == [names, skipped]
        np.testing.assert_array_equal(found[2], expected)
    shards = sorted((tmp_path / "two").glob("*/shard*"))
    shards[0].write_bytes(b"damaged")
    shards[-1].unlink()
    again = pair(extract, photos, tmp_path / "two", shard_bytes, settings)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert sum(found[0] for found in again) <= calls


def extract_short(processes, photos, cache, room):
    """An image a shard; memory for `room` squares in the last process, and for more in others."""
    before, store.SHARD_BYTES = store.SHARD_BYTES, 7 * 4 * 5 * 2
    try:
        backbone = Short(room if processes.rank == processes.size - 1 else 100, since=1)
        options = FeatureOptions(size=8, crops="slide", cache=cache, batch_size=3, processes=processes)
        open_or_extract(open_dataset(photos, "train"), backbone, options)
    finally:
        store.SHARD_BYTES = before


def test_a_batch_that_does_not_fit_into_one_is_halved_for_all_that_follow(pair, photos, tmp_path):
    extract_short(ALONE, photos, tmp_path / "one", 2)
    pair(extract_short, photos, tmp_path / "two", 2)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    batches = [read_shard(path).contents.batch for path in sorted((tmp_path / "two").rglob("shard*"))]
    assert batches == [3] + [1] * 10  # the first image is a single square


class ShortOfWhite(FakeBackbone):
    """Two white squares at once do not fit."""

    def __call__(self, images):
        if len(images) > 1 and images.min() == 255:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().__call__(images)


def extract_white(processes, photos, cache):
    before, store.SHARD_BYTES = store.SHARD_BYTES, 4 * 4 * 5 * 2
    try:
        options = FeatureOptions(size=8, crops="slide", cache=cache, batch_size=3, processes=processes)
        open_or_extract(open_dataset(photos, "train"), ShortOfWhite(), options)
    finally:
        store.SHARD_BYTES = before


def test_batches_are_halved_from_the_shard_on_in_which_one_did_not_fit(pair, photos, tmp_path):
    """The first process makes the shard in front of it at the same time, with batches as before."""
    Image.new("RGB", (16, 8), "white").save(photos / "07.png")
    extract_white(ALONE, photos, tmp_path / "one")
    pair(extract_white, photos, tmp_path / "two")
    assert files(tmp_path / "one") == files(tmp_path / "two")
    batches = [read_shard(path).contents.batch for path in sorted((tmp_path / "two").rglob("shard*"))]
    assert batches == [3] * 7 + [1] * 4


# refusals, and who says them


def test_devices_of_several(monkeypatch):
    two = Processes(1, 2, local_rank=1)
    assert two.device("cpu") == "cpu"
    assert ALONE.device("cuda:7") == "cuda:7"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        UserError, match="--device cuda: each of 2 processes needs a CUDA card of its own, and this machine has 1"
    ):
        two.device("cuda")
    for one in ("mps", "cuda:1"):
        with pytest.raises(UserError, match=f"--device {one}: each of 2 processes needs a CUDA card .*; give cuda"):
            two.device(one)


def test_a_state_that_only_one_process_finds():
    class Other(Processes):
        def all(self, number):
            return [7, number]

    with pytest.raises(
        UserError, match=r"--out out: the processes find the steps \[7, 0\] there; give a shared folder"
    ):
        require_same_state(None, Path("out"), Other(1, 2))


def test_processes_that_see_different_images_say_so(folder):
    class Other(Processes):
        def all(self, value):
            return [value, ("another key", 7)]

    job = Job(open_folder(folder, "train"), Filterbank(), FeatureOptions(size=64, processes=Other(0, 2)))
    with pytest.raises(UserError, match=r"the processes see different images or weights in photos \(\d+, 7 images\)"):
        require_same_images(job)


def test_a_process_ends_with_its_parent():
    code = (
        "from smooseg_fast.system import processes; import time; processes.LOOK_S = 0.05; processes.end_with_parent()"
    )
    child = f"{code}; print('ready', flush=True); time.sleep(60); print('late')"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    running = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert running.stdout.readline() == "ready\n"
    running.kill()
    assert running.stdout.read() == ""  # until the child has closed it too


def test_one_process_says_why_all_end(monkeypatch, capsys):
    kept = dist.HashStore()
    group = [Processes(rank, 2, store=kept) for rank in range(2)]

    def ends(processes, main):
        monkeypatch.setattr(joining, "joined", lambda: contextlib.nullcontext(processes))
        return command.run(main, [])

    assert [ends(each, similarity.main) for each in group] == [2, 2]
    assert capsys.readouterr().err == "error: torchrun: this command runs in one process, not 2; start it alone\n"


def test_a_signal_that_the_first_process_did_not_live_to_tell_of(monkeypatch, capsys):
    def stopped(args):
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(joining, "PATIENCE_S", 0.1)
    monkeypatch.setattr(Processes, "first_heard", contextlib.nullcontext)
    monkeypatch.setattr(joining, "joined", lambda: contextlib.nullcontext(Processes(1, 1, store=kept)))
    kept = dist.HashStore()
    assert command.run(stopped, []) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "interrupted; what was finished is kept\nresume     python -m test_processes\n"
    kept = dist.HashStore()
    assert Processes(0, 2, store=kept).last_word()
    assert command.run(stopped, []) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == ""


def test_one_voice(capsys):
    for rank in range(2):
        with Processes(rank, 2).first_heard():
            print(f"out {rank}")
            print(f"err {rank}", file=sys.stderr)
    assert capsys.readouterr() == ("out 0\n", "err 0\n")


# whole runs


def torchrun(*args, **options):
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "smooseg_fast.train",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        [*words, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )
    STARTED.append(running)
    return running


STARTED = []


@pytest.fixture(autouse=True)
def no_process_outlives_its_test():
    yield
    while STARTED:
        running = STARTED.pop()
        if running.poll() is None:  # a test failed while it ran; SIGTERM reaches its processes, too
            running.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.wait(timeout=20)
            running.kill()


LONG = [*SMALL, "--granularity", "0.1", "0.2", "--steps", "100000", "--checkpoint-every", "5", "--out", "out"]


def process_of(launcher, rank):
    """The process id of a rank."""
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, IndexError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher and f"RANK={rank}\0" in (folder / "environ").read_text().replace(
                "LOCAL_RANK", ""
            ).replace("_RANK", ""):
                return int(folder.name)
    raise LookupError(f"no process has rank {rank}")


def until_saved(running, step=0):
    """Waits until a state beyond `step` is there."""

    def saved():
        with contextlib.suppress(UserError):  # it was replaced while it was read
            return read_training_state("out/training.safetensors").step
        return -1

    while not Path("out/training.safetensors").exists() or saved() <= step:
        assert running.poll() is None, running.communicate()
        time.sleep(0.1)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found through /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_the_others_and_ctrl_c_saves(folder, rank, monkeypatch, capsys):
    args = ["--data", folder, *LONG]
    running = torchrun(*args)
    until_saved(running)
    os.kill(process_of(running.pid, rank), signal.SIGKILL)
    out, err = running.communicate(timeout=60)
    assert running.returncode not in (0, None)
    lines = [line for line in err.splitlines() if "error: " in line]
    assert len(lines) == 1, err
    assert "error: another process of this run ended, or cannot be reached" in lines[0]
    saved = read_training_state("out/training.safetensors").step
    assert saved % 5 == 0
    if rank == 0:
        return

    running = torchrun(*args)
    until_saved(running, saved)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert f"resume     from step {saved} of 100000" in out
    now = read_training_state("out/training.safetensors").step
    again = f"resume     torchrun --nproc-per-node=2 -m smooseg_fast.train --data {folder}"
    assert err.count(f"interrupted; step {now} of 100000 is saved, whole, in out\n{again}") == 1
    assert "error: " not in err

    step, calls = loop.train_step, []

    def stop_soon(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return step(*args, **options)

    monkeypatch.setattr(loop, "train_step", stop_soon)
    assert call(*args) == 130
    assert f"resume     from step {now} of 100000" in capsys.readouterr().out
    assert read_training_state("out/training.safetensors").step == now + 3
