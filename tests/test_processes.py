"""Several processes: the same learning as one, one voice, one writer, and an end in common."""

import contextlib
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
import torch
import torch.distributed as dist
from test_evaluation import made_up_labels
from test_extracting import Short
from test_store import FakeBackbone
from test_trainer import SMALL, call, files

from smooseg_fast import command, predict
from smooseg_fast.datasets import open_dataset
from smooseg_fast.datasets.images import ImageError
from smooseg_fast.errors import UserError
from smooseg_fast.features import store
from smooseg_fast.features.extract import open_or_extract
from smooseg_fast.features.job import FeatureOptions
from smooseg_fast.features.store import read_shard
from smooseg_fast.learn import loop
from smooseg_fast.learn import run as steps
from smooseg_fast.learn.loop import Loop
from smooseg_fast.learn.schedule import Schedule, Settings
from smooseg_fast.learn.trainer import require_same_state, require_shares
from smooseg_fast.measure.confusion import LabelSquares, confusion_of
from smooseg_fast.segment.checkpoint import read_checkpoint, read_training_state
from smooseg_fast.segment.model import Head, Heads
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


@pytest.fixture(scope="module")
def pair():
    """Calls a function of this file in both processes, with the processes as its first argument; -> what each returned."""
    context = multiprocessing.get_context("spawn")
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
    for (here, _), worker in zip(ends, workers):
        with contextlib.suppress(BrokenPipeError):
            here.send(None)
        worker.join(10)
        worker.kill()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# one step, one run


def steps_of(processes, parts, part, settings, dtype=torch.float64):
    """Ten steps of two heads on features whose mean closeness differs from batch to batch -> losses by step and the heads, as arrays."""
    g = torch.Generator().manual_seed(0)
    features = torch.randn(20, 12, 10, generator=g) + 2 * torch.randn(20, 1, 10, generator=g) * torch.rand(
        20, 1, 1, generator=g
    )
    heads = Heads([Head(10, 4, 8, seed) for seed in range(2)]).to(dtype)
    thresholds = torch.tensor([[0.1, 0.2], [-0.1, 0.3]])
    schedule = Schedule(20, 8, 5, parts, part)
    run = Loop(heads, features.to(dtype), (12, 10), schedule, thresholds, settings, 1e-3, 5e-3, processes=processes)
    losses = [[value.numpy() for value in run.step(step)] for step in range(10)]
    return losses, {name: value.numpy().copy() for name, value in heads.state_dict().items()}


def share_of_steps(processes, settings):
    return steps_of(processes, processes.size, processes.rank, settings)


@pytest.mark.parametrize("patches", [None, 5])
@pytest.mark.parametrize("relative", [True, False])
def test_two_processes_learn_as_one_with_the_whole_batch(pair, relative, patches):
    settings = Settings(relative, patches=patches)
    losses, heads = steps_of(ALONE, 2, None, settings)
    together = pair(share_of_steps, settings)
    for found_losses, found in together:
        for expected, got in zip(itertools.chain(*losses), itertools.chain(*found_losses)):
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-11)
        for name, value in heads.items():
            np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-9, err_msg=name)
    for name, value in together[0][1].items():
        np.testing.assert_array_equal(value, together[1][1][name])
    # the parts' own M differ, so that with absolute thresholds the result tells whether it was exchanged
    alone = [steps_of(ALONE, 2, part, settings)[0][0][-1] for part in range(2)]
    assert np.abs(alone[0] - alone[1]).max() > 0.01


def test_parts_of_a_batch_are_the_batch():
    settings = Settings(True, patches=4)
    whole, plain = Schedule(23, 8, 1, parts=2), Schedule(23, 8, 1)
    parts = [Schedule(23, 8, 1, parts=2, part=part) for part in range(2)]
    for step in range(20):
        draws = [schedule.draws(step, 9, 6, settings, CPU) for schedule in (whole, plain, *parts)]
        for name, axis in (("rows", 0), ("masks", 1), ("patches", 0)):
            a, b, *slices = (getattr(each, name) for each in draws)
            assert torch.equal(a, b)
            assert torch.equal(a, torch.cat(slices, axis))
        first, second = draws[2].partner, draws[3].partner
        assert torch.equal(draws[0].partner, torch.cat([first, second + 4]))
        for partner in (first, second):
            assert (partner != torch.arange(4)).all()
            assert int(partner.min()) >= 0
            assert int(partner.max()) < 4
    assert Schedule(7, 16, 1, parts=2).batch_size == 6  # as many as there are, and divide


# what is exchanged


def exchanges(processes):
    rank = processes.rank
    held = torch.full((2,), float(rank))
    processes.as_first([held])
    return {
        "mean": [
            value.tolist() for value in processes.mean([torch.tensor(1.0 + rank), torch.full((2, 1), 4.0 * rank)])
        ],
        "sum": processes.sum(torch.tensor([2**62 - 1, rank])).tolist(),
        "largest": processes.largest(rank),
        "as_first": held.tolist(),
        "decide": processes.decide(rank == 0),
        "all": processes.all(("of", rank)),
        "to_first": [
            [x.tolist() for x in each] for each in processes.to_first([torch.ones(rank, 2).half(), torch.tensor(rank)])
        ],
        "error": [str(error) for error in processes.all(ImageError(f"{rank}.png", "torn"))],
    }


def test_exchanges(pair):
    found = pair(exchanges)
    assert found[0].pop("to_first") == [[[], 0], [[[1.0, 1.0]], 1]]
    assert found[1].pop("to_first") == []
    assert found[0] == found[1]
    assert found[0].pop("error")[1].startswith("1.png: torn; copy it again")
    assert found[0] == {
        "mean": [1.5, [[2.0], [2.0]]],
        "sum": [2**63 - 2, 1],
        "largest": 1,
        "as_first": [0.0, 0.0],
        "decide": True,
        "all": [("of", 0), ("of", 1)],
    }


@pytest.mark.parametrize("alone", [0, 16])  # the one label of all belongs to the first process, or to the second
def test_one_label_is_enough_wherever_it_is(pair, alone):
    assert [found.sum() for found in pair(count_one, alone)] == [400, 400]


def count_one(processes, alone):
    made = made_up_labels(20, 20, classes=1, only=(alone,))
    codes = torch.ones(20, 16, 6)
    return confusion_of(
        lambda index: codes[index], torch.ones(1, 6), (4, 4), LabelSquares(made, made, 20, processes), 1
    )


def confusion(processes):
    g = torch.Generator().manual_seed(0)
    codes, prototypes = torch.randn(50, 16, 6, generator=g), torch.randn(5, 6, generator=g)
    made = made_up_labels(50, 20)
    return confusion_of(lambda index: codes[index], prototypes, (4, 4), LabelSquares(made, made, 20, processes), 3)


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
    from PIL import Image

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


@pytest.mark.parametrize("settings", [{"crops": "slide"}, {"mirror": True}], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 100], ids="{} rows a shard".format)
def test_the_store_is_the_same_to_the_byte(pair, photos, tmp_path, settings, rows):
    """The backbone's features tell the size of their batch and the column of each patch."""
    shard_bytes = rows * 4 * 5 * 2
    calls, names, skipped, expected = extract(ALONE, photos, tmp_path / "one", shard_bytes, settings)
    together = pair(extract, photos, tmp_path / "two", shard_bytes, settings)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert sum(found[0] for found in together) == calls
    if rows > 3:
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
    """Seven squares a shard; memory for `room` squares in the last process, and for more in others."""
    before, store.SHARD_BYTES = store.SHARD_BYTES, 7 * 4 * 5 * 2
    try:
        backbone = Short(room if processes.rank == processes.size - 1 else 100, since=1)
        options = FeatureOptions(size=8, crops="slide", cache=cache, batch_size=3, processes=processes)
        open_or_extract(open_dataset(photos, "train"), backbone, options)
    finally:
        store.SHARD_BYTES = before


def test_a_batch_that_does_not_fit_into_one_is_halved_for_all(pair, photos, tmp_path):
    extract_short(ALONE, photos, tmp_path / "one", 2)
    pair(extract_short, photos, tmp_path / "two", 2)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert {read_shard(path).contents.batch for path in (tmp_path / "two").rglob("shard*")} == {1}


# what is refused, and who says so


def test_batches_that_cannot_be_shared():
    require_shares(16, Processes(0, 2))
    require_shares(5, ALONE)
    with pytest.raises(
        UserError,
        match="--batch-size 16: must be a multiple of the 3 processes, with 2 squares for each; take 15 or 18",
    ):
        require_shares(16, Processes(0, 3))
    with pytest.raises(
        UserError, match=r"--batch-size 2: must be a multiple of the 2 processes, with 2 squares for each; take 4$"
    ):
        require_shares(2, Processes(0, 2))


def test_devices_of_several(monkeypatch):
    two = Processes(1, 2, local_rank=1)
    assert two.device("cpu") == "cpu"
    assert ALONE.device("cuda:7") == "cuda:7"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="--device cuda: 1 cards, and each process needs one"):
        two.device("cuda")
    for one in ("mps", "cuda:1"):
        with pytest.raises(UserError, match=f"--device {one}: cannot serve 2 processes"):
            two.device(one)


def test_a_state_that_only_one_process_finds():
    class Other(Processes):
        def largest(self, number):
            return 7

    with pytest.raises(
        UserError, match="--out out: process 1 finds step 0 there, and another step 7; give a shared folder"
    ):
        require_same_state(None, Path("out"), Other(1, 2))


def test_one_process_says_why_all_end(monkeypatch, capsys):
    kept = dist.HashStore()
    group = [Processes(rank, 2, store=kept) for rank in range(2)]

    def ends(processes, main):
        monkeypatch.setattr(command, "joined", lambda: contextlib.nullcontext(processes))
        return command.run(main, [])

    assert [ends(each, predict.main) for each in group] == [2, 2]
    assert (
        capsys.readouterr().err == "error: torchrun: this command runs in one process, not 2; start it with python -m\n"
    )


def test_a_signal_that_the_first_process_did_not_live_to_tell_of(monkeypatch, capsys):
    def stopped(args):
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(command, "PATIENCE", 0.1)
    monkeypatch.setattr(Processes, "first_heard", contextlib.nullcontext)
    monkeypatch.setattr(command, "joined", lambda: contextlib.nullcontext(Processes(1, 1, store=kept)))
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
    return subprocess.Popen(
        [*words, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


def test_a_run_of_two(labelled, monkeypatch, capsys):
    """Against one process that keeps pairs within each half of a batch. Thresholds are absolute: M is exchanged."""
    absolute = ["--threshold-within", "0.1", "--threshold-across", "0.3", "--heads", "2"]
    args = ["--data", "set", *SMALL, *absolute, "--out", "out"]
    running = torchrun(*args, "--cache", "two")
    out, err = running.communicate(timeout=100)
    assert running.returncode == 0, err
    monkeypatch.setattr(steps, "Schedule", lambda *args: Schedule(*args[:3], parts=2))
    Path("out").rename("together")
    assert call(*args, "--cache", "one") == 0
    expected = capsys.readouterr().out.splitlines()

    def shape(lines):  # of what is said: its first words
        return [line.split()[0] for line in lines]

    said = out.splitlines()
    assert "processes  2, each with 2 squares of every batch; partners are found within those" in said
    assert shape(line for line in said if not line.startswith("processes")) == shape(expected)
    assert files("one") == files("two")
    found, alone = json.load(open("together/report.json")), json.load(open("out/report.json"))
    assert found["scores"] == alone["scores"]
    assert {path.name for path in Path("together").rglob("*")} == {path.name for path in Path("out").rglob("*")}
    for line, other in zip(open("together/metrics.jsonl"), open("out/metrics.jsonl"), strict=True):
        record, other = json.loads(line), json.loads(other)
        assert record.pop("head") == other.pop("head")
        assert record == pytest.approx(other, rel=1e-4, abs=1e-5)
    heads, others = (
        read_checkpoint(f"{name}/checkpoint.safetensors").head.state_dict() for name in ("together", "out")
    )
    for name, value in heads.items():
        torch.testing.assert_close(value, others[name], rtol=1e-4, atol=1e-5)


LONG = [*SMALL, "--granularity", "0.1", "--steps", "100000", "--checkpoint-every", "5", "--out", "out"]


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


def until_saved(step=0):
    """Until a state beyond `step` is there."""
    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        if Path("out/training.safetensors").exists() and read_training_state("out/training.safetensors").step > step:
            return
        time.sleep(0.1)
    raise TimeoutError("no state was saved")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found through /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_the_others_and_ctrl_c_saves(folder, rank, monkeypatch, capsys):
    args = ["--data", folder, *LONG]
    running = torchrun(*args)
    until_saved()
    os.kill(process_of(running.pid, rank), signal.SIGKILL)
    begun = time.monotonic()
    out, err = running.communicate(timeout=60)
    assert time.monotonic() - begun < 15
    assert running.returncode not in (0, None)
    lines = [line for line in err.splitlines() if "error: " in line]
    assert len(lines) == 1, err
    assert "error: another process of this run ended, or cannot be reached" in lines[0]
    saved = read_training_state("out/training.safetensors").step
    assert saved % 5 == 0
    if rank == 0:
        return

    running = torchrun(*args)
    until_saved(saved)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert f"resume     from step {saved} of 100000" in out
    now = read_training_state("out/training.safetensors").step
    again = f"resume     torchrun --nproc-per-node=2 -m smooseg_fast.train --data {folder}"
    assert err.count(f"interrupted; step {now} of 100000 is saved, whole, in out\n{again}") == 1
    assert "error: " not in err

    step, calls = loop.train_step, []

    def stop_soon(*args):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(loop, "train_step", stop_soon)
    assert call(*args) == 130
    assert f"resume     from step {now} of 100000" in capsys.readouterr().out
    assert read_training_state("out/training.safetensors").step == now + 3
