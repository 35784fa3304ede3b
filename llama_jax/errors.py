"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
    """A mistake in the input (config, files, flags), told in one line.

    Commands print its message without a traceback and exit with status 1 (see `cli.py`); in a
    notebook it is an ordinary `ValueError`. Anything else that escapes is a bug of ours and keeps
    its traceback.
    """
