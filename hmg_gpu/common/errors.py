"""What the library raises when the input, not the code, is at fault."""


class HMGError(Exception):
    """Base of every error that a command prints as one line before it ends with a non-zero exit code.

    Example:
        >>> from hmg_gpu import HMGError
        >>> from hmg_gpu.data import read_image
        >>> try:
        ...     read_image("missing.png")
        ... except HMGError as error:
        ...     print(error)
        missing.png: does not exist; expected a PNG, TIFF, BMP or JPEG image
    """


class InputError(HMGError, ValueError):
    """A file, a folder, a row or a setting is wrong: the text names it, what was expected, what came and the cure.

    Example:
        >>> from hmg_gpu import HMGError, InputError
        >>> issubclass(InputError, HMGError), issubclass(InputError, ValueError)
        (True, True)
    """
