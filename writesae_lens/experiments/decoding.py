"""Decoding with an edited cell, many continuations of one prompt at once from one cached prefix."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_models import HookedRecurrent
from hooked_models.caches import repeated
from hooked_models.hooked_recurrent import Cell
from writesae_lens.experiments.passes import LOGITS_PER_PASS

Added = Float[Tensor, "row pos d_k d_v"]


class Prefix:
    """Prompts' caches, run once; `run` goes on from them with any number of rows each, as often as wanted.

    Args:
        tokens: ``[prompt, pos]``; what all rows of a prompt have in common, at least one token.
    """

    def __init__(self, model: HookedRecurrent, cell: Cell, tokens: Int[Tensor, "prompt pos"]) -> None:
        self._model, self._name = model, model.write_hook_name(cell.layer, cell.head)
        self._cache, self._n_prompts = model.new_cache(), len(tokens)
        with torch.no_grad():
            for part in tokens.split(max(1, LOGITS_PER_PASS // len(tokens) // model.cfg.d_vocab), dim=1):
                model(part, past_key_values=self._cache, use_cache=True)

    def run(
        self, tokens: Int[Tensor, "row pos"], added: Added | None = None
    ) -> tuple[Float[Tensor, "row pos d_vocab"], Any]:
        """Logits of the rows after the prefixes, and their cache; ``added`` joins the cell's native writes.

        Rows come prompt by prompt, as many for each.
        """
        cache = repeated(self._cache, len(tokens) // self._n_prompts)
        return self.go_on(tokens, cache, added), cache

    def go_on(
        self, tokens: Int[Tensor, "row pos"], cache: Any, added: Added | None = None
    ) -> Float[Tensor, "row pos d_vocab"]:
        """Logits of more tokens of the same rows."""

        def add(write: Tensor, hook: Any) -> Tensor:
            assert added is not None
            return write + added.flatten(-2).to(write.dtype)

        hooks = [] if added is None else [(self._name, add)]
        with self._model.hooks(fwd_hooks=hooks):
            return self._model(tokens, past_key_values=cache, use_cache=True)

    @torch.no_grad()
    def decode(
        self,
        logits: Float[Tensor, "row d_vocab"],
        cache: Any,
        n_tokens: int,
        temperature: float,
        seed: int,
        added: Float[Tensor, "row d_k d_v"] | None = None,
    ) -> Int[Tensor, "row token"]:
        """Tokens that follow.

        Args:
            logits: of the first of them.
            temperature: 0 takes the likeliest token, else one is drawn. Rows of one prompt share their
                random draws, so that what differs between them is what was edited.
            seed: of the draws.
            added: what joins the cell's native write at every token that is fed back.
        """
        rng, chosen = torch.Generator().manual_seed(seed), []
        every = None if added is None else added[:, None]
        for step in range(n_tokens):
            if temperature > 0:
                # The largest of logits with Gumbel noise is a draw from their softmax.
                noise = torch.rand(self._n_prompts, logits.shape[-1], generator=rng).clamp(min=1e-20)
                noise = (-(-noise.log()).log()).repeat_interleave(len(logits) // self._n_prompts, dim=0)
                logits = logits.float() / temperature + noise.to(logits.device)
            chosen.append(logits.argmax(-1))
            if step < n_tokens - 1:
                logits = self.go_on(chosen[-1][:, None], cache, every)[:, -1]
        return torch.stack(chosen, dim=1)


def batches(n_prompts: int, logits_per_prompt: int) -> list[slice]:
    """Prompts that are decoded together: 16, or fewer where vocabularies are large."""
    step = min(16, max(1, LOGITS_PER_PASS // logits_per_prompt))
    return [slice(start, start + step) for start in range(0, n_prompts, step)]
