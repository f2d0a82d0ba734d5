"""Sizes, memory and time of a run of the paper, before it is started."""

from __future__ import annotations

from typing import Literal

from hooked_models import HookedRecurrent, zoo
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.catalogue import EXPERIMENTS
from writesae_lens.experiments.options import Count, check
from writesae_lens.published import releases
from writesae_lens.reproduce.paper import config
from writesae_lens.reproduce.run import OPTIONS, Recipe, find_cells, training_config
from writesae_lens.saes.config import WriteSAETrainingConfig

# Operations a second by bytes of a number: dense products on one H100 at a third of its peak.
FLOPS = {4: 2e13, 2: 3e14}
CPU_FLOPS = 2e10
# Of the replacement test: what is put in a write's place and followed, and the tokens that each row reads
# beside those that count.
LATER_CONDITIONS, LATER_OVERHEAD = 8, 32


def estimate(
    name: str,
    model_name: str | None = None,
    training_tokens: int | None = None,
    dtype: str = "float32",
    recipe: Recipe = "recommended",
) -> str:
    """Sizes, memory and time of a run with a recipe, without loading the base model.

    The time is arithmetic: two operations per parameter and token of a forward pass, in training and in the
    experiments, on one H100 at a third of its peak for the dtype; other machines scale it by their speed.

    Raises:
        WriteSAEError: there is no such configuration, or the model is neither the base model nor shipped.
    """
    paper = config(name)
    check(Literal["float32", "bfloat16", "float16"], dtype=dtype)
    check(Recipe, recipe=recipe)
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
    cfg = training_config(recipe)(d_k=d_k, d_v=d_v)
    n_sae, per_write = _sizes(cfg, on_states=recipe == "paper")
    training = 6 * per_write * tokens * n_cells
    tested = sum(experiment.max_passages for experiment in EXPERIMENTS.values()) * 256 * 12
    later = OPTIONS["replace"]
    tested += later["max_firings"] * LATER_CONDITIONS * (later["horizon"] + LATER_OVERHEAD)
    operations = training + 2 * n_parameters * (tokens + tested)
    gib = (n_parameters * width + 16 * n_sae * n_cells) / 2**30
    return (
        f"{name}: {paper.about}\n"
        f"base model {source}: {n_parameters / 1e6:,.1f} M parameters; cell layer {paper.layer}, "
        f"{'all heads' if paper.head is None else f'head {paper.head}'} of the paper, {d_k} x {d_v}\n"
        f"dictionary: {_features(cfg)}, {n_sae / 1e6:,.2f} M parameters "
        f"(a flat SAE of as many features: {2 * cfg.d_sae * d_k * d_v / 1e6:,.0f} M)\n"
        f"training: {tokens:,} tokens; experiments: about {tested:,} tokens of forward passes\n"
        f"memory: {gib:,.2f} GiB for parameters and optimiser; activations come on top\n"
        f"time: about {operations / flops / 60:,.1f} minutes on {machine} ({operations / 1e15:,.2f} PFLOP)"
    )


def _features(cfg: WriteSAETrainingConfig) -> str:
    if cfg.decoder != "codes":
        return f"{cfg.d_sae:,} rank-1 atoms, {cfg.k} active"
    return f"{cfg.n_key:,} key codes and {cfg.n_value:,} value codes, {cfg.k_key} and {cfg.k_value} active"


def _sizes(cfg: WriteSAETrainingConfig, on_states: bool) -> tuple[int, int]:
    """Parameters of a dictionary with untied encoders, and products that it takes to encode one input."""
    if cfg.decoder == "codes":
        side = cfg.n_key * cfg.d_k + cfg.n_value * cfg.d_v
        return 2 * side, side
    atoms = cfg.d_sae * (cfg.d_k + cfg.d_v)
    return 2 * atoms + cfg.d_sae, cfg.d_sae * cfg.d_in if on_states else atoms
