"""An SAE is trained alike whichever cells share its forward passes."""

import pytest
from safetensors.torch import load_file

from hooked_models import HookedRecurrent
from writesae_lens.saelens.runner import train_cells
from writesae_lens.saes.config import WriteSAETrainingConfig


@pytest.mark.parametrize("recipe", ["recommended", "atoms"])
@pytest.mark.parametrize("others", [[(1, 0)], [(3, 3), (0, 1)]], ids=["same layer", "other layers"])
def test_a_cell_is_trained_as_alone(recipe, others, tmp_path):
    model = HookedRecurrent.boot_transformers("tiny-gdn")
    make = getattr(WriteSAETrainingConfig, recipe)

    def train(cells, folder):
        folders = [folder / f"L{layer}H{head}" for layer, head in cells]
        train_cells(
            model,
            cells,
            folders,
            12_000,
            lambda cell: make(d_k=cell.d_k, d_v=cell.d_v),
            n_batches_in_buffer=4,
            seed=3,
        )
        return load_file(folder / "L1H1" / "sae_weights.safetensors")

    alone = train([(1, 1)], tmp_path / "alone")
    together = train([others[0], (1, 1), *others[1:]], tmp_path / "together")
    assert alone.keys() == together.keys()
    for name, weights in alone.items():
        assert (weights == together[name]).all(), name
