"""A model of an architecture that the package does not ship: trained on, tested, reported."""

from __future__ import annotations

from pathlib import Path

import pytest
from sae_lens import SAE

from hooked_models import HookedRecurrent, zoo
from writesae_lens import WriteSAETrainingConfig
from writesae_lens.experiments import as_passages, replacement_test
from writesae_lens.report import make_report
from writesae_lens.saelens.runner import train_cells


@pytest.mark.filterwarnings("ignore")
def test_training_replacement_test_and_report(toy_folder: Path, tmp_path: Path) -> None:
    model = HookedRecurrent.boot_transformers(toy_folder, device="cpu")
    train_text, test_text = zoo.shipped_text()
    (folder,) = train_cells(
        model,
        [(1, 2)],
        tmp_path / "sae",
        training_tokens=20_000,
        sae=lambda cell: WriteSAETrainingConfig.recommended(d_k=cell.d_k, d_v=cell.d_v, d_sae=64),
        text=train_text,
        context_size=64,
        n_batches_in_buffer=8,
    )
    sae = SAE.load_from_disk(folder)
    HookedRecurrent.for_sae(sae).check_sae(sae)
    passages = as_passages(model, "\n\n".join(test_text), 64)[:3]
    result = replacement_test(model, sae, passages, verbose=False)
    assert result.summary["architecture"] == "toy"
    assert result.summary["win_rate"] > 0.5
    page = make_report(tmp_path / "report", model, sae, passages, [result], folder, verbose=False)
    html = page.read_text(encoding="utf-8")
    assert result.headline in html
    assert "that the paper reports" not in html  # the paper has no model of this architecture
