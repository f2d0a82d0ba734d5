"""The package's own exception."""

from hooked_models.errors import HookedModelError


class WriteSAEError(HookedModelError):
    """Bad input: the message says what was found, what was expected and what to do."""
