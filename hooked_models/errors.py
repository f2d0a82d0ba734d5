"""The package's own exception."""


class HookedModelError(ValueError):
    """Bad input: the message says what was found, what was expected and what to do."""
