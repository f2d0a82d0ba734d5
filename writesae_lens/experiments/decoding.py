"""Decoding with edited cells: many continuations of each prompt from one cached prefix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_models import HookedRecurrent
from hooked_models.bridge.lower_layers import LowerLayers, run_lower_layers
from hooked_models.caches import repeated
from hooked_models.hooked_recurrent import Cell
from hooked_models.unembedding import logits_of, run_to_residual
from writesae_lens.experiments.passes import cache_of, check_finite

Added = Mapping[Cell, Float[Tensor, "row pos d_k d_v"]]
"""Matrices that are added to the native writes of some cells."""

# Logits over all rows of a group of prompts, which bounds how many are decoded together.
LOGITS_PER_PASS = 2**27


class Prefix:
    """The caches of some prompts, computed once; `run` continues each prompt in any number of rows.

    Args:
        model: the model.
        layer: the lowest one whose writes are edited.
        tokens: ``[prompt, pos]``: the tokens, one or more, that all rows of a prompt share.
    """

    def __init__(self, model: HookedRecurrent, layer: int, tokens: Int[Tensor, "prompt pos"]) -> None:
        self._model, self._layer, self._n_prompts = model, layer, len(tokens)
        self._cache = cache_of(model, tokens)

    def run(
        self, tokens: Int[Tensor, "row pos"], added: Added | None = None
    ) -> tuple[Float[Tensor, "row d_vocab"], Any]:
        """Logits after each row's last token, and the rows' cache.

        Args:
            tokens: equally many rows for each prompt, prompt by prompt.
            added: matrices that are added to native writes.

        Raises:
            WriteSAEError: the logits are not finite.
        """
        cache = repeated(self._cache, len(tokens) // self._n_prompts)
        return self.go_on(tokens, cache, added), cache

    def go_on(
        self, tokens: Int[Tensor, "row pos"], cache: Any, added: Added | None = None
    ) -> Float[Tensor, "row d_vocab"]:
        """Logits after further tokens of the rows that ``cache`` holds; in float32 at least.

        Raises:
            WriteSAEError: they are not finite.
        """
        residual = self._residual(tokens, cache, added)
        logits = logits_of(self._model, residual[:, -1])
        check_finite("logits", residual, logits)
        return logits

    def lower_layers(self, tokens: Int[Tensor, "prompt pos"]) -> LowerLayers | None:
        """What the layers below the edited ones make of a continuation of each prompt (None: nothing)."""
        cache = repeated(self._cache, 1)
        return run_lower_layers(self._model, tokens, self._layer, past_key_values=cache, use_cache=True)

    def residual(
        self, tokens: Int[Tensor, "row pos"], added: Added | None = None, lower: LowerLayers | None = None
    ) -> Float[Tensor, "row pos d_model"]:
        """The residual stream after the last layer in rows that go on from their prompts' caches.

        Args:
            tokens: equally many rows for each prompt, prompt by prompt.
            added: matrices that are added to native writes.
            lower: what the lower layers make of the rows' tokens, where it is known.

        Raises:
            WriteSAEError: it is not finite.
        """
        unused = 0 if lower is None else lower.layer
        cache = repeated(self._cache, len(tokens) // self._n_prompts, unused)
        residual = self._residual(tokens, cache, added, lower)
        check_finite("logits", residual)
        return residual

    def _residual(
        self, tokens: Tensor, cache: Any, added: Added | None, lower: LowerLayers | None = None
    ) -> Float[Tensor, "row pos d_model"]:
        def adding(matrices: Tensor) -> Callable[..., Tensor]:
            return lambda write, hook: write + matrices.flatten(-2).to(write.dtype)

        name = self._model.write_hook_name
        hooks: list[Any] = [(name(c.layer, c.head), adding(x)) for c, x in (added or {}).items()]
        with self._model.hooks(fwd_hooks=hooks):
            return run_to_residual(self._model, tokens, past_key_values=cache, use_cache=True, lower=lower)

    @torch.no_grad()
    def decode(
        self,
        logits: Float[Tensor, "row d_vocab"],
        cache: Any,
        n_tokens: int,
        temperature: float,
        seed: int,
        added: Mapping[Cell, Float[Tensor, "row d_k d_v"]] | None = None,
    ) -> Int[Tensor, "row token"]:
        """The next ``n_tokens`` tokens of every row.

        Args:
            logits: for the first of these tokens.
            cache: the rows' cache; it is changed.
            n_tokens: number of tokens.
            temperature: 0 takes the likeliest token, else tokens are drawn. Rows of one prompt share their
                random numbers, so that they differ by their edits alone.
            seed: seed of the draws.
            added: matrices that are added to native writes at every decoded token that is read.
        """
        rng, chosen = torch.Generator().manual_seed(seed), []
        every = None if added is None else {cell: x[:, None] for cell, x in added.items()}
        for step in range(n_tokens):
            if temperature > 0:
                # The largest of logits with Gumbel noise is a draw from their softmax.
                noise = torch.rand(self._n_prompts, logits.shape[-1], generator=rng).clamp(min=1e-20)
                noise = (-(-noise.log()).log()).repeat_interleave(len(logits) // self._n_prompts, dim=0)
                logits = logits.float() / temperature + noise.to(logits.device)
            chosen.append(logits.argmax(-1))
            if step < n_tokens - 1:
                logits = self.go_on(chosen[-1][:, None], cache, every)
        return torch.stack(chosen, dim=1)


def batches(n_prompts: int, logits_per_prompt: int) -> list[slice]:
    """Groups of prompts that are decoded in one batch: 16, or fewer where the vocabulary is large."""
    step = min(16, max(1, LOGITS_PER_PASS // logits_per_prompt))
    return [slice(start, start + step) for start in range(0, n_prompts, step)]
