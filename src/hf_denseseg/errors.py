"""The two ways a command can end badly."""


class InputError(ValueError):
    """What the user gave cannot be used (file, recipe, name, checkpoint); the message says what, where and the remedy.

    Commands print it as one line and exit with code 2.
    """


class RunError(RuntimeError):
    """Something failed while running (disk full, no network); the message says what is kept and how to go on.

    Commands print it as one line and exit with code 1.
    """
