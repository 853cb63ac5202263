"""What every command line does with an error and with Ctrl-C."""

import signal

import pytest

from smooseg_fast.command import run
from smooseg_fast.errors import UserError
from smooseg_fast.signals import Interrupted


def raises(error):
    def main(args):
        raise error

    return main


def test_an_error_of_the_users_is_one_line(capsys):
    assert run(raises(UserError("--data x:\n  is odd; give y")), []) == 2
    assert capsys.readouterr() == ("", "error: --data x: is odd; give y\n")


def test_ctrl_c_says_that_the_same_command_goes_on(capsys):
    assert run(raises(KeyboardInterrupt()), []) == 130
    assert capsys.readouterr() == ("", "interrupted; what was finished is kept: the same command goes on from it\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_raised_interrupted_has_said_it_already(capsys, number):
    assert run(raises(Interrupted(number)), []) == 128 + number
    assert capsys.readouterr() == ("", "")


def test_other_errors_are_ours_and_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run(raises(ZeroDivisionError()), [])
