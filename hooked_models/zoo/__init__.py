"""Small trained models that ship with the package, and the scripts that made them."""

from importlib.resources import files
from pathlib import Path

SHIPPED = ("tiny-gdn", "tiny-mamba2", "tiny-rwkv7")
"""Names of the models that `model_path` accepts."""


def model_path(name: str) -> Path:
    """Folder of a shipped model, to pass to `from_pretrained`.

    Raises:
        ValueError: No model of that name ships; the message lists those that do.
    """
    if name not in SHIPPED:
        raise ValueError(f"no shipped model {name!r}; choose from: {', '.join(SHIPPED)}")
    return Path(str(files(__name__) / name.replace("-", "_")))


def held_out_text() -> str:
    """English text that no shipped model ever saw: documents, split by `<|endoftext|>` lines."""
    return (Path(str(files(__name__))) / "held_out.txt").read_text(encoding="utf-8")
