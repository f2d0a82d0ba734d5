"""Which tokens are installed: the paper's strata of native ranks, and a set that is partly said natively."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Stratum = Literal["frequent", "rank_100_1000", "rare", "out_of_context", "third_native"]
# Native ranks at the first step, from 1, up to before the second number: the paper's strata.
STRATA: dict[str, tuple[int | None, int | None]] = {
    "frequent": (2, 100),
    "rank_100_1000": (100, 1000),
    "rare": (1000, None),
    "out_of_context": (None, None),  # the less likely half of the vocabulary, but not in the prompt
    "third_native": (100, 1000),  # one in three of them is said natively, as in the paper's middle stratum
}
PAPER: tuple[Stratum, ...] = ("frequent", "rank_100_1000", "rare", "out_of_context")


def draw_targets(
    strata: Sequence[str],
    prompts: Int[Tensor, "prompt pos"],
    logits: Float[Tensor, "prompt d_vocab"],
    said: Int[Tensor, "prompt token"],
    first: int,
    rng: torch.Generator,
) -> tuple[list[str], Int[Tensor, "prompt target"]]:
    """One token of each stratum that the vocabulary has, for every prompt.

    Args:
        strata: names of `STRATA`.
        prompts: the prompts.
        logits: native ones, after each prompt.
        said: the native continuations.
        first: number of the first of these prompts among all.
        rng: for the draws.
    """
    drawn: dict[str, list[int]] = {}
    for number, (prompt, row, coming) in enumerate(
        zip(prompts.tolist(), logits, said.tolist(), strict=True), first
    ):
        order = row.argsort(descending=True).tolist()
        unseen = set(range(len(order))) - set(prompt)
        for name in strata:
            low, high = STRATA[name]
            if low is None:
                pool = [t for t in order[len(order) // 2 :] if t in unseen]
            else:
                pool = order[low - 1 : None if high is None else high - 1]
            if name == "third_native":
                native = [t for t in pool if t in coming]
                pool = native if native and number % 3 == 1 else [t for t in pool if t not in coming]
            if pool:
                token = pool[int(torch.randint(0, len(pool), (), generator=rng))]
                drawn.setdefault(name, []).append(token)
    return list(drawn), torch.tensor(list(drawn.values())).T
