"""What the library raises when the input, not the code, is at fault."""


class HMGError(Exception):
    """Base of every error that a command prints as one line before it ends with a non-zero exit code."""


class InputError(HMGError, ValueError):
    """A file, a folder, a row or a setting is wrong: the text names it, what was expected, what came and the cure."""
