"""One model class under test: how to build a tiny model of it, and the model in its three forms."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hooked_models import HookedRecurrent
from tests.conftest import randomise, save_tokenizer
from tests.hooked_models.oracles import Edits, Layer, Trace


def load_stock(folder: Path) -> Any:
    """A folder's model as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@dataclasses.dataclass(frozen=True)
class ModelClass:
    """A model class that the package hooks.

    Args:
        name: of the class, as in the ``architectures`` of a config.json; a variant after a blank:
            "FalconH1ForCausalLM without norm".
        family: the models that users know it by, for the table in the docs.
        build: makes a tiny model with transformers' own start values; parameters are then moved off them.
        oracle: the recurrent layer as a float64 loop.
        cells: heads, d_k and d_v of the recurrent layers.
        layers: which layers are recurrent.
        kind: `Cell.architecture`.
        reference: loads the folder's model without this package's hooks; transformers itself where it can.
        truth: what the reference is, for the docs.
        seed: of the parameters.
    """

    name: str
    family: str
    build: Callable[[], Any]
    oracle: type[Layer]
    cells: tuple[int, int, int]
    layers: tuple[int, ...]
    kind: str
    reference: Callable[[Path], Any] = load_stock
    truth: str = "transformers"
    seed: int = 0


@dataclasses.dataclass
class Case:
    """A tiny model of a class: hooked, without hooks, and its folder."""

    of: ModelClass
    folder: Path
    model: HookedRecurrent
    reference: Any

    @property
    def vocabulary(self) -> int:
        return self.model.cfg.d_vocab

    def tokens(self, *shape: int, seed: int = 0) -> Tensor:
        return torch.randint(4, self.vocabulary, shape, generator=torch.Generator().manual_seed(seed))

    def logits(self, tokens: Tensor) -> Tensor:
        """Those of the reference, in a full pass."""
        return self.reference(tokens, use_cache=False).logits

    def oracle(self, layer: int) -> Layer:
        return self.of.oracle(self.folder, layer)

    def trace(self, tokens: Tensor, layer: int) -> Trace:
        """The float64 loop of a recurrent layer, on what the reference gives to the layer."""
        seen: list[Trace] = []

        def look(module: Any, args: Any, kwargs: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            seen.append(self.oracle(layer)(hidden, v_first=kwargs.get("v_first")))

        module = self.reference.get_submodule(self.oracle(layer).name)
        handle = module.register_forward_pre_hook(look, with_kwargs=True)
        self.logits(tokens)
        handle.remove()
        return seen[0]

    @contextmanager
    def standing_in(self, layer: int, edits: Edits | None = None) -> Iterator[list[Trace]]:
        """While open, the float64 loop stands for one recurrent layer of the reference."""
        oracle = self.oracle(layer)
        module = self.reference.get_submodule(oracle.name)
        traces: list[Trace] = []

        def forward(hidden_states: Tensor, *_: Any, v_first: Tensor | None = None, **__: Any) -> Any:
            traces.append(oracle(hidden_states, None, edits, v_first))
            return oracle.returned(traces[-1], hidden_states.dtype)

        module.forward = forward
        try:
            yield traces
        finally:
            del module.forward

    @contextmanager
    def growing(self, layer: int, edits: Edits, size: Tensor) -> Iterator[None]:
        """While open, a layer of the reference adds ``size`` times what the edits do to its output."""
        oracle = self.oracle(layer)
        module = self.reference.get_submodule(oracle.name)

        def forward(hidden_states: Tensor, *_: Any, v_first: Tensor | None = None, **__: Any) -> Any:
            native, edited = (oracle(hidden_states, None, x, v_first) for x in (None, edits))
            output = native.output + size * (edited.output - native.output)
            return oracle.returned(dataclasses.replace(native, output=output), hidden_states.dtype)

        module.forward = forward
        try:
            yield
        finally:
            del module.forward


def build(of: ModelClass, folder: Path) -> Case:
    """The case of a model class, in a new folder.

    The model is randomised (`tests.conftest.SPREADS`): no scale is 1, no bias 0, decays from weak to strong.
    """
    torch.manual_seed(of.seed)
    model = of.build()
    randomise(model, of.seed)
    model.eval().save_pretrained(folder)
    save_tokenizer(folder)
    hooked = HookedRecurrent.boot_transformers(folder, device="cpu")
    return Case(of, folder, hooked, of.reference(folder))


@contextmanager
def temporary(of: ModelClass) -> Iterator[Case]:
    with tempfile.TemporaryDirectory() as folder:
        yield build(of, Path(folder))
