"""A model of an architecture that the package does not ship: trained on, tested, reported."""

from __future__ import annotations

from html import unescape
from pathlib import Path

import pytest
import torch
from sae_lens import SAE

from hooked_models import HookedRecurrent, zoo
from tests.conftest import VOCABULARY
from tests.hooked_models.model_classes.case import build
from tests.hooked_models.model_classes.table import MODEL_CLASSES
from writesae_lens import WriteSAETrainingConfig
from writesae_lens.experiments import (
    as_passages,
    erase_atom,
    logit_formula_test,
    replacement_test,
    sign_test,
    splice_test,
)
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
    assert result.headline in unescape(html)
    assert "that the paper reports" not in html  # the paper has no model of this architecture


def words(passages: int, length: int) -> list[str]:
    """Random texts of the words that the tiny models' tokenizer knows."""
    ids = torch.randint(4, VOCABULARY, (passages, length), generator=torch.Generator().manual_seed(1))
    return [" ".join(f"w{n}" for n in row) for row in ids.tolist()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["FalconH1ForCausalLM", "BailingHybridForCausalLM", "MiniMaxForCausalLM", "GLAForCausalLM"]
)
def test_experiments_on_a_hybrid(name: str, tmp_path: Path) -> None:
    """A small SAE of a tiny random model stands in for writes, now and later, and goes through the report."""
    case = build(MODEL_CLASSES[name], tmp_path / "model")
    model, layer = case.model, case.of.layers[-1]  # below experts, a small edit can make a router switch
    (folder,) = train_cells(
        model,
        [(layer, 2)],
        tmp_path / "sae",
        training_tokens=20_000,
        sae=lambda cell: WriteSAETrainingConfig.recommended(d_k=cell.d_k, d_v=cell.d_v, d_sae=64),
        text=words(300, 100),
        context_size=64,
        n_batches_in_buffer=8,
    )
    sae = SAE.load_from_disk(folder)
    HookedRecurrent.for_sae(sae).check_sae(sae)
    tokens = case.tokens(3, 48, seed=9)
    replaced = replacement_test(model, sae, tokens, horizon=8, verbose=False)
    assert replaced.summary["architecture"] == case.of.kind
    assert min(replaced.summary[x] for x in ("median_recovered", "median_recovered_later")) > 0.3
    formula = logit_formula_test(model, sae, tokens, verbose=False)
    assert formula.summary["median_r2_by_eps"]["0.1"] > 0.99
    signs = sign_test(model, sae, tokens, verbose=False)
    others = [run(model, sae, tokens, verbose=False) for run in (erase_atom, splice_test)]
    results = [replaced, formula, signs, *others]
    page = make_report(tmp_path / "report", model, sae, tokens, results, folder, verbose=False)
    text = unescape(page.read_text(encoding="utf-8"))
    assert all(result.headline in text for result in results)
