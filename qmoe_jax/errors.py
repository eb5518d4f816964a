"""Errors that tell a user what to mend."""


class CheckpointError(ValueError):
    """A checkpoint is absent, damaged, of an unknown layout, or not of the model that was expected."""


class DataError(ValueError):
    """Text or a vocabulary that cannot be used; the message names the file, and the line if there is one."""


def listed(head: str, lines: list[str], limit: int = 20) -> str:
    """A message that lists problems one per line, the first `limit` of them."""
    more = [f"... and {len(lines) - limit} more"] if len(lines) > limit else []
    return "\n  ".join([head, *lines[:limit], *more])
