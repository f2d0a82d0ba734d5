"""What a training run shows while it runs: the loss and what is left unexplained, beside tokens a second.

SAELens's bar moves every 100 steps, which in a short run is never.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from writesae_lens.saelens.history import mean_squared_norm
from writesae_lens.saes.training_sae import WriteTrainingSAE

# Seconds from one redrawing of the bar to the next: its figures are copied from the device for each.
_EVERY = 0.5


def update_bar(original: Any, trainer: Any, output: Any, bar: Any, *args: Any, **kwargs: Any) -> None:
    """SAELens's `_update_pbar` of the trainer of one SAE or several; other types of SAEs keep its own."""
    if bar.disable:  # by TQDM_DISABLE, as in the workers of a sweep: tqdm keeps no time then
        return
    outputs = output if isinstance(output, Mapping) else {"": output}
    saes = trainer.saes if isinstance(output, Mapping) else {"": trainer.sae}
    if not all(isinstance(sae, WriteTrainingSAE) for sae in saes.values()):
        original(trainer, output, bar, *args, **kwargs)
        return
    ends = trainer.n_training_samples >= bar.total
    if ends or time.time() - bar.last_print_t >= _EVERY:
        bar.mininterval, bar.unit, bar.unit_scale = _EVERY, " tokens", True
        found = [_figures(saes[name], of_one) for name, of_one in outputs.items()]
        loss, unexplained = (sum(column) / len(found) for column in zip(*found, strict=True))
        several = f", means of {len(found)} SAEs" if len(found) > 1 else ""
        bar.set_postfix_str(f"loss {loss:.3g}, {unexplained:.1%} unexplained{several}", refresh=False)
    bar.update(min(trainer.n_training_samples, bar.total) - bar.n)
    if ends:
        bar.refresh()


def _figures(sae: WriteTrainingSAE, output: Any) -> tuple[float, float]:
    """The loss of a step, and the squared error over the inputs' squared norm."""
    unexplained = output.losses["mse_loss"].detach() / mean_squared_norm(sae, output.sae_in)
    return float(output.loss.detach()), float(unexplained)
