"""stdout, stderr, names and paths that a machine can spoil: commands print harmlessly, finish, and say one line."""

import errno
import io
import os
import shlex
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from test_command import PATHS, raises

from smooseg_fast import command, data
from smooseg_fast.command import run
from smooseg_fast.errors import UserError
from smooseg_fast.features.cachefolder import default_cache
from smooseg_fast.system.commandline import quoted
from smooseg_fast.system.progress import Bar, say
from smooseg_fast.system.signals import terminable
from smooseg_fast.system.terminal import Terminal, about, one_line, printable, terminals

NASTY = "a\nb\r\x1b[31m\u202egnp.\udcff é"


class Full(io.StringIO):
    """A file on a full disk."""

    encoding = "utf-8"

    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_names_are_printed_as_one_harmless_line():
    assert one_line(NASTY) == r"a\nb\r\x1b[31m\u202egnp.\udcff é"
    assert printable("two\n  lines \x07") == r"two lines \x07"
    assert one_line("Shot 1.02\u202fPM  x.png") == "Shot 1.02\u202fPM  x.png"


def test_a_terminal_gets_lines_and_bars_and_nothing_else(monkeypatch):
    stream = io.StringIO()
    terminal = Terminal(stream, breaks=False)
    for text in ("\r 50%|", "\x1b[A", "\n", "one\ttwo\n", "x\x1b[A\ry\u202e\udc80\n"):
        print(text, end="", file=terminal)
    assert stream.getvalue() == "\r 50%|\x1b[A\none\ttwo\nx\\x1b[A\\ry\\u202e\\udc80\n"


def test_what_an_encoding_lacks_is_written_in_ascii():
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, "ascii")
    terminal = Terminal(stream, breaks=False)
    terminal.write("33.1 ± 0.5 % é\n")
    terminal.flush()
    assert buffer.getvalue() == b"33.1 +- 0.5 % \\xe9\n"


@pytest.mark.parametrize("stream", [None, Full()], ids=["closed", "full"])
def test_a_command_ends_whatever_becomes_of_stderr(monkeypatch, capsys, stream):
    def main(args):
        print("warning", file=sys.stderr)
        say("more")
        for _ in Bar(iterable=range(3), desc="steps"):
            pass
        print("done", flush=True)

    monkeypatch.setattr(sys, "stderr", stream)
    assert run(main, []) == 0
    assert capsys.readouterr().out == "done\n"
    assert sys.stderr is stream


def test_the_library_works_without_stderr(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    say("nobody hears it")
    assert list(Bar(iterable=range(3), desc="steps")) == [0, 1, 2]


def test_lines_that_stdout_does_not_take_are_told_at_the_end(monkeypatch, capsys):
    done = []

    def main(args):
        for number in range(3):
            print(number, flush=True)
            done.append(number)

    monkeypatch.setattr(sys, "stdout", Full())
    assert run(main, []) == 2
    assert done == [0, 1, 2]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: stdout: cannot be written (No space left on device), so lines are missing there;")
    monkeypatch.setattr(sys, "stdout", None)
    assert run(main, []) == 0


def test_with_all_streams_closed_no_file_takes_their_numbers(tmp_path):
    code = (
        "import os, sys\n"
        "from smooseg_fast.command import run\n"
        "def main(args):\n"
        "    os.write(os.open(args[0], os.O_CREAT | os.O_WRONLY), b'kept')\n"
        "    os.write(1, b'spoilt'), os.write(2, b'spoilt'), print('spoilt')\n"
        "os._exit(run(main, [sys.argv[1]], quick=True))\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "file")]
    line = f"{shlex.join(words)} <&- >&- 2>&-"
    done = subprocess.run(["sh", "-c", line], env=os.environ | {"PYTHONPATH": PATHS}, timeout=100)
    assert done.returncode == 0
    assert (tmp_path / "file").read_bytes() == b"kept"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENAMETOOLONG, "File name too long", "x\ny"), "error: x y: the system refused it (File name too"),
        (
            PermissionError(errno.EACCES, "Permission denied", b"a\xff"),
            r"error: a\udcff: the system refused it (Perm",
        ),
        (OSError(errno.EIO, "Input/output error"), "error: the system refused it (Input/output error); the same"),
        (MemoryError(), "error: memory: does not hold what these settings ask for; give a smaller --size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "error: memory: does not hold what"),
        (RuntimeError("Could not determine home directory."), "error: ~: no such user has a home folder here; write"),
    ],
)
def test_what_the_system_says_is_one_line(capsys, error, line):
    assert run(raises(error), []) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(line)


def test_a_name_that_is_too_long(capsys):
    assert run(data.main, ["check", "x" * 300]) == 2
    assert capsys.readouterr().err.startswith("error: xxx")


def test_without_a_home_folder_the_cache_has_to_be_named(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(UserError, match="--cache: missing; HOME is not set"):
        default_cache()


@pytest.mark.skipif(not Path("/bin/bash").exists(), reason="needs bash")
@pytest.mark.parametrize("word", ["plain", "two words", "it's\n\\x\x1b[1m", "\u202eé", "caf\udce9"])
def test_a_word_of_a_command_line_can_be_typed(word):
    text = quoted(word)
    assert text.isprintable()
    done = subprocess.run(["/bin/bash", "-c", f"printf %s {text}"], capture_output=True)
    assert done.stdout == os.fsencode(word)


def test_warnings_of_decoders_name_the_file(capsys):
    with terminals():
        warnings.simplefilter("always")
        with about("a\x1b.png"):
            warnings.warn("Corrupt EXIF data.\nExpecting more", stacklevel=1)
    assert capsys.readouterr().err == "warning: a\\x1b.png: Corrupt EXIF data. Expecting more\n"


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs SIGHUP")
def test_a_lost_terminal_is_a_stop_unless_nohup_ignores_it(capsys):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        assert run(lambda args: signal.raise_signal(signal.SIGHUP), []) == 128 + signal.SIGHUP
        assert "interrupted; what was finished is kept" in capsys.readouterr().err
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with terminable(lambda: False):
            signal.raise_signal(signal.SIGHUP)
        assert command.run(lambda args: signal.raise_signal(signal.SIGHUP), []) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
