"""The two kinds of failure that end a command with one line instead of a traceback."""


class UserError(ValueError):
    """A mistake in what the user gave: names the key, the value and what is accepted. Exit code 2."""


class Failure(RuntimeError):
    """Something the command needs did not work: names the thing and the remedy. Exit code 1."""
