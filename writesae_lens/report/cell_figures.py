"""What the columns of a sweep's table and of the memory map mean, for the atlas: label, unit, a line of text.

The columns are named EXPERIMENT_FIGURE (``replace_median_recovered``), those of an untrained baseline
EXPERIMENT_BASELINE_FIGURE (``replace_lookup_median_recovered``), those of the map ``map_FIGURE``.
"""

from __future__ import annotations

from typing import NamedTuple

from writesae_lens.experiments.catalogue import EXPERIMENTS
from writesae_lens.experiments.stand_ins import TITLES

SHARE, COUNT, TEXT = "share", "count", "text"
MAP = "map"


class Meaning(NamedTuple):
    """What a figure means.

    Args:
        label: its short name.
        unit: SHARE (shown in %), COUNT (a whole number), TEXT, a unit such as "nats", or "".
        about: a line that says what it is.
    """

    label: str
    unit: str = ""
    about: str = ""


_RECOVERED = "1 - KL with the stand-in / KL of deleting the write"
_REPLACE = {
    "median_recovered": Meaning("recovered, median", SHARE, f"{_RECOVERED}, median over firings"),
    "recovered": Meaning("recovered, pooled", SHARE, f"{_RECOVERED}, both summed over firings first"),
    "win_rate": Meaning("win rate", SHARE, "firings where the stand-in does less harm than the deletion"),
}
# Suffixes of the figures of a replacement test: at which positions the KLs are taken.
_WHERE = {
    "": ("", "at the write's own position"),
    "_later": (", later", "summed over the tokens after it"),
    "_both": (", both", "at the own position and after it"),
}
_MAP_KL = "mean KL that deleting a write causes"

# By experiment ("": facts about the cell), then by figure.
MEANINGS: dict[str, dict[str, Meaning]] = {
    "": {
        "d_k": Meaning("d_k", COUNT, "size of a key"),
        "d_v": Meaning("d_v", COUNT, "size of a value"),
        "architecture": Meaning("architecture", TEXT, "kind of recurrent layer"),
        "training_seconds": Meaning(
            "training time", "s", "training of its SAE; of cells that were trained together an equal part"
        ),
        "report_seconds": Meaning("report time", "s", "making its report"),
    },
    "replace": {
        **{
            f"{figure}{suffix}": Meaning(f"{label}{where}", unit, f"{about}, {at}")
            for suffix, (where, at) in _WHERE.items()
            for figure, (label, unit, about) in _REPLACE.items()
        },
        "win_rate_matched_norm": Meaning(
            "win rate at matched norm", SHARE, "the win rate of stand-ins scaled to the native write's norm"
        ),
        "strict_chain_rate": Meaning(
            "strict chain", SHARE, "firings where KL of the stand-in < of the deletion < of a random stand-in"
        ),
        "chain_over_ceiling": Meaning(
            "chain over ceiling",
            SHARE,
            "strict chain divided by that of the exact native write; 100% for a perfect stand-in",
        ),
        "own_share": Meaning(
            "own share",
            SHARE,
            "of what deleting a write does, what happens at its own position; median over firings",
        ),
        "bits": Meaning("bits a write", "bits", "to name the features of a write, coefficients not counted"),
        "median_kl_atom": Meaning("KL of the stand-in", "nats", "median over firings, at the own position"),
        "median_kl_delete": Meaning("KL of the deletion", "nats", "median over firings, at the own position"),
        "median_cosine": Meaning("cosine to the write", "", "of the stand-in, median over firings"),
    },
    "population": {
        "mean_recovered": Meaning("recovered, mean", SHARE, f"{_RECOVERED}, mean over features"),
        "mean_win_rate": Meaning("win rate, mean", SHARE, "mean over features of each one's win rate"),
        "n_atoms": Meaning("features tested", COUNT, "features that fire in the text"),
    },
    "partition": {
        "n_register": Meaning("registers", COUNT, "features that align more with the native writes"),
        "n_bundle": Meaning("bundles", COUNT, "features that align less with the native writes"),
        "n_dead": Meaning("dead", COUNT, "features that are dominant nowhere in the text"),
        "delta_bic": Meaning(
            "two kinds: delta BIC",
            "",
            "of two kinds of features against one; at -10 or less two describe them better",
        ),
        "register_median_cosine": Meaning(
            "cosine of registers", "", "median over registers of their median cosine to the native writes"
        ),
    },
    "formula": {
        "median_r2": Meaning("R² of the formula", "", "predicted against measured shifts of logits, median"),
        "median_r2_by_eps_0_1": Meaning(
            "R², addition 0.1", "", "the same for additions of 0.1, by default in write norms"
        ),
        "median_r2_by_eps_1": Meaning(
            "R², addition 1", "", "the same for additions of 1, by default in write norms"
        ),
    },
    "erase": {
        "median_delta_logp_firing": Meaning(
            "log p, feature erased",
            "nats",
            "change of the promoted token's log-probability where the feature fires",
        ),
        "median_delta_logp_elsewhere": Meaning(
            "log p, erased elsewhere", "nats", "the same where the feature does not fire"
        ),
        "median_delta_logp_random": Meaning(
            "log p, random erased", "nats", "the same with a random matrix in place of the feature"
        ),
    },
    "sign": {
        "agreement": Meaning("sign agrees", SHARE, "trials where the logit moves in the predicted direction"),
        "agreement_linear": Meaning("sign agrees, linear", SHARE, "the same for the model's derivative"),
        "majority_sign": Meaning("commoner sign", SHARE, "share of the commoner sign of the measured shifts"),
        "pearson": Meaning("Pearson's r", "", "of predicted and measured shifts of the logit"),
    },
    "install": {
        "target_in_continuation": Meaning("installed", SHARE, "continuations that hold the installed token"),
        "native_target_in_continuation": Meaning(
            "there natively", SHARE, "unedited continuations that hold the token"
        ),
        "mean_lift": Meaning("lift", "nats", "mean rise of the installed token's log-probability"),
        "mean_control_lift": Meaning("lift, control", "nats", "the same for a random direction"),
    },
    "splice": {
        "increase_percent": Meaning(
            "perplexity, spliced", "%", "rise with reconstructions in the writes' place"
        ),
        "increase_percent_deleted": Meaning("perplexity, deleted", "%", "rise with nothing in their place"),
    },
    "amplify": {
        "by_condition_native_newlines_per_400": Meaning(
            "newlines, native", "", "newlines in 400 tokens of unedited continuations"
        ),
        "by_condition_10x_newlines_per_400": Meaning(
            "newlines, 10x",
            "",
            "newlines in 400 tokens with a feature written at ten times its mean coefficient",
        ),
    },
    "contexts": {
        "n_atoms_active": Meaning("features active", COUNT, "features that are active somewhere in the text"),
        "token_purity": Meaning(
            "token purity",
            SHARE,
            "share of the most common token in a feature's top contexts, mean over features",
        ),
    },
    "selectivity": {
        "own_overlap_atom": Meaning(
            "overlap with itself", SHARE, "tokens that a feature moves most, in common at two positions"
        ),
        "other_overlap_atom": Meaning(
            "overlap with others", SHARE, "tokens that two features move most, in common at one position"
        ),
    },
    "trace": {
        "ratio_to_random": Meaning(
            "effect on readers",
            "×",
            "change of later layers by a feature's write, divided by that of random writes",
        ),
    },
    "map": {
        "n_writes": Meaning("writes deleted", COUNT, "writes that the map deleted in the cell"),
        "kl_own": Meaning("KL, own token", "nats", f"{_MAP_KL} at its own token"),
        "kl_later": Meaning("KL, later tokens", "nats", f"{_MAP_KL}, summed over the tokens after it"),
        "kl_both": Meaning("KL, both", "nats", f"{_MAP_KL}, at its own token and after it"),
        "kl_floor": Meaning("KL of rounding", "nats", "what rounding alone can give of the KL, both"),
        "own_share": Meaning(
            "own share", SHARE, "of the KL that deleting writes causes, the part at their own token"
        ),
        "share": Meaning("share of the model", SHARE, "of the KL of deleted writes, summed over all cells"),
        "n_at_floor": Meaning("at the floor", COUNT, "deleted writes whose KL is not above rounding"),
        "half_life": Meaning(
            "half-life", "tokens", "until decay and erases have halved a write's norm, median over writes"
        ),
        "reach": Meaning("reach", "tokens", "within which half of a write's later reading happens, median"),
        "write_norm": Meaning("write norm", "", "mean Frobenius norm of the writes"),
        "one_key": Meaning(
            "one key",
            SHARE,
            "of what is read of a write, squared, what the cell's mean key would give as well",
        ),
        "one_value": Meaning("one value", SHARE, "of the value, squared, what lies along the mean value"),
        "note": Meaning("note", TEXT, "what speaks against a dictionary for the cell"),
    },
}


def group_of(column: str) -> str:
    """The experiment, or the map, that a column is of; "" for facts about the cell and its training."""
    names = [name for name in (*EXPERIMENTS, MAP) if column.startswith(f"{name}_")]
    return max(names, key=len, default="")


def meaning_of(column: str) -> Meaning:
    """What a column means; one that is not known is labelled by its name."""
    group = group_of(column)
    figure, known = column.removeprefix(f"{group}_" if group else ""), MEANINGS.get(group, {})
    if figure in known:
        return known[figure]
    if group and figure == "seconds":
        return Meaning("time", "s", "of this experiment on the cell")
    for baseline, title in TITLES.items():
        of_sae = known.get(figure.removeprefix(f"{baseline}_"))
        if of_sae is not None:
            return of_sae._replace(label=f"{of_sae.label}: {title}", about=f"{of_sae.about}; of the {title}")
    return Meaning(figure.replace("_", " "))
