"""Shared parts of all figures (colours, panels, PNG bytes), and the curves of a training."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    import pandas as pd

ATOM, DELETE, RANDOM, INK = "#2166ac", "#b2182b", "#8c8c8c", "#222222"
KL_FLOOR = 1e-12
"""Smallest KL on log axes; smaller ones are rounding noise of the logits."""


class _Shown(Figure):
    """A figure that a notebook shows, whether or not it has imported pyplot."""

    def _repr_png_(self) -> bytes:
        return as_png(self)


def as_png(figure: Figure, dpi: int = 100) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def new_figure(width: float, height: float, panels: int, rows: int = 1) -> tuple[Figure, list]:
    """A figure of some width and height in inches, and the axes of its panels, row by row, side by side."""
    figure = _Shown(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a window, whatever the user's backend is
    axes = list(np.ravel(figure.subplots(rows, panels // rows)))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
    return figure, axes


def plot_training(history: pd.DataFrame) -> Figure:
    """Draw the columns of a training.csv over the steps.

    Args:
        history: with a column ``step`` and any of loss, unexplained, cosine (of the dominant atom), l0, dead.
    """
    panels = (
        ("loss", "loss", (0, None)),
        ("unexplained", "share of |X|² unexplained", (0, 1.05)),
        ("cosine", "cosine of dominant atom", (0, 1.02)),
        ("l0", "features per write (L0)", (0, None)),
        ("dead", "dead features", (0, None)),
    )
    recorded = [
        panel for panel in panels if panel[0] in history and bool(history[panel[0]].notna().to_numpy().any())
    ]
    figure, axes = new_figure(2.6 * len(recorded), 2.8, len(recorded))
    for axis, (column, title, limits) in zip(axes, recorded, strict=True):
        axis.plot(history["step"], history[column], color=ATOM, lw=1.4)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set(xlabel="step", ylim=limits)
    return figure
