"""The error of everything that reads text or a vocabulary."""


class DataError(ValueError):
    """Text or a vocabulary that cannot be used; the message names the file, and the line if there is one."""
