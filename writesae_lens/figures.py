"""What all figures share: colours, panels, PNG bytes; and the curves of a training."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    import pandas as pd

ATOM, DELETE, RANDOM, INK = "#2166ac", "#b2182b", "#8c8c8c", "#222222"
# KLs below this are rounding noise of the logits; log axes need a floor.
KL_FLOOR = 1e-12


class _Shown(Figure):
    """A figure that a notebook shows, whether or not it has imported pyplot."""

    def _repr_png_(self) -> bytes:
        return as_png(self)


def as_png(figure: Figure, dpi: int = 100) -> bytes:
    """The picture's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def new_figure(width: float, height: float, panels: int) -> tuple[Figure, list]:
    figure = _Shown(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the user's backend
    axes = list(np.atleast_1d(figure.subplots(1, panels)))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
    return figure, axes


def plot_training(history: pd.DataFrame) -> Figure:
    """Loss, unexplained share, cosine of the dominant atom, L0 and dead atoms over the steps, as recorded."""
    panels = (
        ("loss", "loss", (0, None)),
        ("unexplained", "share of |X|² unexplained", (0, 1.05)),
        ("cosine", "cosine of dominant atom", (0, 1.02)),
        ("l0", "atoms per write (L0)", (0, None)),
        ("dead", "dead atoms", (0, None)),
    )
    known = [
        panel for panel in panels if panel[0] in history and bool(history[panel[0]].notna().to_numpy().any())
    ]
    figure, axes = new_figure(2.6 * len(known), 2.8, len(known))
    for axis, (column, title, limits) in zip(axes, known, strict=True):
        axis.plot(history["step"], history[column], color=ATOM, lw=1.4)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set(xlabel="step", ylim=limits)
    return figure
