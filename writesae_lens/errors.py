"""The package's own exception, and what an interruption becomes."""

from collections.abc import Iterator
from contextlib import contextmanager

from sae_lens.training._interruption import InterruptedException

from hooked_models.errors import HookedModelError

# Ctrl-C; while SAELens trains, its own exception.
INTERRUPTIONS = (KeyboardInterrupt, InterruptedException)


class WriteSAEError(HookedModelError):
    """Bad input: the message says what was found, what was expected and what to do."""


@contextmanager
def interruptible(advice: str) -> Iterator[None]:
    """Ctrl-C within becomes a `WriteSAEError` that says how to go on."""
    try:
        yield
    except INTERRUPTIONS as error:
        raise WriteSAEError(f"interrupted; {advice}") from error
