"""The package's own exception, and what an interruption by the user turns into."""

from collections.abc import Iterator
from contextlib import contextmanager

from hooked_models.errors import HookedModelError
from writesae_lens.saelens.upstream import InterruptedException

# What Ctrl-C raises, in general and once SAELens has trained.
INTERRUPTIONS = (KeyboardInterrupt, InterruptedException)


class WriteSAEError(HookedModelError):
    """Bad input: the message says what was found, what was expected and what to do."""


@contextmanager
def interruptible(advice: str) -> Iterator[None]:
    """Turn Ctrl-C within the block into a `WriteSAEError` whose message says how to go on."""
    try:
        yield
    except INTERRUPTIONS as error:
        raise WriteSAEError(f"interrupted; {advice}") from error
