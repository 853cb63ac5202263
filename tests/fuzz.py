"""python tests/fuzz.py N [SEED]: N bad inputs for the commands, all in this process.

Images, labels, flags, checkpoints, journals, stores and weights are generated from SEED and the number of the case, so
that any of them can be made again: python tests/fuzz.py KIND:CASE [SEED]. A case is right when the command ends with
exit code 2 and one line that begins with "error: ", or gives the right result. It is wrong when an exception gets out,
when nothing comes back within HANG_S, when memory grows by more than GROWTH_BYTES, when a file is written outside the
output folder and the cache, and when a program is started or a connection opened. Prints the wrong ones; the exit code
is their number, at most 100.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from textures import draw, make_photos
from weights import make_head, make_published, make_vit

import smooseg_fast
from smooseg_fast import cache, choose, convert, data, evaluate, predict, similarity, sweep, train
from smooseg_fast import name as naming
from smooseg_fast.command import run
from smooseg_fast.config import TrainConfig
from smooseg_fast.errors import UserError
from smooseg_fast.segment.checkpoint import KEY, STATE_KEY, sealed
from smooseg_fast.system import fields

HANG_S = 60  # an alarm, not a measurement: any case takes about a tenth of a second
GROWTH_BYTES = 2**31
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "socket.connect")
WRITES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod")
TINY = ["--size", "64", "--eval-size", "64", "--steps", "4", "--batch-size", "2", "--patches", "16", "--log-every", "2"]
TINY += ["--checkpoint-every", "2", "--prototypes", "6", "--granularity", "0.06", "--backbone", "filterbank"]


@dataclass
class Outcome:
    """How a command ended, and what it did that it must not do."""

    code: int = 0
    out: str = ""
    err: str = ""
    wrong: list[str] = field(default_factory=list)

    @property
    def one_line(self) -> bool:
        """Exit code 2 and one line."""
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        return self.code == 2 and len(errors) == 1 and len(errors[0]) > len("error: ")


class Guard:
    """Watches what this process does while a command runs."""

    def __init__(self) -> None:
        self.allowed: tuple[str, ...] | None = None  # folders that may be written to; None while nothing runs
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: Any) -> None:
        if self.allowed is None:
            return
        if event in STARTS:
            self.seen.append(f"started: {event} {str(args)[:200]}")
        elif event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self._written(event, args[0])
        elif event in WRITES:
            self._written(event, args[1 if event in ("os.rename", "os.link", "os.symlink") else 0])

    def _written(self, event: str, path: Any) -> None:
        if isinstance(path, int) or self.allowed is None:
            return
        name = os.path.abspath(os.fsdecode(path))
        if name != os.devnull and not name.startswith(self.allowed):
            self.seen.append(f"wrote elsewhere: {event} {name[:200]}")

    def run(self, function: Callable[[], int], allowed: Sequence[Path]) -> Outcome:
        """The outcome of `function`, which may write below the folders `allowed`."""
        outcome, out, err = Outcome(), io.StringIO(), io.StringIO()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        signal.signal(signal.SIGALRM, hang)
        signal.alarm(HANG_S)
        self.seen, self.allowed = [], tuple(str(path) for path in allowed)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                outcome.code = function()
        except BaseException:
            outcome.wrong.append(traceback.format_exc())
        finally:
            self.allowed = None
            signal.alarm(0)
        outcome.out, outcome.err = out.getvalue(), err.getvalue()
        growth = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        outcome.wrong += [f"memory grew by {growth >> 20} MB"] * (growth > GROWTH_BYTES) + self.seen
        outcome.wrong += [f"a traceback:\n{outcome.err}"] * ("Traceback" in outcome.err)
        return outcome


def hang(*_: Any) -> None:
    raise TimeoutError(f"nothing came back within {HANG_S} s")


# mutations of bytes and of values


def mutated(rng: random.Random, whole: bytes) -> bytes:
    """`whole` with some bytes changed, cut, doubled or put elsewhere."""
    content = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 8))):
        kind, at = rng.randrange(8), rng.randrange(len(content) + 1)
        end = min(len(content), at + rng.choice((1, 4, 16, 300)))
        if kind == 0 and content:
            content[at % len(content)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[at:end] = rng.randbytes(end - at)
        elif kind == 2:
            del content[at:]
        elif kind == 3:
            del content[at:end]
        elif kind == 4:
            content[at:at] = content[at:end]
        elif kind == 5:  # a number of a header, most of which are near the beginning
            at = rng.randrange(min(len(content), 256) + 1)
            content[at : at + 4] = struct.pack(rng.choice("<>") + "I", rng.choice((0, 1, 2**31 - 1, 2**32 - 1, 65536)))
        elif kind == 6:
            content[at:end] = bytes(end - at)
        else:
            content += rng.randbytes(rng.choice((1, 100)))
    return bytes(content)


STRANGE = (None, True, -1, 0, 2**70, 1.5, 1e308, "", "x", "\x1b[2J\n", "../" * 9, [], [1, "a"], {}, {"a": {}}, "nan")


def strange(rng: random.Random) -> Any:
    return rng.choice((*STRANGE, float("nan"), float("-inf"), "x" * 5000, [[[]]] * 3))


def changed(rng: random.Random, value: Any) -> Any:
    """A JSON `value` with something strange somewhere in it, or something missing."""
    value = json.loads(json.dumps(value))
    holder = value
    while isinstance(holder, (dict, list)) and holder:
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
        if isinstance(holder[key], (dict, list)) and holder[key] and rng.random() < 0.7:
            holder = holder[key]
            continue
        if rng.random() < 0.2:
            del holder[key]
        else:
            holder[key] = strange(rng)
        return value
    return strange(rng)


def damaged_json(rng: random.Random, whole: bytes) -> bytes:
    """JSON, or lines of it, that is cut, mutated, deep, or has other values."""
    kind = rng.randrange(6)
    if kind == 0:
        return whole[: rng.randrange(len(whole) + 1)]
    if kind == 1:
        return mutated(rng, whole)
    if kind == 2:
        return b"[" * rng.choice((10, 200_000)) + whole
    if kind == 3:
        return rng.choice((b"", b"\0" * 4096, b"\xff\xfe\n", b"1" * 5000, b"null", b'"a"', b"[]\n[]\n", b"{}\n{}\n"))
    try:
        return json.dumps(changed(rng, json.loads(whole))).encode() + b"\n"
    except ValueError:  # several lines
        lines = whole.decode().splitlines()
        number = rng.randrange(len(lines))
        lines[number] = json.dumps(changed(rng, json.loads(lines[number])))
        return "\n".join(lines).encode() + b"\n" * rng.randrange(2)


# images

FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
}
MODES = ("RGB", "L", "P", "RGBA", "1", "I;16", "I", "F", "LA", "CMYK")


def png(width: int, height: int, body: bytes, depth: int = 8, colour: int = 2, more: bytes = b"") -> bytes:
    """A PNG of any numbers, with right checksums."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")
    )


def tiff(rng: random.Random) -> bytes:
    """A TIFF whose tags have any values."""
    tags = [(256, 64), (257, 64), (258, 8), (259, 1), (262, 2), (273, 8), (277, 3), (278, 64), (279, 12288), (339, 1)]
    values = (0, 1, 2, 3, 8, 16, 32, 64, 65535, 2**31, 2**32 - 1)
    entries = b""
    for tag, value in tags:
        if rng.random() < 0.3:
            value = rng.choice(values)
        if rng.random() < 0.9:
            entries += struct.pack("<HHII", tag, rng.choice((3, 4, 4, 5, 12)), rng.choice((1, 1, 1, 2**30)), value)
    following = rng.choice((0, 0, 8, 2**31))  # the directory after this one: none, itself, or nowhere
    return (
        b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries) // 12) + entries + struct.pack("<I", following) + bytes(64)
    )


def picture(rng: random.Random) -> tuple[str, bytes]:
    """(suffix, bytes) of a picture that is damaged, hostile, or only odd."""
    suffix, kind = rng.choice(list(FORMATS)), rng.randrange(10)
    if kind == 0:
        side = rng.choice((1, 3, 0, 2**16, 2**31 - 1, 2**31))
        return ".png", png(
            side, rng.choice((1, 64, side)), rng.randbytes(99), rng.choice((1, 8, 16, 7)), rng.randrange(8)
        )
    if kind == 1:
        return rng.choice((".tif", ".tiff")), tiff(rng)
    if kind == 2:
        others = (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n%%EndComments\nquit\n",
            b"<svg/>",
            b"",
            b"P6 9 9 255 ",
        )
        return suffix, rng.choice(
            (*others, b"GIF89a" + bytes(60), rng.randbytes(999), b"\0" * 5000, b"II+\0\x08\0\0\0")
        )
    height, width = rng.choice(((64, 96), (72, 72), (1, 1), (7, 300), (2, 64), (64, 8)))
    pixels = np.random.default_rng(rng.randrange(99)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer, mode = io.BytesIO(), rng.choice(MODES)
    image = Image.fromarray(pixels)
    with contextlib.suppress(ValueError, OSError, KeyError):
        image = image.convert("L").convert(mode) if mode in ("I;16", "I", "F") else image.convert(mode)
    options: dict[str, Any] = {
        "exif": mutated(rng, b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0")
    }
    try:
        image.save(buffer, FORMATS[suffix], **(options if rng.random() < 0.3 and suffix != ".bmp" else {}))
    except Exception:  # a mode that the format lacks, or tags that Pillow cannot write
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, FORMATS[suffix])
    content = buffer.getvalue()
    if kind == 3:
        return rng.choice(list(FORMATS)), content  # perhaps of another suffix
    return suffix, content if kind == 4 else mutated(rng, content)


# the cases


class Bench:
    """A tiny run, its predictions, its cache and published weights, made once, and the cases that start from copies."""

    def __init__(self, root: Path):
        self.root, self.guard, self.rng = root, Guard(), random.Random()
        self.case = root / "case"
        self.photos, self.labelled, self.home = make_photos(root / "photos"), root / "labelled", root / "cache"
        for split, numbers in (("train", (0, 1, 2)), ("val", (3, 4))):
            for kind, part in (("images", 0), ("labels", 1)):
                (self.labelled / split / kind).mkdir(parents=True)
                for number in numbers:
                    Image.fromarray(draw(number, 64, 64)[part]).save(self.labelled / split / kind / f"{number}.png")
        os.environ["XDG_CACHE_HOME"] = str(self.home)
        self.run_folder, self.made, self.checkpoint = root / "run", root / "made", root / "run/checkpoint.safetensors"
        self._must(train.main, "--data", self.photos, "--out", self.run_folder, *TINY)
        self._must(predict.main, *self.predicting(), "--out", self.made)
        self._must(evaluate.main, "--checkpoint", self.checkpoint, "--data", self.labelled, "--out", root / "scores")
        self._must(data.main, "check", self.labelled)
        self.published = root / "published.ckpt"
        torch.save(make_published(make_vit(depth=1), make_head(64)), self.published)
        self.masks = {path.name: path.read_bytes() for path in (self.made / "masks").rglob("*.png")}

    def _must(self, main: Callable[..., None], *args: Any) -> None:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run(main, list(map(str, args)))
        assert code == 0, err.getvalue()

    def predicting(self, checkpoint: Path | None = None, images: Path | None = None) -> list[str]:
        return ["--checkpoint", str(checkpoint or self.checkpoint), "--images", str(images or self.photos)]

    def call(self, main: Callable[..., None], *args: Any) -> Outcome:
        """The outcome of a command that may write into the case's folder and the cache."""
        return self.guard.run(lambda: run(main, list(map(str, args))), (self.case, self.home))

    def outcome(self, kind: str, number: int, seed: int) -> list[str]:
        """Run a case and return what was wrong with it."""
        self.rng = random.Random(f"{kind}:{number}:{seed}")
        shutil.rmtree(self.case, ignore_errors=True)
        self.case.mkdir()
        outcome = getattr(self, kind)()
        if not outcome.wrong and outcome.code != 0 and not outcome.one_line:
            outcome.wrong.append(f"exit code {outcome.code}, and not one line of error:\n{outcome.err}")
        return outcome.wrong

    def images(self) -> Outcome:
        """A bad image next to a good one, whose mask stays."""
        good, folder, out = self.photos / "0.png", self.case / "photos", self.case / "out"
        folder.mkdir()
        shutil.copy(good, folder)
        suffix, content = picture(self.rng)
        (folder / f"bad{suffix}").write_bytes(content)
        if self.rng.random() < 0.3:
            return self.call(data.main, "check", folder)
        outcome = self.call(predict.main, *self.predicting(images=folder), "--out", out)
        if outcome.code == 0:
            if (out / "masks/0.png").read_bytes() != self.masks["0.png"]:
                outcome.wrong.append("the mask of the good image is another")
            shares = json.loads((out / "shares.json").read_text())
            if set(shares["images"]) | set(shares["skipped"]) != {"0.png", f"bad{suffix}"}:
                outcome.wrong.append("an image is neither done nor skipped")
        return outcome

    def labels(self) -> Outcome:
        """A bad label file among good ones."""
        folder = self.case / "set"
        shutil.copytree(self.labelled, folder)
        label = folder / "val/labels/3.png"
        if self.rng.random() < 0.5:
            label.write_bytes(mutated(self.rng, label.read_bytes()))
        else:
            suffix, content = picture(self.rng)
            label.unlink()
            label.with_suffix(suffix).write_bytes(content)
        if self.rng.random() < 0.5:
            return self.call(data.main, "check", folder)
        out = self.case / "out"
        return self.call(evaluate.main, "--checkpoint", self.checkpoint, "--data", folder, "--out", out)

    def checkpoints(self) -> Outcome:
        """A checkpoint or a state is refused with changed bytes; with changed values and a right digest it may pass."""
        key, name = self.rng.choice(((KEY, "checkpoint.safetensors"), (STATE_KEY, "training.safetensors")))
        shutil.copytree(self.run_folder, self.case / "run")
        path, whole = self.case / "run" / name, (self.run_folder / name).read_bytes()
        by_bytes = self.rng.random() < 0.5
        if by_bytes:
            path.write_bytes(mutated(self.rng, whole))
        else:
            with safe_open(path, "pt") as file:
                header, tensors = json.loads(file.metadata()[key]), {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
            self._change(header, tensors) if self.rng.random() < 0.5 else header.update(self._header(header))
            save_file(tensors, path, {key: sealed(header, tensors)})
        same = path.read_bytes() == whole
        if key == STATE_KEY:
            (self.case / "run/report.json").unlink()
            outcome = self._train_again()
        else:
            command = self.rng.choice((predict.main, predict.main, choose.main))
            args = [*self.predicting(path), "--out", self.case / "out"]
            outcome = self.call(command, *(args if command is predict.main else ["--run", path.parent, "--groups", 3]))
        if by_bytes and not same and outcome.code == 0:
            outcome.wrong.append("a file with changed bytes was taken")
        return outcome

    def _header(self, header: dict[str, Any]) -> dict[str, Any]:
        other = changed(self.rng, header)
        return other if isinstance(other, dict) else {}

    def _change(self, _header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        name = self.rng.choice(sorted(tensors))
        value = tensors[name]
        if self.rng.random() < 0.2:
            del tensors[name]
        elif self.rng.random() < 0.4:
            tensors[name] = self.rng.choice(
                (value[:0].clone() if value.ndim else value, value.flatten().clone(), value.double(), value.long())
            )
        elif value.is_floating_point():
            extreme = self.rng.choice((float("nan"), float("inf"), 1e30, -1e30, 0.0))
            tensors[name] = value.clone()
            tensors[name].view(-1)[: self.rng.choice((1, value.numel()))] = extreme

    def _train_again(self) -> Outcome:
        """Resume the run of the case. Its files hold the name of its folder, so they are put where it was."""
        whole = self.root / "whole"
        self.run_folder.rename(whole)
        shutil.move(self.case / "run", self.run_folder)
        try:
            return self.guard.run(
                lambda: run(train.main, ["--data", str(self.photos), "--out", str(self.run_folder), *TINY]),
                (self.run_folder, self.home, self.case),
            )
        finally:
            shutil.move(self.run_folder, self.case / "run")
            whole.rename(self.run_folder)

    def journals(self) -> Outcome:
        """Records and journals that are damaged: the files of an undisturbed run come out, or one line."""
        if self.rng.random() < 0.25:
            shutil.copytree(self.run_folder, self.case / "run")
            (self.case / "run/report.json").unlink()
            path = self.case / "run" / self.rng.choice(("run.json", "metrics.jsonl", "metrics.jsonl", ".smooseg"))
            path.write_bytes(damaged_json(self.rng, path.read_bytes() if path.suffix else b'"a"'))
            outcome, name = self._train_again(), "checkpoint.safetensors"
            same = (self.case / "run" / name).read_bytes() == self.checkpoint.read_bytes()
            outcome.wrong += ["the checkpoint is another"] * (outcome.code == 0 and not same)
            return outcome
        out = self.case / "made"
        shutil.copytree(self.made, out)
        path = out / self.rng.choice(("done.jsonl", "done.jsonl", "predict.json", "shares.json", "masks/0.png"))
        whole = path.read_bytes()
        path.write_bytes((mutated if path.suffix == ".png" else damaged_json)(self.rng, whole))
        outcome = self.call(predict.main, *self.predicting(), "--out", out)
        if outcome.code == 0:
            for path in self.made.rglob("*.*"):
                here = out / path.relative_to(self.made)
                if (
                    path.name not in ("done.jsonl", "manifest.csv", "tiles.jsonl", "report.html")
                    and path.is_file()
                    and here.read_bytes() != path.read_bytes()
                ):
                    outcome.wrong.append(f"{path.name} is another")
        outcome.wrong += ["a temporary file stayed"] * any(".part" in path.name for path in out.rglob(".*"))
        return outcome

    def stores(self) -> Outcome:
        """A damaged shard is recomputed; a damaged meta.json is only shown."""
        home = self.case / "cache"
        shutil.copytree(self.home / "smooseg_fast", home)
        path = self.rng.choice(sorted(path for path in home.rglob("*") if path.suffix in (".safetensors", ".json")))
        path.write_bytes((damaged_json if path.suffix == ".json" else mutated)(self.rng, path.read_bytes()))
        if self.rng.random() < 0.4:
            return self.call(cache.main, self.rng.choice(("ls", "verify")), "--cache", home)
        outcome = self.call(
            similarity.main, "--data", self.photos, "--size", 64, "--cache", home, "--out", self.case / "s"
        )
        return outcome

    def weights(self) -> Outcome:
        """Pickles and folders of weights that are damaged or hostile."""
        kind = self.rng.randrange(4)
        path = self.case / self.rng.choice(("w.ckpt", "w.pth"))
        if kind == 0:
            path.write_bytes(mutated(self.rng, self.published.read_bytes()))
        elif kind == 1:
            path.write_bytes(hostile_pickle(self.rng))
        elif kind == 2:
            torch.save(self._published(), path)
        else:
            save_file({"x": torch.zeros(1)}, path)
            path.write_bytes(mutated(self.rng, path.read_bytes()))
        out = self.case / "out"
        if self.rng.random() < 0.5:
            return self.call(convert.main, path, "--out", out)
        if self.rng.random() < 0.5:
            return self.call(predict.main, *self.predicting(), "--backbone", path, "--out", out)
        return self.call(predict.main, *self.predicting(path), "--out", out)

    def _published(self) -> Any:
        content = make_published(make_vit(depth=1), make_head(64))
        state = content["state_dict"]
        name = self.rng.choice(sorted(state))
        state[name] = self.rng.choice(
            (state[name] * float("nan"), state[name].flatten(), strange(self.rng), state[name][:0])
        )
        return content

    def flags(self) -> Outcome:
        """Arguments over the declared kinds and bounds of every field: one line refuses what none of them takes."""
        main, kind, command = self.rng.choice(FLAGS)
        declared = list(fields.fields_of(kind).values())
        args = list(command)
        for one in self.rng.sample(declared, min(len(declared), self.rng.choice((1, 2, 4)))):
            if one.kind is bool:
                args += [self.rng.choice(one.flags)]
            else:
                args += [
                    *one.flags[:1],
                    *(self._word(one) for _ in range(self.rng.choice((1, 1, 1, 0, 3)) if one.many else 1)),
                ]
        if self.rng.random() < 0.2:
            args.insert(
                self.rng.randrange(len(args) + 1),
                self.rng.choice(("--", "-", "--x", "--lr=", "\udcff", "\n", "x" * 300)),
            )
        # at the end, so that nothing is learnt and everything before it is read first
        return self.call(main, *args, "--no-such-flag")

    def _word(self, one: fields.Field) -> str:
        strings = (
            "",
            "x",
            "-1",
            "None",
            "\x1b[2J",
            "\udcff",
            "nan",
            "x" * 5000,
            "0x10",
            "1_0",
            "٣",
            "1e5",
            "--",
            "a\nb",
        )
        if one.choices and self.rng.random() < 0.5:
            return self.rng.choice(one.choices)
        if one.bounds is not None and self.rng.random() < 0.7:
            low, high = one.bounds.low, one.bounds.high
            ends = [low, low - 1, low + 1] + ([] if high is None else [high, high + 1, high - 1])
            return str(self.rng.choice([*ends, -low, 2**63, 10**30]))
        return self.rng.choice((*strings, "nan", "inf", "-inf", "1e400", "-0.0", "1" * 5000))

    def settings(self) -> Outcome:
        """Extreme values of settings, learnt from two steps without any file."""
        names = ("lr", "lr_prototypes", "temperature", "teacher_decay", "dropout", "granularity", "threshold_within")
        names += ("threshold_across", "seed", "data_seed", "code_dim", "prototypes", "channels", "margin")
        given: dict[str, Any] = {}
        for name in self.rng.sample([name for name in names if name in fields.fields_of(TrainConfig)], 2):
            one = fields.fields_of(TrainConfig)[name]
            numbers = [
                0,
                1,
                -1,
                2,
                17,
                2**63 - 1,
                2**63,
                1e-300,
                1e300,
                -1e308,
                0.5,
                float("nan"),
                float("inf"),
                "x",
                (),
            ]
            if one.bounds is not None:
                numbers += [one.bounds.low] + [one.bounds.high] * (one.bounds.high is not None)
            given[name] = self.rng.choice([n for n in numbers if not (name == "code_dim" and n == one.bounds.high)])

        def learn() -> int:
            try:
                options = {"size": 64, "eval_size": 64, "steps": 2, "batch_size": 2, "patches": 16, "prototypes": 6}
                smooseg_fast.fit(self.photos, progress=False, backbone="filterbank", **options | given)
            except UserError as error:
                print("\n".join(f"error: {line}" for line in str(error).split("\n")), file=sys.stderr)
                return 2
            return 0

        return self.guard.run(learn, (self.case, self.home))


FLAGS = (
    (train.main, TrainConfig, ()),
    (predict.main, predict.PredictConfig, ()),
    (evaluate.main, evaluate.EvaluateConfig, ()),
    (choose.main, choose.ChooseConfig, ()),
    (naming.main, naming.NameConfig, ()),
    (sweep.main, sweep.SweepConfig, ()),
    (convert.main, convert.ConvertConfig, ()),
    (similarity.main, similarity.SimilarityConfig, ()),
    (data.main, data.CheckConfig, ("check",)),
    (cache.main, cache.Remove, ("rm",)),
    (cache.main, cache.Verify, ("verify",)),
)


def hostile_pickle(rng: random.Random) -> bytes:
    """A stream of opcodes, some of which call for code."""
    calls = (
        b"cos\nsystem\n",
        b"cbuiltins\neval\n",
        b"csubprocess\nPopen\n",
        b"ctorch\nload\n",
        b"ctorch\nFloatStorage\n",
    )
    calls += (b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n")
    values = (
        b"(S'id'\ntR",
        b"(tR",
        b"(lR",
        b"}",
        b"]",
        b"N",
        b"K\x01",
        b"0",
        b"2",
        b"q\x01h\x01",
        b"Q",
        b"u",
        b"s",
        b"b",
        b"\x81",
    )
    values += (
        b"(" * 3000,
        b"]" * 3000 + b"a" * 2000,
        b"\x8e" + b"\xff" * 8,
        b"X\xff\xff\xff\x7f",
        b"r\xff\xff\xff\x7f",
    )
    body = b"".join(rng.choice(calls if rng.random() < 0.4 else values) for _ in range(rng.randrange(1, 30)))
    whole = b"\x80" + bytes([rng.choice((2, 2, 4, 9))]) + body + b"." * rng.randrange(2)
    if rng.random() < 0.5:
        return whole
    # as torch writes it since 1.6: an archive
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("w/data.pkl", whole)
        archive.writestr("w/version", "3\n")
        archive.writestr("w/data/0", bytes(64))
    return buffer.getvalue()


KINDS = ("images", "flags", "checkpoints", "images", "journals", "labels", "weights", "stores", "flags", "settings")


def wrong_cases(count: int, seed: int) -> Iterator[tuple[str, str]]:
    """(name, what was wrong) of each wrong case among `count`."""
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(Path(place).resolve())
        for number in range(count):
            kind = KINDS[number % len(KINDS)]
            for line in bench.outcome(kind, number, seed):
                yield f"{kind}:{number}", line


def main(asked: str, seed: int) -> int:
    began, wrong = time.perf_counter(), Counter()
    if ":" in asked:
        kind, _, number = asked.partition(":")
        with tempfile.TemporaryDirectory() as place:
            lines = Bench(Path(place).resolve()).outcome(kind, int(number), seed)
        print(*lines, sep="\n")
        return int(bool(lines))
    for name, line in wrong_cases(int(asked), seed):
        wrong[name] += 1
        print(f"WRONG {name}: {line}", flush=True)
    print(f"{asked} inputs, {len(wrong)} wrong; {time.perf_counter() - began:.0f} s")
    return min(len(wrong), 100)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ["SMOOSEG_BACKBONE"] = "filterbank"
    sys.exit(main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0))
