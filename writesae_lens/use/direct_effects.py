"""Direct logit effects of heads: what each head's output adds to a logit past all later layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from hooked_models import HookedRecurrent
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.catalogue import experiment, figure
from writesae_lens.experiments.options import is_whole, shown
from writesae_lens.experiments.passages import other_token, token_id
from writesae_lens.experiments.passes import check_finite
from writesae_lens.experiments.result import ExperimentResult
from writesae_lens.experiments.run import Run
from writesae_lens.experiments.subjects import check_model, check_unhooked
from writesae_lens.figures import new_figure
from writesae_lens.use.patching import draw_effects, tokens_of


@experiment(
    "direct",
    of_prompt=True,
    question="Which heads raise a token's logit directly, past all later layers?",
    row="a head",
)
def head_logit_effects(
    model: HookedRecurrent,
    prompt: Int[Tensor, "*row pos"] | str,
    target: int | str,
    alternative: int | str | None = None,
    position: int = -1,
) -> ExperimentResult:
    """The direct effect of every head of the recurrent layers on a logit, or on a difference of two.

    A head's effect is what the logit loses if the head's part is taken out of the last residual stream while
    the last norm keeps the scale that it has for the whole stream, as TransformerLens's
    ``cache.logit_attrs(cache.stack_head_results(), ...)`` on a model with folded norms. (These two methods of
    this package's cache give the same for all positions; nothing need be folded.)

    Args:
        model: the model.
        prompt: a text, or token ids ``[pos]`` or ``[1, pos]``; a text gets a BOS token where the model wants
            one (``model.to_tokens``).
        target: a token, as its id or its text.
        alternative: a token whose logit is subtracted (None: none is).
        position: where the logits are read; negative ones count from the end.

    Returns:
        a result. ``records`` has one row per head: layer, head, effect. ``summary`` has logit (the model's,
        or the difference), heads (the sum of all heads' effects), rest (what embedding, MLPs, attention and
        biases add), position, and top, the ten largest effects by size. The figure is a heat map.

    Raises:
        WriteSAEError: there is no such position or token, the two tokens are the same, or logits are not
            finite.
        HookedModelError: a layer scales or norms what its heads add, the model caps its logits, or anything
            is hooked in it.
    """
    check_model(model)
    check_unhooked(model)
    tokens = tokens_of(model, prompt)
    length = tokens.shape[1]
    if not is_whole(position) or not -length <= position < length:
        raise WriteSAEError(
            f"position={shown(position)} does not exist: the prompt has {length} tokens, 0 to {length - 1}"
        )
    position = position % length
    ids = [token_id(model, target)]
    if alternative is not None:
        ids.append(other_token(model, alternative, ids[0]))
    run = Run(
        "direct",
        model,
        None,
        tokens,
        {"prompt": prompt if isinstance(prompt, str) else tokens[0].tolist(), "target": target}
        | {"alternative": alternative, "position": position},
    )
    names = ["hook_embed", "ln_final.hook_scale"]
    names += [model.hook_name(layer, "head_out") for layer in model.mixers]
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens, names_filter=names)
        check_finite("logits", logits[0, position])
        heads = cache.stack_head_results(pos_slice=position)
        effects = cache.logit_attrs(heads, *ids, pos_slice=position)[:, 0].tolist()
    of_token = [float(logits[0, position, token]) for token in ids]
    logit = of_token[0] - sum(of_token[1:])
    records = pd.DataFrame(
        {"layer": [c.layer for c in model.cells], "head": [c.head for c in model.cells], "effect": effects}
    )
    order = records.effect.abs().sort_values(ascending=False, kind="stable").index[:10]
    summary: dict[str, Any] = {
        "logit": logit,
        "heads": sum(effects),
        "rest": logit - sum(effects),
        "top": records.loc[order].to_dict("records"),
    }
    return run.result(records, summary, _headline(summary))


def _headline(summary: dict[str, Any]) -> str:
    most = ", ".join(f"L{x['layer']:.0f}H{x['head']:.0f} {x['effect']:+.3g}" for x in summary["top"][:3])
    return f"of {summary['logit']:.3g} the heads give {summary['heads']:.3g} directly; most: {most}"


@figure("direct")
def plot_direct(result: ExperimentResult) -> Figure:
    """Heat map of the effects, layer by head."""
    records = result.records
    grid = np.full(records[["layer", "head"]].to_numpy().max(axis=0) + 1, np.nan)
    grid[records.layer, records["head"]] = records.effect
    height, width = (max(1.8, 0.3 * n) for n in grid.shape)
    drawn, (axis,) = new_figure(min(width, 10) + 2.6, min(height, 10) + 0.9, 1)
    draw_effects(axis, grid, "direct effect on the logit")
    axis.set(xlabel="head", ylabel="layer")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(MaxNLocator(integer=True))
    return drawn
