"""The one exception that means: what the user gave cannot work, and here is why."""


class InputError(Exception):
    """A sentence for the user: what was given, what was expected, what to do. Exit code 2."""


class Diverged(InputError):
    """The loss or a gradient became NaN or infinite."""
