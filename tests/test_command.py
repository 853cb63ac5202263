"""What every command line does with an error and with Ctrl-C."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import smooseg_fast
from smooseg_fast.command import run
from smooseg_fast.errors import UserError, WriteError
from smooseg_fast.system.signals import Interrupted


def raises(error):
    def main(args):
        raise error

    return main


def test_an_error_of_the_users_is_one_line(capsys):
    assert run(raises(UserError("--data x:\n  is odd; give y")), []) == 2
    assert capsys.readouterr() == ("", "error: --data x: is odd; give y\n")


AGAIN = "python -m test_command --out 'my runs'"


def test_ctrl_c_says_what_resumes(capsys):
    assert run(raises(KeyboardInterrupt()), ["--out", "my runs"]) == 130
    assert capsys.readouterr() == ("", f"interrupted; what was finished is kept\nresume     {AGAIN}\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_knows_what_is_kept_says_it(capsys, number):
    assert run(raises(Interrupted(number, "step 3 is saved")), ["--out", "my runs"]) == 128 + number
    assert capsys.readouterr() == ("", f"interrupted; step 3 is saved\nresume     {AGAIN}\n")


def test_sigterm_anywhere_is_said_like_ctrl_c(capsys):
    before = signal.getsignal(signal.SIGTERM)
    assert run(lambda args: signal.raise_signal(signal.SIGTERM), []) == 143
    assert "resume     python -m test_command" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_full_disk_says_what_resumes(capsys):
    assert run(raises(WriteError("a.png: cannot be written (full); free some space")), ["--out", "my runs"]) == 2
    assert capsys.readouterr() == (
        "",
        f"error: a.png: cannot be written (full); free some space; to resume then: {AGAIN}\n",
    )


def test_a_reader_that_has_gone_is_no_news():
    """As of `... --help | head -1`: what is printed behind it, and what Python flushes at its end, goes nowhere."""
    paths = [str(Path(smooseg_fast.__file__).parents[1]), *sys.path]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "smooseg_fast.choose", "--help"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        timeout=100,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_other_errors_are_ours_and_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run(raises(ZeroDivisionError()), [])
