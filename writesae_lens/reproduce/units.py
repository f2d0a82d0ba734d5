"""What one token, one unembedded position and one comparison cost, of a model on this machine.

A model that is at hand is timed on a few tokens. Of one that is not, its sizes say how many operations a
unit takes, and this machine's speed is measured in about a second: a dense product, the KL of a few rows of
numbers, and a product of a matrix and a vector, which is bound by memory.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_models import HookedRecurrent
from hooked_models.caches import repeated
from hooked_models.unembedding import logits_of, run_to_residual
from writesae_lens.divergences import divergence
from writesae_lens.reproduce.work import Work

# Share of a dense product's speed that layers and unembeddings reach (`make bench-full`).
_EFFICIENCY = 0.67
# Tokens of a row of the timed passes, about as many as an experiment's rows have after an edit; rows of the
# long pass, and those of a model whose pass over one row takes more seconds than the last number.
_LENGTH, _ROWS, _ROWS_OF_LARGE, _IS_LARGE = 48, 8, 2, 0.3
# Tokens of the short pass, which is mostly what any pass costs.
_SHORT = 8


class Size(NamedTuple):
    """Sizes of a model, from its published configuration.

    Args:
        n_parameters: of the language model, with the embedding.
        tied: whether the unembedding is the embedding.
    """

    n_parameters: float
    n_layers: int
    d_model: int
    d_vocab: int
    tied: bool

    @staticmethod
    def of(model: HookedRecurrent) -> Size:
        """The sizes of a model that is loaded."""
        native: Any = model.original_model
        embeddings = native.get_input_embeddings().weight, native.get_output_embeddings().weight
        n_parameters = sum(p.numel() for p in native.parameters())
        cfg = model.cfg
        return Size(n_parameters, cfg.n_layers, cfg.d_model, cfg.d_vocab, embeddings[0] is embeddings[1])


class Speeds(NamedTuple):
    """What a machine does in a second.

    Args:
        product: operations of a dense product in the model's number format.
        wide_product: the same in float32, in which logits are computed.
        compared: numbers of a distribution that are compared with another.
        read: bytes of weights that are read.
    """

    product: float
    wide_product: float
    compared: float
    read: float

    @staticmethod
    @functools.cache
    @torch.no_grad()
    def of(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Speeds:
        """Measure this machine, in about a second, once."""

        def product(of: torch.dtype) -> float:
            x, weight = (torch.randn(n, 1024, device=device).to(of) for n in (256, 4096))
            return 2 * 256 * weight.numel() / seconds(lambda: x @ weight.mT, device)

        large = torch.randn(4096, 4096, device=device, dtype=dtype)
        logits = torch.randn(32, 2**17, device=device)
        wide = product(torch.float32)
        return Speeds(
            wide if dtype == torch.float32 else product(dtype),
            wide,
            logits.numel() / _compare(logits),
            large.numel() * large.element_size() / seconds(lambda: large @ large[0], device),
        )


class Units(NamedTuple):
    """Seconds that a unit of each kind of work takes (`writesae_lens.reproduce.work.Work`)."""

    below: float
    above: float
    unembedded: float
    compared: float
    call: float

    def seconds(self, work: Work) -> float:
        """Seconds of some work."""
        return sum(count * unit for count, unit in zip(work, self, strict=True))

    @staticmethod
    def of_size(size: Size, layer: int, speeds: Speeds, width: int) -> Units:
        """By arithmetic: two operations per parameter and token; ``width`` is the bytes of a parameter."""
        unembedding = size.d_model * size.d_vocab
        layers = size.n_parameters - unembedding * (1 if size.tied else 2)
        token = 2 * layers / speeds.product / _EFFICIENCY
        below = (layer + 1) / size.n_layers
        return Units(
            token * below,
            token * (1 - below),
            2 * unembedding / speeds.wide_product / _EFFICIENCY,
            size.d_vocab / speeds.compared,
            size.n_parameters * width / speeds.read,
        )

    @staticmethod
    @torch.no_grad()
    def of_model(model: HookedRecurrent, layer: int) -> Units:
        """From passes of the model over a few rows of tokens, whole ones and such as stop after the layer.

        What a pass costs beside its tokens is that of a short edited pass that goes on from a cache.
        """
        device, vocabulary = str(model.cfg.device), model.cfg.d_vocab
        rng = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, vocabulary, (_ROWS, _LENGTH), generator=rng).to(device)

        def run(rows: int) -> float:
            return seconds(lambda: run_to_residual(model, tokens[:rows], use_cache=False), device)

        one = run(1)
        rows = _ROWS if one < _IS_LARGE else _ROWS_OF_LARGE
        every = run(rows)
        first = seconds(lambda: model(tokens[:rows], stop_at_layer=layer + 1, use_cache=False), device)
        token = min(every / rows, max(every - one, 0) / (rows - 1)) / _LENGTH
        residual = run_to_residual(model, tokens[:2], use_cache=False).flatten(0, 1)
        logits = logits_of(model, residual)
        below = token * min(1.0, first / every)
        unembedded = seconds(lambda: logits_of(model, residual), device) / len(residual)
        call = _edited(model, layer, tokens[:1, :_SHORT]) - _SHORT * (token + unembedded)
        return Units(below, token - below, unembedded, _compare(logits) / len(logits), max(0.0, call))


def _edited(model: HookedRecurrent, layer: int, tokens: Int[Tensor, "batch pos"]) -> float:
    """Seconds of a pass that goes on from a cache and edits a write of the layer."""
    cell = next(cell for cell in model.cells if cell.layer == layer)
    hooks = [(model.write_hook_name(layer, cell.head), lambda write, hook: 0.5 * write)]
    past = model.new_cache()
    model(tokens, past_key_values=past, use_cache=True)

    def run() -> None:
        with model.hooks(fwd_hooks=hooks):
            model(tokens, past_key_values=repeated(past, 1), use_cache=True)

    return seconds(run, str(model.cfg.device))


def _compare(logits: Float[Tensor, "row d_vocab"]) -> float:
    """Seconds of the KLs of some rows to rows nearby, as edits give them."""
    near = logits + 0.01 * torch.randn_like(logits)
    return seconds(lambda: divergence(near, logits), str(logits.device))


def seconds(run: Callable[[], object], device: str = "cpu", least: float = 0.15) -> float:
    """The shortest of several runs' seconds, the first not counted; a run over ten ``least`` is the only one.

    On one thread of a CPU these are the thread's own seconds: what else the machine does does not count. With
    several threads it does, and threads that wait for each other can take many times as long.
    """
    alone = device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    times: list[float] = []
    start = clock()
    while len(times) < 2 or clock() - start < least:
        began = clock()
        run()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(clock() - began)
        if times[0] > 10 * least:
            return times[0]
    return min(times[1:])
