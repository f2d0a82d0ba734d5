"""Sizes, memory and time of a run of the paper, before it is started."""

from __future__ import annotations

from typing import Literal

from hooked_models import HookedRecurrent, zoo
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.catalogue import EXPERIMENTS
from writesae_lens.experiments.options import Count, check
from writesae_lens.published import releases
from writesae_lens.reproduce.paper import config
from writesae_lens.reproduce.run import find_cells
from writesae_lens.saes.config import WriteSAETrainingConfig

# Operations a second by bytes of a number: dense products on one H100 at a third of its peak.
FLOPS = {4: 2e13, 2: 3e14}
CPU_FLOPS = 2e10


def estimate(
    name: str, model_name: str | None = None, training_tokens: int | None = None, dtype: str = "float32"
) -> str:
    """Sizes, memory and time of a run, without loading the base model.

    The time is arithmetic: two operations per parameter and token of a forward pass, in training and in the
    experiments, on one H100 at a third of its peak for the dtype; other machines scale it by their speed.

    Raises:
        WriteSAEError: there is no such configuration, or the model is neither the base model nor shipped.
    """
    paper = config(name)
    check(Literal["float32", "bfloat16", "float16"], dtype=dtype)
    check(Count | None, training_tokens=training_tokens)
    base = releases.BASE_MODELS[paper.base]
    d_k, d_v, n_parameters, width = base.d_k, base.d_v, paper.n_parameters, 4 if dtype == "float32" else 2
    source, flops, machine = base.name, FLOPS[width], f"an H100 in {dtype}"
    tokens = training_tokens or paper.training_tokens
    n_cells = 1 if paper.head is not None else 16
    if model_name is not None and model_name not in zoo.SHIPPED:
        raise WriteSAEError(
            f"estimates are for the base model or shipped ones ({', '.join(zoo.SHIPPED)}), not {model_name!r}"
        )
    if model_name is not None:  # small enough to load
        model = HookedRecurrent.boot_transformers(model_name, device="cpu")
        cells = find_cells(model, model_name, paper)
        d_k, d_v, n_cells = cells[0].d_k, cells[0].d_v, len(cells)
        source, flops, machine = model_name, CPU_FLOPS, "two CPU cores"
        n_parameters, width = sum(p.numel() for p in model.original_model.parameters()), 4
        tokens = training_tokens or zoo.TRAINING_TOKENS
    d_sae = WriteSAETrainingConfig.recommended(d_k=d_k, d_v=d_v).d_sae
    n_sae = 2 * d_sae * (d_k + d_v) + d_sae
    training = 6 * d_sae * (d_k + d_v) * tokens * n_cells
    tested = sum(experiment.max_passages for experiment in EXPERIMENTS.values()) * 256 * 12
    operations = training + 2 * n_parameters * (tokens + tested)
    gib = (n_parameters * width + 16 * n_sae * n_cells) / 2**30
    return (
        f"{name}: {paper.about}\n"
        f"base model {source}: {n_parameters / 1e6:,.1f} M parameters; cell layer {paper.layer}, "
        f"{'all heads' if paper.head is None else f'head {paper.head}'} of the paper, {d_k} x {d_v}\n"
        f"dictionary: {d_sae:,} rank-1 atoms, {n_sae / 1e6:,.2f} M parameters "
        f"(a flat one: {2 * d_sae * d_k * d_v / 1e6:,.0f} M)\n"
        f"training: {tokens:,} tokens; experiments: about {tested:,} tokens of forward passes\n"
        f"memory: {gib:,.2f} GiB for parameters and optimiser; activations come on top\n"
        f"time: about {operations / flops / 60:,.1f} minutes on {machine} ({operations / 1e15:,.2f} PFLOP)"
    )
