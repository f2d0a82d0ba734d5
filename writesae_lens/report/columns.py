"""The table of atoms: every column is declared here once, with its label, its meaning and its values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from writesae_lens.experiments.features.sides import firings_by_feature
from writesae_lens.experiments.swaps import above_floor
from writesae_lens.report.atoms import Profiles


class Sources(NamedTuple):
    """What the columns are computed from.

    Attributes:
        partition: records of the partition, indexed by atom.
        tested: records of the replacement test with columns ``win`` and ``recovered``, grouped by feature.
        contexts: records of the top contexts, grouped by atom.
        profiles: what the decoder says of the atoms, in their order.
        labels: names that people or language models gave, by atom.
    """

    partition: pd.DataFrame
    tested: Any
    contexts: Any
    profiles: Profiles
    labels: Mapping[int, str]


@dataclass(frozen=True)
class Column:
    """A column of the table of atoms.

    Args:
        key: its name in the page's data.
        label: its heading.
        about: its meaning, shown over the heading.
        digits: of its numbers: 0 for whole numbers, None for a column of texts.
        values: computes it, indexed by atom; an atom without a value is left out or has NaN.
    """

    key: str
    label: str
    about: str
    digits: int | None
    values: Callable[[Sources], Any]


def _most_common_token(sources: Sources) -> pd.Series:
    texts = sources.contexts.text.agg(lambda each: each.mode().get(0))
    return texts.dropna()


def _n_tested(sources: Sources) -> pd.Series:
    counts = sources.tested.size()
    return counts.reindex(sources.partition.index, fill_value=0).astype(np.int64)


def _largest_cosine(sources: Sources) -> pd.Series:
    cosines = sources.profiles.cosines.abs().cpu().numpy()
    largest = cosines.max(axis=1) if cosines.shape[1] else np.full(len(cosines), np.nan)
    return pd.Series(largest, index=range(len(largest)))


COLUMNS = (
    Column("atom", "number", "index in the dictionary", 0, lambda s: s.partition.index.to_series()),
    Column(
        "class",
        "class",
        "register: aligned with the native writes; bundle: less so; dead: dominant nowhere in this text",
        None,
        lambda s: s.partition["class"],
    ),
    Column("token", "token", "most common token of its top contexts", None, _most_common_token),
    Column(
        "n_firings", "firings", "positions where it is the dominant atom", 0, lambda s: s.partition.n_firings
    ),
    Column("coefficient", "largest", "its largest coefficient", 3, lambda s: s.contexts.coefficient.max()),
    Column(
        "median_cosine",
        "cosine",
        "median cosine to the native writes that it stands in for",
        2,
        lambda s: s.partition.median_cosine,
    ),
    Column(
        "recovered",
        "recovered",
        "median of 1 - KL / KL of the deletion over its tested firings, at the write's own position, without "
        "those where the deletion's KL is at the floor of rounding",
        2,
        lambda s: s.tested.recovered.median(),
    ),
    Column("n_tested", "tested", "number of its firings in the replacement test", 0, _n_tested),
    Column(
        "win_rate",
        "wins",
        "share of its tested firings where the stand-in does less harm than deleting the write, without "
        "those where the deletion's KL is at the floor of rounding",
        2,
        lambda s: s.tested.win.mean(),
    ),
    Column(
        "kl_atom",
        "KL stand-in",
        "median KL with the stand-in in place of the write, nats",
        3,
        lambda s: s.tested.kl_atom.median(),
    ),
    Column(
        "kl_delete",
        "KL deleted",
        "median KL with the write deleted, nats",
        3,
        lambda s: s.tested.kl_delete.median(),
    ),
    Column("nearest", "nearest", "absolute cosine to the nearest other atom", 2, _largest_cosine),
)


_SIDE = Column(
    "side",
    "side",
    "key: a code of the key, an address; value: a code of the value, a content",
    None,
    lambda s: s.partition.side,
)


_LABEL = Column(
    "label",
    "label",
    "the name that the feature was given (writesae_lens.add_labels)",
    None,
    lambda s: pd.Series(dict(s.labels), dtype=object),
)


def columns_of(partition: pd.DataFrame, labels: Mapping[int, str] | None = None) -> tuple[Column, ...]:
    """The columns of the table: of codes their side too, and labels where there are any.

    Args:
        partition: records of `partition_atoms`.
        labels: of features, by number.
    """
    of_codes = "side" in partition and bool((partition.side != "atom").any())
    further = [column for column, shown in ((_SIDE, of_codes), (_LABEL, bool(labels))) if shown]
    return (COLUMNS[0], *further, *COLUMNS[1:])


def table_of_atoms(
    partition: pd.DataFrame,
    replacement: pd.DataFrame,
    contexts: pd.DataFrame,
    profiles: Profiles,
    labels: Mapping[int, str] | None = None,
) -> pd.DataFrame:
    """One row for each feature of the dictionary, one column for each of `columns_of`.

    Args:
        partition: records of `partition_atoms`.
        replacement: records of `replacement_test`.
        contexts: records of `top_contexts`.
        profiles: of all atoms.
        labels: of those that have one.
    """
    tested = firings_by_feature(replacement)
    win = (tested.kl_atom < tested.kl_delete).astype(float)
    recovered, moves = 1 - tested.kl_atom / tested.kl_delete, above_floor(tested)
    # mean() and median() leave out what is missing
    tested = tested.assign(win=win.where(moves), recovered=recovered.where(moves))
    groups = tested.groupby("atom"), contexts.groupby("atom")
    sources = Sources(partition.set_index("atom"), *groups, profiles, labels or {})
    index = sources.partition.index
    return pd.DataFrame(
        {column.key: column.values(sources).reindex(index) for column in columns_of(partition, labels)}
    )
