"""What the tests must know of each tiny model, and the marks that run a test on several of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import TopKSAE, TopKSAEConfig
from torch import Tensor
from transformers import DynamicCache

from hooked_models import HookedGatedDeltaNet, HookedMamba2, HookedModelError, HookedRWKV7
from hooked_models.modeling.rwkv7 import RWKV7Cache
from tests.hooked_models.oracles import LAYERS, Edits, Layer, Trace, standing_in

VOCABULARY = 200
TOLERANCE = 1e-4


def some_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(4, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert found.shape == expected.shape
    if not found.numel():
        return
    error = float((found.detach().double() - expected.detach().double()).abs().max())
    assert error <= tolerance, f"off by {error:.2e}"


def nothing(x: Tensor, hook: Any) -> None:
    return None


@contextmanager
def refused(*parts: str) -> Iterator[pytest.ExceptionInfo[HookedModelError]]:
    """The body raises the package's error, whose message is a single line that has these parts."""
    with pytest.raises(HookedModelError) as error:
        yield error
    message = str(error.value)
    assert "\n" not in message.strip()
    for part in parts:
        assert part in message, message


def greedy(model: Any, prompt: Tensor | str, count: int) -> Tensor:
    """The tokens of a prompt and its greedy continuation."""
    options = {"do_sample": False, "stop_at_eos": False, "return_type": "tokens", "verbose": False}
    return model.generate(prompt, max_new_tokens=count, **options)


def sae_at(name: str, d_in: int, seed: int = 0) -> TopKSAE:
    torch.manual_seed(seed)
    sae = TopKSAE(TopKSAEConfig(d_in=d_in, d_sae=40, k=4, device="cpu", dtype="float32"))
    sae.cfg.metadata.hook_name = name
    with torch.no_grad():
        for x in sae.parameters():
            x.copy_(0.1 * torch.randn_like(x))
    return sae


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A tiny model of the fixtures, from its configuration."""

    name: str
    mixer: type
    slot: str
    """Where a block keeps the mixer."""
    layers: tuple[int, ...]
    """The recurrent ones."""
    n_layers: int
    d_model: int
    heads: int
    d_k: int
    d_v: int
    erases: bool = True
    decay_per_channel: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        """Hooks that each head has."""
        return ("write", "erase", "state") if self.erases else ("write", "state")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The hooks of the docstring's table, with their shapes after [batch, pos]."""
        return {
            "in": (self.d_model,),
            "out": (self.d_model,),
            "write_key": (self.heads, self.d_k),
            "write_value": (self.heads, self.d_v),
            "read": (self.heads, self.d_k),
            "decay": (self.heads, self.d_k) if self.decay_per_channel else (self.heads,),
            "recurrence_out": (self.heads, self.d_v),
            "head_out": (self.heads, self.d_v),
        } | {f"{kind}.{head}": (self.d_k * self.d_v,) for kind in self.kinds for head in range(self.heads)}

    @property
    def some_cells(self) -> list[tuple[int, int]]:
        """The first and last head, the first and last layer, and one between."""
        first, *between, last = self.layers
        return [(first, self.heads - 1), *((layer, 2) for layer in between), (last, 0)]

    @property
    def list_of_cells(self) -> list[str]:
        """The parts of an error message that lists the model's cells."""
        return [f"layer {layer}: heads 0-{self.heads - 1}" for layer in self.layers]

    def point(self, layer: int, name: str) -> str:
        return f"blocks.{layer}.{self.slot}.hook_{name}"

    def matrices(self, *shape: int, seed: int = 1) -> Tensor:
        """Random matrices of the shape of a write."""
        return random(*shape, self.d_k, self.d_v, seed=seed)

    def unflatten(self, flat: Tensor) -> Tensor:
        """[batch, pos, d_k * d_v] -> [batch, pos, d_k, d_v]."""
        return flat.unflatten(-1, (self.d_k, self.d_v))

    def setting(
        self, kind: str, new: Tensor, head: int, *positions: tuple[Any, Any], also: Edits | None = None
    ) -> Edits:
        """One head's writes, erases or states set to ``new`` [batch, pos, d_k, d_v] at (rows, positions)."""
        values = torch.zeros(*new.shape[:2], self.heads, self.d_k, self.d_v, dtype=torch.float64)
        values[:, :, head] = new.double()
        is_set = torch.zeros(*new.shape[:2], self.heads, dtype=torch.bool)
        for row, position in positions:
            is_set[row, position, head] = True

        def change(native: Tensor) -> Tensor:
            return torch.where(is_set[..., None, None], values, native)

        edit: dict[str, Any] = {f"{kind}s": change if kind == "write" else (values, is_set)}
        return dataclasses.replace(also or Edits(), **edit)


@dataclasses.dataclass(frozen=True)
class Pair(Architecture):
    """A hooked model, the stock model of the same folder, and the folder."""

    model: Any = None
    reference: Any = None
    folder: Path = Path()

    def new_cache(self) -> dict[str, Any]:
        """Keyword arguments that make either model keep its past in an empty cache."""
        if self.mixer is HookedRWKV7:
            return {"past_key_values": RWKV7Cache(self.n_layers), "use_cache": True}
        name = "cache_params" if self.mixer is HookedMamba2 else "past_key_values"
        return {name: DynamicCache(config=self.reference.config), "use_cache": True}

    def oracle(self, layer: int) -> Layer:
        """One layer as a float64 loop."""
        return LAYERS[self.reference.config.model_type](self.folder, layer)

    def run(self, tokens: Tensor, layer: int, hooks: dict[str, Any], **kwargs: Any) -> Any:
        """Logits of the hooked model with hooks at one layer, by their names after "hook_"."""
        fwd_hooks = [(self.point(layer, name), hook) for name, hook in hooks.items()]
        return self.model.run_with_hooks(tokens, fwd_hooks=fwd_hooks, **kwargs)

    def activations(
        self, tokens: Tensor, layer: int, names: Iterable[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        """Activations of the hooked model at one layer, by the hooks' names after "hook_"."""
        points = {name: self.point(layer, name) for name in names}
        _, cache = self.model.run_with_cache(tokens, names_filter=list(points.values()), **kwargs)
        return {name: cache[point] for name, point in points.items()}

    def logits(self, tokens: Tensor, **kwargs: Any) -> Tensor:
        """Those of the stock model."""
        return self.reference(tokens, use_cache=False, **kwargs).logits

    def residuals(self, tokens: Tensor) -> list[Tensor]:
        """What enters each layer of the stock model (Mamba-2's hidden_states are what leaves them)."""
        seen: list[Tensor] = []
        blocks = self.reference.get_submodule(self.oracle(0).name.rsplit(".", 2)[0])

        def look(block: Any, args: Any) -> None:
            seen.append(args[0])

        handles = [block.register_forward_pre_hook(look) for block in blocks]
        self.logits(tokens)
        for handle in handles:
            handle.remove()
        return seen

    def truth(
        self, tokens: Tensor, layer: int, edits: Edits | None = None, **kwargs: Any
    ) -> tuple[Tensor, Trace]:
        """Logits of the stock model with the loop in one layer's place, and what the loop saw."""
        with torch.no_grad(), standing_in(self.reference, self.folder, layer, edits) as traces:
            logits = self.logits(tokens, **kwargs)
        return logits, traces[0]


HYBRID = Architecture("gated_delta_net", HookedGatedDeltaNet, "linear_attn", (0, 1, 3), 4, 64, 4, 16, 24)
MAMBA2 = Architecture("mamba2", HookedMamba2, "mixer", (0, 1, 2), 3, 28, 8, 32, 14, erases=False)
RWKV7 = Architecture("rwkv7", HookedRWKV7, "attn", (0, 1, 2), 3, 64, 4, 16, 24, decay_per_channel=True)
MODELS: dict[str, Architecture] = {
    "gdn": HYBRID,
    "qwen3_next": HYBRID,
    "mamba2": MAMBA2,
    "rwkv7": RWKV7,
    "mamba2_plain": dataclasses.replace(MAMBA2, layers=(0, 1), n_layers=2),
    "rwkv7_fused": dataclasses.replace(RWKV7, layers=(0, 1), n_layers=2, d_v=8),
}


def on(*names: str) -> pytest.MarkDecorator:
    """Run a test on these models (without it: on both layouts of Gated DeltaNet, Mamba-2 and RWKV-7)."""
    return pytest.mark.parametrize("pair", names, indirect=True)


on_every_model = on(*MODELS)
once_per_architecture = on("gdn", "mamba2", "rwkv7")
where_something_is_erased = on("gdn", "rwkv7")


def at_some_cells(*names: str) -> pytest.MarkDecorator:
    """Run a test at some (layer, head) of these models."""
    cells = [(name, *cell) for name in names for cell in MODELS[name].some_cells]
    return pytest.mark.parametrize(("pair", "layer", "head"), cells, indirect=["pair"])
