"""Decoding with an edited cell, many continuations of one prompt at once from one cached prefix."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_models import HookedRecurrent
from hooked_models.caches import repeated
from hooked_models.hooked_recurrent import Cell

Added = Float[Tensor, "row pos d_k d_v"]


class Prefix:
    """A prompt's cache, run once; `run` goes on from it with any number of rows, as often as wanted.

    Args:
        tokens: what all rows have in common, at least one token.
    """

    def __init__(self, model: HookedRecurrent, cell: Cell, tokens: Int[Tensor, " pos"]) -> None:
        self._model, self._name = model, model.write_hook_name(cell.layer, cell.head)
        self._cache = model.new_cache()
        with torch.no_grad():
            self.logits = model(tokens[None], past_key_values=self._cache, use_cache=True)[0, -1]

    def run(
        self, tokens: Int[Tensor, "row pos"], added: Added | None = None
    ) -> tuple[Float[Tensor, "row pos d_vocab"], Any]:
        """Logits of the rows after the prefix, and their cache; ``added`` joins the cell's native writes."""
        cache = repeated(self._cache, len(tokens))
        return self.go_on(tokens, cache, added), cache

    def go_on(
        self, tokens: Int[Tensor, "row pos"], cache: Any, added: Added | None = None
    ) -> Float[Tensor, "row pos d_vocab"]:
        """Logits of more tokens of the same rows."""

        def add(write: Tensor, hook: Any) -> Tensor | None:
            return None if added is None else write + added.flatten(-2).to(write.dtype)

        hooks = [] if added is None else [(self._name, add)]
        with self._model.hooks(fwd_hooks=hooks):
            return self._model(tokens, past_key_values=cache, use_cache=True)

    @torch.no_grad()
    def decode(
        self,
        logits: Float[Tensor, "row d_vocab"],
        cache: Any,
        n_tokens: int,
        temperature: float = 0.0,
        noise_rows: Int[Tensor, " row"] | None = None,
        rng: torch.Generator | None = None,
        added: Float[Tensor, "row d_k d_v"] | None = None,
    ) -> Int[Tensor, "row token"]:
        """Tokens that follow.

        Args:
            logits: of the first of them.
            temperature: 0 takes the likeliest token, else one is drawn.
            noise_rows: rows with one number share their random draws, so that what differs between them is
                what was edited (None: all rows do).
            rng: of the draws.
            added: what joins the cell's native write at every token that is fed back.
        """
        rows = torch.zeros(len(logits), dtype=torch.long) if noise_rows is None else noise_rows.cpu()
        n_draws, chosen = int(rows.max()) + 1, []
        every = None if added is None else added[:, None]
        for step in range(n_tokens):
            if temperature > 0:
                # The largest of logits with Gumbel noise is a draw from their softmax.
                drawn = torch.rand(n_draws, logits.shape[-1], generator=rng).clamp(min=1e-20)
                logits = logits.float() / temperature - (-drawn.log()).log()[rows].to(logits.device)
            chosen.append(logits.argmax(-1))
            if step < n_tokens - 1:
                logits = self.go_on(chosen[-1][:, None], cache, every)[:, -1]
        return torch.stack(chosen, dim=1)
