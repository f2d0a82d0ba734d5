"""The paper's runs by name: models, cells, training, and the figures that the paper reports."""

from __future__ import annotations

import dataclasses

from writesae_lens.errors import WriteSAEError
from writesae_lens.reproduce.units import Size


@dataclasses.dataclass(frozen=True)
class Paper:
    """One run of the paper.

    Args:
        base: the base model, as a key of `releases.BASE_MODELS`.
        layer, head: the cell; no head means all heads of the layer.
        about: what the paper found there, in a sentence.
        figures: the paper's figures by (experiment, path into the summary of its result).
        training_tokens: four fifths of the paper's 5,000 sequences of 1,024 tokens, times its epochs.
        batch, warm_up: inputs per step, and steps over which the learning rate rises.
    """

    base: str
    layer: int
    head: int | None
    about: str
    figures: dict[tuple[str, str], float]
    training_tokens: int = 4000 * 1024 * 20
    batch: int = 256
    warm_up: int = 50


# Of the language models alone, from their published configurations, by the keys of `releases.BASE_MODELS`.
SIZES = {
    "qwen0p8b": Size(0.75e9, n_layers=24, d_model=1024, d_vocab=248_320, tied=True),
    "qwen4b": Size(4.2e9, n_layers=32, d_model=2560, d_vocab=248_320, tied=True),
    "qwen27b": Size(27e9, n_layers=64, d_model=5120, d_vocab=248_320, tied=False),
    "mamba2-370m": Size(0.37e9, n_layers=48, d_model=1024, d_vocab=50_288, tied=True),
    "rwkv7-1.5b": Size(1.5e9, n_layers=24, d_model=2048, d_vocab=65_536, tied=False),
    "deltanet-1.3b": Size(1.3e9, n_layers=24, d_model=2048, d_vocab=32_000, tied=False),
    "gla-1.3b": Size(1.3e9, n_layers=24, d_model=2048, d_vocab=32_000, tied=False),
}

WIN, CHAIN = ("replace", "win_rate"), ("replace", "strict_chain_rate")
CONFIGS = {
    "qwen3.5-0.8b-L1H4": Paper(
        "qwen0p8b", 1, 4, "An early layer: the atom wins most often here.",
        {WIN: 0.939, ("replace", "median_kl_atom"): 2.07, ("replace", "median_kl_delete"): 2.82},
    ),
    "qwen3.5-0.8b-L9H4": Paper(
        "qwen0p8b", 9, 4,
        "The paper's main cell: every experiment has its figure here. Its 92.4% pools this head number over "
        "layers 1, 9 and 17 (4,851 firings); over all heads of layer 9 it reports 89.3% (82.6 to 93.2).",
        {
            WIN: 0.912,
            CHAIN: 0.895,
            ("replace", "median_kl_atom"): 0.40,
            ("replace", "median_kl_delete"): 1.09,
            ("replace", "cliffs_delta"): 0.825,
            ("population", "mean_win_rate"): 0.898,
            ("population", "win_rate_register"): 0.9136,
            ("population", "win_rate_bundle"): 0.8898,
            ("partition", "n_register"): 222,
            ("partition", "n_bundle"): 94,
            ("partition", "n_dead"): 1732,
            ("partition", "delta_bic"): -296,
            ("partition", "register_median_cosine"): 0.262,
            ("formula", "median_r2"): 0.983,
            ("erase", "median_delta_logp_firing"): -0.116,
            ("sign", "agreement"): 0.846,
            ("sign", "pearson"): 0.162,
            ("install", "by_stratum.rank_100_1000.target_in_continuation"): 1.0,
            ("install", "by_stratum.rank_100_1000.native_target_in_continuation"): 0.333,
            ("install", "target_in_continuation"): 0.25,
            ("install", "native_target_in_continuation"): 0.083,
            ("splice", "increase_percent"): 0.58,
            ("compare", "writesae"): 0.9125,
            ("compare", "flat_svd"): 0.9136,
        },
    ),
    "qwen3.5-0.8b-L17H4": Paper(
        "qwen0p8b", 17, 4, "A late layer.",
        {WIN: 0.923, ("replace", "median_kl_atom"): 1.82, ("replace", "median_kl_delete"): 2.58},
    ),
    "qwen3.5-0.8b-L9-all": Paper(
        "qwen0p8b", 9, None,
        "All heads of layer 9; means over heads. The paper's figure of a model: 89.3% of replacements won, "
        "82.6 to 93.2% by head (15 heads, sd 2.6 points). Its 92.4% is of one head number, 4, "
        "pooled over three layers.",
        {WIN: 0.8929, ("splice", "increase_percent"): 0.76},
    ),
    "qwen3.5-4b-L12H8": Paper(
        "qwen4b", 12, 8, "The paper fails here: replacement at chance, the formula worse than a mean.",
        {
            WIN: 0.48,
            ("formula", "median_r2"): -0.05,
            ("partition", "register_median_cosine"): 0.152,
            ("amplify", "by_condition.native.newlines_per_400"): 16.8,
            ("amplify", "by_condition.5x.newlines_per_400"): 11.2,
            ("amplify", "by_condition.random.newlines_per_400"): 19.0,
        },
    ),
    "qwen3.5-27b-L32H16": Paper(
        "qwen27b", 32, 16, "The largest model; the paper reports its partition alone.",
        {("partition", "register_median_cosine"): 0.085},
    ),
    "mamba2-370m-L24H0": Paper(
        "mamba2-370m", 24, 0, "Replacement works in the paper, formula and install do not.",
        {
            WIN: 0.8808,
            ("replace", "median_kl_atom"): 0.97,
            ("replace", "median_kl_delete"): 1.62,
            ("formula", "median_r2"): -0.07,
            ("partition", "register_median_cosine"): 0.0575,
            ("compare", "writesae"): 0.8285,
            ("compare", "flat_svd"): 0.763,
        },
        training_tokens=4000 * 1024 * 50,
        batch=128,
        warm_up=100,
    ),
    "rwkv7-1.5b-L12H0": Paper(
        "rwkv7-1.5b", 12, 0, "The paper's atoms do no better than deletion here.",
        {
            WIN: 0.453,
            ("partition", "register_median_cosine"): 0.18,
            ("compare", "writesae"): 0.453,
            ("compare", "flat_svd"): 0.478,
        },
    ),
    "deltanet-1.3b-L12H8": Paper(
        "deltanet-1.3b", 12, 8, "No decay: at chance in the paper, though atoms align best here.",
        {WIN: 0.483, CHAIN: 0.177, ("partition", "register_median_cosine"): 0.997},
    ),
    "gla-1.3b-L12H0": Paper(
        "gla-1.3b", 12, 0, "Gated linear attention: decay by key channel, no erase.",
        {("partition", "register_median_cosine"): 0.11},
    ),
}  # fmt: skip


def config(name: str) -> Paper:
    """A run of the paper by its name.

    Raises:
        WriteSAEError: there is none; the message lists those that there are.
    """
    if name not in CONFIGS:
        raise WriteSAEError(f"no configuration {name!r}: there are {', '.join(CONFIGS)}")
    return CONFIGS[name]
