"""Small trained models that ship with the package, and the scripts that made them."""

from importlib.resources import files
from pathlib import Path

SHIPPED = ("tiny-gdn",)
"""Names of the models that `model_path` and `held_out_text` accept."""


def model_path(name: str) -> Path:
    """Folder of a shipped model, to pass to `from_pretrained`.

    Raises:
        ValueError: No model of that name ships; the message lists those that do.
    """
    if name not in SHIPPED:
        raise ValueError(f"no shipped model {name!r}; choose from: {', '.join(SHIPPED)}")
    return Path(str(files(__name__) / name.replace("-", "_")))


def held_out_text(name: str) -> str:
    """English text that a shipped model never saw: documents, split by `<|endoftext|>` lines."""
    return (model_path(name) / "held_out.txt").read_text(encoding="utf-8")
