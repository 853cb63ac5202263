"""The exceptions that a user is meant to see."""


class UserError(Exception):
    """A mistake of the user's: one line that names the argument or file, what was found and what to do.

    Command lines print it after `error: ` and exit with code 2, without a traceback; in Python it is an ordinary
    exception.
    """


class WriteError(UserError):
    """A file that could not be written, most often on a full disk. The file that stood there before is intact, and the
    same command can resume."""
