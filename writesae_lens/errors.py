"""The package's own exception."""

from collections.abc import Iterator
from contextlib import contextmanager

from hooked_models.errors import HookedModelError


class WriteSAEError(HookedModelError):
    """Bad input: the message says what was found, what was expected and what to do."""


@contextmanager
def interruptible(advice: str) -> Iterator[None]:
    """Ctrl-C within becomes a `WriteSAEError` that says how to go on."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise WriteSAEError(f"interrupted; {advice}") from error
