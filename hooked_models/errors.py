"""The package's own exception."""


class HookedModelError(ValueError):
    """Bad input: the message says what was found, what was expected and what to do."""


def one_line(error: Exception) -> str:
    """An exception's message without its line breaks, to go into another's."""
    return " ".join(str(error).split())
