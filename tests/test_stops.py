"""Runs that are stopped, killed or out of disk: what they say, what they keep, and that they end bit for bit as if
nothing had been.
"""

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_trainer import SMALL, call, files
from textures import make_photos

import smooseg_fast
from smooseg_fast.backbones.filterbank import Filterbank
from smooseg_fast.errors import WriteError
from smooseg_fast.learn import loop, runpictures, summary, trainer
from smooseg_fast.learn import run as steps
from smooseg_fast.segment import model
from smooseg_fast.segment.checkpoint import read_training_state
from smooseg_fast.system import files as written
from smooseg_fast.system import outfolder, signals
from smooseg_fast.system.signals import Interrupted, stop_request

HEAD = "granularity_0.1_seed_0.safetensors"
LADDER = [*SMALL, "--granularity", "0.06", "0.1", "--prototypes", "3"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The files of an undisturbed run. Names are relative, because the files hold the settings, and names with them."""
    place = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        patch.chdir(place)
        make_photos(Path("photos"))
        assert resume() == 0
        return files("out")


def resume():
    return call("--data", "photos", "--out", "out", *LADDER)


# signals

# where the signal comes, its n-th time there, and the steps that are saved then
PLACES = {
    "features": (Filterbank, "extract", 1, None),
    "start": (model, "spherical_kmeans", 1, 0),
    "step": (loop, "train_step", 5, 5),
    "line of metrics": (steps, "health", 2, 4),
    "state": (steps.TrainingState, "write", 1, 4),
    "figures": (summary, "health", 1, 6),
    "pictures": (runpictures, "groups_picture", 1, 6),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_anywhere_says_how_to_resume_and_loses_nothing(folder, whole, monkeypatch, capsys, place, number):
    owner, name, times, saved = PLACES[place]
    if place == "features":
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "another cache"))
    plain, seen = getattr(owner, name), []

    def stopped(*args, **options):
        seen.append(1)
        if len(seen) == times:
            signal.raise_signal(number)
        return plain(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stopped)
        assert resume() == 128 + number
    said = capsys.readouterr().err
    kept = {None: "no shard of features was finished yet", 0: "no step is saved yet; features are"}
    kept = kept.get(saved, f"step {saved} of 6 is saved, whole, in out")
    assert f"interrupted; {kept}\nresume     python -m smooseg_fast.train --data photos --out out" in said
    assert resume() == 0
    assert files("out") == whole


@pytest.mark.parametrize(("place", "saved"), [("step", 3), ("line of metrics", 4), ("figures", 6)])
def test_what_would_take_forever_is_given_up(folder, whole, monkeypatch, capsys, place, saved):
    """A step ends or is lost; a line of metrics is made after the resume."""
    owner, name, times, _ = PLACES[place]
    plain, seen, given_up = getattr(owner, name), [], []

    def endless(*args, **options):
        seen.append(1)
        if len(seen) == times:
            signal.raise_signal(signal.SIGTERM)
            given_up.append(True)
            for _ in range(3000):
                time.sleep(0.01)
            given_up.append(False)
        return plain(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, endless)
        assert resume() == 143
    assert False not in given_up
    assert f"step {saved} of 6 is saved" in capsys.readouterr().err
    assert read_training_state("out/training.safetensors").step == saved
    assert resume() == 0
    assert files("out") == whole


def test_a_second_signal_stops_at_once():
    with stop_request() as request:
        signal.raise_signal(signal.SIGINT)
        assert request.number == signal.SIGINT
        with pytest.raises(Interrupted) as stop:
            signal.raise_signal(signal.SIGTERM)
    assert stop.value.number == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_loop_that_answers_in_time_is_left_alone(monkeypatch):
    monkeypatch.setattr(signals, "PATIENCE_S", 0.05)
    with stop_request() as request:
        signal.raise_signal(signal.SIGINT)
        assert request.number == signal.SIGINT
    time.sleep(0.1)
    assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]


def test_from_python_the_exception_tells_what_is_kept(folder, monkeypatch):
    monkeypatch.setattr(trainer, "finish", lambda *_: signal.raise_signal(signal.SIGINT))
    settings = dict(size=64, eval_size=64, steps=3, batch_size=4, prototypes=3, progress=False)
    with pytest.raises(Interrupted, match=r"^step 3 of 3 is saved, whole, in made$"):
        smooseg_fast.fit(folder, out="made", **settings)
    with pytest.raises(Interrupted, match=r"^nothing is kept of a run without an output folder$"):
        smooseg_fast.fit(folder, **settings)


# SIGKILL


def kill(folder, moments, *args):
    """-> how the processes ended."""
    command = [
        sys.executable,
        Path(__file__).with_name("killed.py"),
        json.dumps(moments),
        "--data",
        folder,
        "--out",
        "out",
        *args,
    ]
    paths = [str(Path(smooseg_fast.__file__).parents[1]), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(re.search(r"^ended (.*)$", done.stdout, re.MULTILINE)[1])


def test_killed_before_any_file_is_in_its_place(folder):
    """One process after another on one folder; what each leaves half written, the next one removes."""
    names = ["run.json", "training.safetensors", HEAD, "checkpoint.safetensors", "report.json"]
    codes = kill(folder, [0.0, *([name, 1] for name in names)], *LADDER)
    assert codes == [-signal.SIGKILL] * 6 + [0]
    assert files("out") == files("undisturbed/out")


def test_killed_at_random_moments(folder):
    """One interval at most is lost, and in the end nothing."""
    rng = random.Random(7)
    moments = [rng.uniform(0.1, 0.3) for _ in range(3)]
    many = ["--steps", "200", "--log-every", "3", "--checkpoint-every", "5"]
    codes = kill(folder, moments, *LADDER, *many)
    assert set(codes[:-1]) == {-signal.SIGKILL}
    assert codes[-1] == 0
    assert files("out") == files("undisturbed/out")


# a full disk

FULL = OSError(errno.ENOSPC, "No space left on device")


def no_room_for(name, times, patch):
    """Every file of this name meets a full disk from its `times`-th writing on; of what is appended one half still
    fits.
    """
    replace, plain, seen = os.replace, open, []

    def put(temporary, path):
        seen.extend([path] if Path(path).name == name else [])
        if Path(path).name == name and len(seen) >= times:
            raise FULL
        replace(temporary, path)

    def opened(path, *mode, **options):
        seen.append(path)
        file = plain(path, *mode, **options)
        if len(seen) >= times:

            def half(text):
                file.flush()
                os.write(file.fileno(), text.encode()[: len(text) // 2])
                raise FULL

            file.write = half
        return file

    if name == "metrics.jsonl":
        patch.setattr(outfolder, "open", opened, raising=False)
    else:
        patch.setattr(written.os, "replace", put)


@pytest.mark.parametrize(
    ("name", "times", "saved"),
    [
        ("run.json", 1, 0),
        ("metrics.jsonl", 1, 0),
        ("metrics.jsonl", 2, 3),
        ("training.safetensors", 1, 0),
        ("training.safetensors", 2, 3),
        (HEAD, 1, 6),
        ("checkpoint.safetensors", 1, 6),
        ("groups.png", 1, 6),
        ("report.json", 1, 6),
    ],
)
def test_a_full_disk_is_said_and_loses_nothing(folder, whole, monkeypatch, capsys, name, times, saved):
    with monkeypatch.context() as patch:
        no_room_for(name, times, patch)
        assert resume() == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    kept = f"step {saved} of 6 is saved, whole, in out" if saved else "no step is saved yet; features are"
    path = f"out/heads/{name}" if name == HEAD else f"out/{name}"
    assert line.startswith(f"error: {path}: cannot be written (No space left on device); free some space")
    assert f"; {kept}; to resume then: python -m smooseg_fast.train --data photos --out out" in line
    assert {path.name for path in Path("out").rglob(".*")} <= {".smooseg"}
    if saved:
        assert read_training_state("out/training.safetensors").step == saved
    assert resume() == 0
    assert files("out") == whole


def test_a_full_disk_from_python(folder, monkeypatch):
    no_room_for("training.safetensors", 1, monkeypatch)
    with pytest.raises(WriteError, match="no step is saved yet"):
        smooseg_fast.fit(folder, out="made", size=64, eval_size=64, steps=3, batch_size=4, prototypes=3, progress=False)


# in every run


def test_the_last_step_is_saved_where_no_checkpoint_is_due(folder):
    assert (
        call("--data", folder, "--out", "out", *SMALL, "--steps", "5", "--checkpoint-every", "3", "--log-every", "4")
        == 0
    )
    assert read_training_state("out/training.safetensors").step == 5
    steps = [json.loads(line)["step"] for line in open("out/metrics.jsonl")]
    assert sorted(set(steps)) == [4, 5]


def test_leftovers_of_killed_processes_go_and_other_files_stay(folder):
    Path("out/heads").mkdir(parents=True)
    left = [
        Path("out/.training.123.part.safetensors"),
        Path("out/heads/.x.9.part.safetensors"),
        Path("out/.run.77.part.json"),
    ]
    others = [Path("out/.mine.part"), Path("out/notes.txt")]
    for path in (*left, *others):
        path.write_text("half")
    assert call("--data", folder, "--out", "out", *LADDER) == 0
    assert not [path for path in left if path.exists()]
    assert all(path.exists() for path in others)
