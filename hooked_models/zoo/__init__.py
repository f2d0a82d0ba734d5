"""Small trained models that ship with the package, and the scripts that made them."""

from importlib.resources import files
from pathlib import Path
from typing import Literal, get_args

from hooked_models.errors import HookedModelError

SHIPPED = ("tiny-gdn", "tiny-mamba2", "tiny-rwkv7")
"""Names of the models that `model_path` accepts."""
DEFAULT_CELLS = {"tiny-gdn": (1, 1), "tiny-mamba2": (2, 7), "tiny-rwkv7": (3, 3)}
"""(layer, head) of a cell of each model that the demo and the tutorials train an SAE on.

In these cells neither side of the writes is nearly constant: on validation text the native write with its
key, or its value, at the cell's mean recovers in the median at its own position 13 and 7% (tiny-gdn),
31 and 42% (tiny-mamba2), -8 and 3% (tiny-rwkv7).
"""
TRAINING_TOKENS = 350_000
"""On how many writes the documented SAEs were trained: the text is read almost four times for that."""
TEXT_NAME = "hooked_models/zoo/held_out.txt"
"""What an SAE's metadata name as its data set when it was trained on the shipped text."""

Part = Literal["train", "validation", "test"]
"""A part of the held-out text (`documents`)."""
PARTS: tuple[Part, ...] = get_args(Part)


def model_path(name: str) -> Path:
    """Folder of a shipped model, to pass to `from_pretrained`.

    Raises:
        ValueError: No model of that name ships; the message lists those that do.
    """
    if name not in SHIPPED:
        raise ValueError(f"no shipped model {name!r}; choose from: {', '.join(SHIPPED)}")
    return Path(str(files(__name__) / name.replace("-", "_")))


def held_out_text() -> str:
    """English text that no shipped model ever saw: documents, split by `<|endoftext|>` lines.

    It has three parts (`documents`), one of which SAEs are trained on: give experiments ``text("test")``.
    """
    return (Path(str(files(__name__))) / "held_out.txt").read_text(encoding="utf-8")


def documents(part: Part) -> list[str]:
    """The documents of a part of the held-out text; no two parts share one.

    ``train``, the first four fifths, is what SAEs are trained on; ``test``, the tenth after it, what
    experiments report on; ``validation``, the last tenth, what choices are made on while an SAE is made.

    Raises:
        HookedModelError: there is no such part.
    """
    if part not in PARTS:
        raise HookedModelError(f"the held-out text has no part {part!r}: choose {', '.join(PARTS)}")
    every = [document.strip() for document in held_out_text().split("<|endoftext|>")]
    trained = round(0.8 * len(every))
    tested = trained + (len(every) - trained) // 2
    return {"train": every[:trained], "test": every[trained:tested], "validation": every[tested:]}[part]


def text(part: Part) -> str:
    """A part of the held-out text as one text: its documents with blank lines between.

    Raises:
        HookedModelError: there is no such part.
    """
    return "\n\n".join(documents(part))


def part_name(part: Part) -> str:
    """What results and SAEs name a part of the held-out text."""
    return f"{TEXT_NAME}, {part} part"


def shipped_text() -> tuple[list[str], list[str]]:
    """Documents to train SAEs on, and documents to test them on: ``documents("train")`` and ``("test")``."""
    return documents("train"), documents("test")
