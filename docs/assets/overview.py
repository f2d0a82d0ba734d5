"""Draws overview.png of the README from what ``make demo`` left: overview.py writesae-demo"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from sae_lens import SAE

from hooked_models import HookedRecurrent, zoo

TEXT = zoo.shipped_text()[1][0][:400]

out = Path(sys.argv[1])
sae = SAE.load_from_disk(out / "sae")
model = HookedRecurrent.for_sae(sae)
name = sae.cfg.metadata.hook_name
with torch.no_grad():
    writes = model.run_with_cache(TEXT, names_filter=[name])[1][name][0]
    acts = sae.encode(writes)
coefficient, atom = acts.max(-1)
atoms = coefficient[:, None] * sae.W_dec[atom]
cosine = torch.cosine_similarity(writes, atoms)
at = int((writes.norm(dim=-1) * (cosine > 0.96)).argmax())
tokens = model.to_str_tokens(TEXT)
records = pd.read_csv(out / "records.csv")

figure, axes = plt.subplots(1, 3, figsize=(12, 3.7), layout="constrained", width_ratios=(1, 1, 1.15))
limit = float(writes[at].abs().max())
told = "".join(tokens[at - 3 : at]).replace("\n", " ")
titles = (
    f"what the head writes at “{tokens[at].strip()}”\n(after “{told.strip()}”)",
    f"atom {int(atom[at])} in its place\n(cosine {cosine[at]:.2f})",
)
for axis, matrix, title in zip(axes, (writes[at], atoms[at]), titles):
    picture = matrix.detach().view(sae.cfg.d_k, sae.cfg.d_v)
    axis.imshow(picture, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    axis.set(xlabel="value side", ylabel="key side")
    axis.set_title(title, fontsize=10, loc="left")
deleted, kept = (np.log10(records[f"kl_{n}"].clip(lower=1e-12)) for n in ("delete", "atom"))
wins = kept < deleted
for mask, color, label in ((wins, "#2166ac", "atom nearer to native"), (~wins, "#b2182b", "deletion nearer")):
    axes[2].scatter(
        deleted[mask], kept[mask], s=4, alpha=0.4, lw=0, color=color, label=f"{label} ({mask.mean():.0%})"
    )
ends = [-8, 1]
axes[2].plot(ends, ends, color="#222222", lw=0.8, ls="--")
axes[2].set(
    xlim=ends, ylim=ends, xlabel="log10 KL, write deleted (nats)", ylabel="log10 KL, atom in its place"
)
axes[2].set_title(f"{len(records):,} firings of {records.atom.nunique():,} atoms", fontsize=10, loc="left")
axes[2].legend(frameon=False, fontsize=8, loc="upper left", markerscale=2.5)
axes[2].spines[["top", "right"]].set_visible(False)
figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)
