"""Independent truths that the experiments are compared with: plain passes with edits, plain encodings."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from sae_lens import TopKSAE, TopKSAEConfig
from torch import Tensor

from hooked_models import HookedRecurrent, edited_runs, zoo
from writesae_lens import WriteSAE, WriteSAEConfig
from writesae_lens.experiments import sign, swaps
from writesae_lens.experiments.decoding import Prefix

LAYER, HEAD = 1, 2
"""The cell that all of these tests look at."""

SUBJECTS = [
    ("tiny-gdn", "write", {}),
    ("tiny-mamba2", "write", {}),
    ("tiny-rwkv7", "write", {}),
    ("tiny-gdn", "state", {}),
    ("tiny-mamba2", "write", {"rank": 2}),
    ("tiny-rwkv7", "flat", {}),
]
every_subject = pytest.mark.parametrize(("model", "kind", "options"), SUBJECTS, indirect=["model"])
"""Every architecture and every kind of SAE: a test's ``model``, and arguments of `make_sae`."""


def make_sae(model: Any, kind: str = "write", layer: int = LAYER, head: int = HEAD, **options: Any) -> Any:
    """A random SAE of 32 atoms: of kind "write", "state", or "flat" (SAELens's TopK, on writes)."""
    torch.manual_seed(options.pop("seed", 0))
    cell = model.cell(layer, head)
    if kind == "flat":
        sizes = {"d_sae": 32, "k": 2, "rescale_acts_by_decoder_norm": False} | options
        sae, kind = TopKSAE(TopKSAEConfig(d_in=cell.d_k * cell.d_v, **sizes)), "write"
    else:
        sae = WriteSAE(WriteSAEConfig(d_k=cell.d_k, d_v=cell.d_v, **({"d_sae": 32, "k": 2} | options)))
    sae.cfg.metadata.hook_name = getattr(model, f"{kind}_hook_name")(layer, head)
    sae.cfg.metadata.model_name = model.cfg.model_name
    return sae


def make_codes(model: Any, kind: str = "write", layer: int = LAYER, head: int = HEAD, **options: Any) -> Any:
    """A random SAE of 16 key codes and 16 value codes, two active a side, with the means of random writes."""
    sizes = {"n_key": 16, "n_value": 16, "k_key": 2, "k_value": 2}
    sae = make_sae(model, kind, layer, head, decoder="codes", **(sizes | options))
    with torch.no_grad():
        for mean in (sae.mean_key, sae.mean_value, sae.sign_key, sae.sign_value):
            mean.copy_(torch.nn.functional.normalize(torch.randn_like(mean), dim=-1))
    return sae


def silenced(sae: Any, atom: int | slice = slice(None)) -> Any:
    """The SAE with an atom, or all of them, never active."""
    with torch.no_grad():
        sae.b_enc[atom] = -1e3
    return sae


def read_passages(model: Any, n: int = 2, length: int = 20) -> Tensor:
    """The first passages of the shipped text, [n, length]."""
    text = zoo.held_out_text()[: 20 * n * length]
    return model.to_tokens(text, prepend_bos=False, truncate=False)[0, : n * length].view(n, length)


def cached(model: Any, tokens: Tensor, name: str) -> Tensor:
    """The activation at a hook, from a plain pass."""
    with torch.no_grad():
        return model.run_with_cache(tokens, names_filter=[name])[1][name]


def writes(model: Any, tokens: Tensor, layer: int = LAYER, head: int = HEAD) -> Tensor:
    """Native writes, [passage, pos, d_k, d_v] in float64, from the activation at their hook."""
    cell = model.cell(layer, head)
    return (
        cached(model, tokens, model.write_hook_name(layer, head)).double().unflatten(-1, (cell.d_k, cell.d_v))
    )


def encoded(model: Any, sae: Any, tokens: Tensor) -> Tensor:
    """Coefficients of all atoms, [passage, pos, atom], from the activation at the SAE's own hook."""
    with torch.no_grad():
        return sae.encode(cached(model, tokens, sae.cfg.metadata.hook_name)).double()


def atoms_of(sae: Any, model: Any) -> Tensor:
    """The decoder's atoms as matrices, [atom, d_k, d_v] in float64."""
    cell = model.cell(LAYER, HEAD)
    return sae.W_dec.detach().double().view(-1, cell.d_k, cell.d_v)


def dominant_atoms(model: Any, sae: Any, tokens: Tensor) -> set[int]:
    """The atoms that are the most active at some position."""
    acts = encoded(model, sae, tokens).flatten(0, 1)
    return {int(row.argmax()) for row in acts if row.max() > 0}


def output_weights(model: Any, layer: int, head: int) -> tuple[Tensor, Tensor]:
    """W_O of a head, [d_model, d_v], and W_U, [d_vocab, d_model], from the native weights, in float64."""
    pattern = re.compile(rf".*\blayers\.{layer}\..*\bo(ut)?_proj\..*weight")
    (w_o,) = (x for name, x in model.original_model.named_parameters() if pattern.fullmatch(name))
    w_u, d_v = model.original_model.get_output_embeddings().weight, model.cell(layer, head).d_v
    return w_o[:, head * d_v : (head + 1) * d_v].detach().double(), w_u.detach().double()


def logits_with_added(
    model: Any,
    passage: Tensor,
    positions: Tensor,
    matrices: Sequence[Tensor],
    layer: int = LAYER,
    head: int = HEAD,
) -> tuple[Tensor, Tensor]:
    """Logits [position, d_vocab] of full passes in which a hook adds the matrix to the write; native ones."""
    name = model.write_hook_name(layer, head)
    return _edited_logits(model, passage, positions, {name: lambda write, matrix: write + matrix}, matrices)


def logits_with_swapped(
    model: Any,
    passage: Tensor,
    positions: Tensor,
    matrices: Sequence[Tensor],
    layer: int = LAYER,
    head: int = HEAD,
    erase: bool = True,
) -> tuple[Tensor, Tensor]:
    """The same with the matrix in the write's place, and (erase=False) nothing erased there."""
    name = model.write_hook_name(layer, head)
    edits: dict[str, Callable[[Tensor, Tensor], Tensor]] = {name: lambda write, matrix: matrix}
    if not erase and model.mixers[layer].erases:
        edits[name.replace("hook_write", "hook_erase")] = lambda erased, matrix: torch.zeros_like(erased)
    return _edited_logits(model, passage, positions, edits, matrices)


def _edited_logits(
    model: Any,
    passage: Tensor,
    positions: Tensor,
    edits: dict[str, Callable[[Tensor, Tensor], Tensor]],
    matrices: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    rows, given = torch.arange(len(positions)), torch.stack(list(matrices)).flatten(1)

    def hook(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[rows, positions] = edits[hook.name](x[rows, positions], given.to(x))
        return x

    with torch.no_grad():
        native = model(passage[None])[0, positions]
        hooks = [(name, hook) for name in edits]
        changed = model.run_with_hooks(passage.expand(len(positions), -1), fwd_hooks=hooks)
    return changed[rows, positions].double(), native.double()


def kl_nats(patched: Tensor, base: Tensor) -> Tensor:
    """KL(patched || base) of logits, in float64."""
    p, b = patched.double().log_softmax(-1), base.double().log_softmax(-1)
    return (p.exp() * (p - b)).sum(-1)


class Edits(NamedTuple):
    """What the model was given in one call: matrices [n, d_k, d_v] in float64, each at a position."""

    passage: list[int]
    positions: Tensor
    matrices: Tensor


def recorded_edits(monkeypatch: pytest.MonkeyPatch, method: str) -> list[Edits]:
    """Fills with the calls of a method such as ``run_with_added_writes``, on any model."""
    calls: list[Edits] = []
    run = getattr(HookedRecurrent, method)

    def spy(
        self: Any, passage: Tensor, layer: int, head: int, positions: Tensor, *factors: Any, **options: Any
    ):
        keys, values = (f if f.ndim == 3 else f[:, None] for f in factors[:2])
        calls.append(Edits(passage.tolist(), positions, (keys.mT @ values).double()))
        return run(self, passage, layer, head, positions, *factors, **options)

    monkeypatch.setattr(HookedRecurrent, method, spy)
    return calls


def recorded_swaps(monkeypatch: pytest.MonkeyPatch) -> list[Edits]:
    """Fills with the runs with swapped writes of the experiments, on any model."""
    calls: list[Edits] = []
    run = edited_runs.residual_with_swapped_writes

    def spy(model: Any, passage: Tensor, cell: Any, positions: Tensor, *given: Any, **options: Any):
        keys, values = given[:2]
        calls.append(Edits(passage.tolist(), positions, (keys.mT @ values).detach().double()))
        return run(model, passage, cell, positions, *given, **options)

    for module in (swaps, sign):
        monkeypatch.setattr(module, "residual_with_swapped_writes", spy)
    return calls


class Step(NamedTuple):
    """One call of `Prefix.go_on` with something added: tokens, what was added in each cell, logits."""

    tokens: Tensor
    added_in: dict[Any, Tensor]
    logits: Tensor

    @property
    def added(self) -> Tensor:
        """What was added in the one cell that there is."""
        (added,) = self.added_in.values()
        return added


def recorded_steps(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """Fills with the steps of decoding in which something is added (not those that are differentiated)."""
    steps: list[Step] = []
    go_on = Prefix.go_on

    def spy(self: Prefix, tokens: Tensor, cache: Any, added: Any = None) -> Tensor:
        logits = go_on(self, tokens, cache, added)
        if added is not None and not torch.is_grad_enabled():
            steps.append(Step(tokens, {cell: x.clone() for cell, x in added.items()}, logits))
        return logits

    monkeypatch.setattr(Prefix, "go_on", spy)
    return steps


def column(frame: pd.DataFrame, name: str) -> Tensor:
    """A column of records as a tensor."""
    return torch.as_tensor(frame[name].to_numpy(copy=True))


def is_rank_1(matrices: Tensor, tolerance: float = 1e-4) -> bool:
    """Whether matrices [..., d_k, d_v] have one singular value that is not rounding."""
    values = torch.linalg.svdvals(matrices.double())
    return bool((values[..., 1] < tolerance * values[..., 0]).all())


def wilson(wins: Any, z: float = 1.959963984540054) -> list[float]:
    """Wilson's 95% interval of a share."""
    n, p = len(wins), float(np.mean(wins))
    centre, spread = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [(centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)]


def bootstrap_interval(groups: Sequence[Any], figure: Callable[[Any], Any]) -> Any:
    """95% interval of a figure over all resamples of few groups, each as likely as any other."""
    values = [figure(np.concatenate(draw)) for draw in product(groups, repeat=len(groups))]
    return np.quantile(values, [0.025, 0.975], method="inverted_cdf")
