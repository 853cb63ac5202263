"""python tests/killed.py MOMENTS ARGUMENT...: a run of smooseg_fast.train that is killed again and again, and at last
left to end.

MOMENTS is JSON, one entry for each process that is killed: [name, n], right before the n-th time that a file of this
name would be put in its place; or a share (0 to 1) of the time that an undisturbed run takes, which is then made first,
in the folder `undisturbed`. Each run is a fork of this process, so that PyTorch is imported once. Prints how each was
ended.

python tests/killed.py KILLS [SEED]: as many kills at random moments of commands on a few small pictures: train, choose
and predict in turn. After each kill the same command runs to its end, and what it leaves must be the files of commands
that nobody killed, byte for byte, and no temporary file. The exit code is 1 where it is not.
"""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from textures import make_photos

from smooseg_fast import choose, predict, train
from smooseg_fast import name as naming
from smooseg_fast.command import run
from smooseg_fast.learn import trainer  # noqa: F401  # commands import it late, and every fork would again
from smooseg_fast.show import charts, sheet  # noqa: F401

TINY = ["--size", "64", "--eval-size", "64", "--steps", "30", "--batch-size", "2", "--patches", "16"]
TINY += ["--log-every", "2", "--checkpoint-every", "3", "--prototypes", "6", "--granularity", "0", "0.1"]
TINY += ["--backbone", "filterbank"]
COMMANDS = {
    "train": (train.main, ["--data", "photos", "--out", "out", *TINY]),
    "choose": (choose.main, ["--run", "out", "--groups", "3"]),
    "name": (naming.main, ["--run", "out", "0=a", "1,2=b"]),
    "predict": (predict.main, ["--checkpoint", "out/checkpoint.safetensors", "--images", "photos", "--out", "made"]),
}


def start(args, before=None, command=train.main):
    child = os.fork()
    if child:
        return child
    replace, seen = os.replace, []

    def kill(temporary, path):
        seen.extend([path] if before and Path(path).name == before[0] else [])
        if before and len(seen) == before[1]:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(temporary, path)

    os.replace = kill
    code = run(command, args)
    sys.stdout.flush()
    os._exit(code)


def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(moments, args):
    whole = 0.0
    if any(isinstance(moment, float) for moment in moments):
        os.mkdir("undisturbed")
        os.chdir("undisturbed")
        started = time.perf_counter()
        assert ended(start(args)) == 0
        whole = time.perf_counter() - started
        os.chdir("..")
    codes = []
    for moment in moments:
        if isinstance(moment, float):
            child = start(args)
            time.sleep(moment * whole)
            os.kill(child, signal.SIGKILL)
        else:
            child = start(args, moment)
        codes.append(ended(child))
    codes.append(ended(start(args)))
    print("ended", json.dumps(codes))


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def many(kills, seed):
    """-> how many commands left other files than those that nobody killed."""
    sys.stdout, printed = open(os.devnull, "w"), sys.stdout
    sys.stderr, rng, wrong = sys.stdout, random.Random(seed), 0
    with tempfile.TemporaryDirectory() as place:
        os.environ["XDG_CACHE_HOME"] = f"{place}/cache"
        os.chdir(place)
        make_photos(Path("photos"))
        before, expected, seconds = {}, {}, {}
        for name, (command, args) in COMMANDS.items():
            before[name] = f"before {name}"
            Path(before[name]).mkdir()
            for folder in filter(os.path.exists, ("out", "made", "cache")):
                shutil.copytree(folder, f"{before[name]}/{folder}")
            began = time.perf_counter()
            assert ended(start(args, command=command)) == 0
            seconds[name] = time.perf_counter() - began
            expected[name] = [content(folder) for folder in ("out", "made", "cache")]
        for number in range(kills):
            name = list(COMMANDS)[number % len(COMMANDS)]
            command, args = COMMANDS[name]
            for folder in ("out", "made", "cache"):
                shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(before[name], ".", dirs_exist_ok=True)
            child = start(args, command=command)
            time.sleep(rng.uniform(0, seconds[name]))
            os.kill(child, signal.SIGKILL)
            killed, code = ended(child), ended(start(args, command=command))
            same = [content(folder) for folder in ("out", "made", "cache")] == expected[name]
            wrong += not same or code != 0
            print(
                f"{number} {name}: killed ({killed}), rerun {code}; {'same' if same else 'OTHER'}",
                file=printed,
                flush=True,
            )
    print(f"{kills} kills, {wrong} wrong", file=printed)
    return wrong


if __name__ == "__main__":
    if sys.argv[1].isdecimal():
        sys.exit(int(bool(many(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))))
    main(json.loads(sys.argv[1]), sys.argv[2:])
