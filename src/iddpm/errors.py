"""The one error of this project's own."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """What a user can cause and mend: the message is one clear line that says the fix."""


def reason(error: BaseException) -> str:
    """What an error says, in one line."""
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


@contextmanager
def readable(what: object, problem: str = "cannot be read", fix: str = "repair or remove it") -> Iterator[None]:
    """UserError in the place of whatever a damaged or hostile file makes a library raise."""
    try:
        yield
    except UserError:  # also a storage that gives no answer, which says nothing about the file
        raise
    except Exception as e:
        raise UserError(f"{what} {problem} ({reason(e)}): {fix}") from None
