"""Small trained models that ship with the package, and the scripts that made them."""

from importlib.resources import files
from pathlib import Path

SHIPPED = ("tiny-gdn", "tiny-mamba2", "tiny-rwkv7")
"""Names of the models that `model_path` accepts."""
DEFAULT_CELLS = {"tiny-gdn": (1, 3), "tiny-mamba2": (4, 4), "tiny-rwkv7": (3, 0)}
"""(layer, head) of each model's best cell: the one that the demo and the tutorials train an SAE on."""
TRAINING_TOKENS = 600_000
"""On how many writes the documented SAEs were trained: the text is read almost four times for that."""
TEXT_NAME = "hooked_models/zoo/held_out.txt"
"""What an SAE's metadata name as its data set when it was trained on the shipped text."""


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


def shipped_text() -> tuple[list[str], list[str]]:
    """The held-out text's documents: the first four fifths to train SAEs on, the rest to test them on."""
    documents = [document.strip() for document in held_out_text().split("<|endoftext|>")]
    cut = round(0.8 * len(documents))
    return documents[:cut], documents[cut:]
