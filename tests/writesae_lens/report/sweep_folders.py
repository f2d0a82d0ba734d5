"""Folders as a sweep leaves them, with made-up figures."""

import json

import numpy as np
import pandas as pd

from writesae_lens.experiments.result import write_table


def figures(n, seed=0):
    """Rows of cells.csv for ``n`` cells, without layer and head."""
    rng = np.random.default_rng(seed)
    recovered = np.clip(rng.normal(0.75, 0.15, n), -0.4, 0.99)
    return pd.DataFrame(
        {
            "architecture": "gated_delta_net",
            "d_k": 128,
            "d_v": 128,
            "training_seconds": rng.uniform(50, 60, n),
            "replace_seconds": rng.uniform(3, 9, n),
            "replace_median_recovered": recovered,
            "replace_recovered": recovered + rng.normal(0, 0.05, n),
            "replace_median_recovered_later": recovered - rng.uniform(0, 0.1, n),
            "replace_lookup_median_recovered": recovered - rng.uniform(-0.05, 0.4, n),
            "replace_win_rate": rng.uniform(0.7, 1, n),
            "replace_own_share": rng.uniform(0, 1, n),
            "replace_bits": rng.uniform(150, 260, n),
            "replace_median_kl_atom": 10 ** rng.uniform(-6, -3, n),
            "replace_median_kl_delete": 10 ** rng.uniform(-5, -2, n),
            "replace_median_cosine": rng.uniform(0.6, 1, n),
            "partition_n_register": rng.integers(0, 900, n),
            "partition_n_dead": rng.integers(0, 60, n),
            "partition_delta_bic": rng.normal(-40, 60, n),
        }
    )


def write_sweep(folder, cells, table=None, failed=(), model="tiny-gdn", seed=0):
    """Write sweep.json, cells.csv, failed.csv and the SAEs' configurations; returns the table.

    Args:
        folder: to write.
        cells: finished cells, as (layer, head) pairs.
        table: their figures (None: made up).
        failed: rows of failed.csv.
        model: its name.
        seed: of the made-up figures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    about = {"model": model, "architecture": "gated_delta_net", "text": "test part of the shipped text",
             "training_tokens": 350_000, "experiments": {"replace": {"horizon": 32}}}  # fmt: skip
    (folder / "sweep.json").write_text(json.dumps(about))
    table = figures(len(cells), seed) if table is None else table
    table = pd.concat([pd.DataFrame(cells, columns=["layer", "head"]), table], axis=1)
    write_table(folder / "cells.csv", table)
    if failed:
        write_table(folder / "failed.csv", pd.DataFrame(failed, columns=["layer", "head", "step", "reason"]))
    for layer, head in cells:
        (folder / f"L{layer}H{head}").mkdir()
        (folder / f"L{layer}H{head}" / "cfg.json").write_text("{}")
    return table


def write_map(folder, cells, model="tiny-gdn", seed=1):
    """Write what `memory_map` saves of these cells; returns its records."""
    (folder / "map").mkdir()
    rng, n = np.random.default_rng(seed), len(cells)
    records = pd.DataFrame(cells, columns=["layer", "head"])
    own, later = 10 ** rng.uniform(-6, -2, n), 10 ** rng.uniform(-6, -2, n)
    records = records.assign(
        d_k=128, d_v=128, n_writes=64, kl_own=own, kl_own_low=own * 0.8, kl_own_high=own * 1.3,
        kl_later=later, own_share=own / (own + later), half_life=rng.integers(1, 200, n).astype(float),
        reach=rng.integers(1, 60, n), write_norm=rng.uniform(0.1, 8, n),
        note=rng.choice(["", "one key", "one key, n-gram table"], n),
    )  # fmt: skip
    records.loc[0, "half_life"] = np.nan
    write_table(folder / "map" / "records.csv", records)
    (folder / "map" / "summary.json").write_text(json.dumps({"experiment": "map", "model": model}))
    return records
