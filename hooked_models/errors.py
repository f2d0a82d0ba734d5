"""The package's own exception."""

_LONGEST = 2000


class HookedModelError(ValueError):
    """Bad input. The message says what is wrong, what was expected and what to do.

    It is one printable line, also where it quotes a name with line breaks or control characters.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """Text of unknown origin, cut to a few lines' length and without characters that control a terminal."""
    shown = "".join(c if c.isprintable() else "?" for c in text[: _LONGEST + 1])
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}..."


def one_line(error: Exception | str) -> str:
    """An error's message without line breaks, to quote it in another one."""
    return " ".join(str(error).split())
