"""The package's own exception."""

_LONGEST = 2000


class HookedModelError(ValueError):
    """Bad input: the message says what was found, what was expected and what to do.

    It is one printable line, whatever the names are that it quotes.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """Text of unknown origin as one line that no terminal takes for commands, not too long."""
    shown = "".join(c if c.isprintable() else "?" for c in text[: _LONGEST + 1])
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}..."


def one_line(error: Exception | str) -> str:
    """A message without its line breaks, to go into another's."""
    return " ".join(str(error).split())
