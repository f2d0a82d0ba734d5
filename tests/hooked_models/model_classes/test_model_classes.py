"""All checks on all model classes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from hooked_models import HookedRecurrent
from hooked_models.architectures import adapters
from tests.hooked_models.architectures import refused
from tests.hooked_models.model_classes.case import Case, build
from tests.hooked_models.model_classes.checks import CHECKS, LENGTH, TOLERANCE, share
from tests.hooked_models.model_classes.table import MODEL_CLASSES


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    of = MODEL_CLASSES[request.param]
    model_class = of.name.split()[0]
    if not (adapters.ADAPTERS[model_class].is_own_model or hasattr(transformers, model_class)):
        pytest.skip(f"transformers {transformers.__version__} has no {model_class}")
    case = build(of, Path(tmp_path_factory.mktemp("models") / of.name.replace(" ", "_")))
    yield case
    assert not case.model.busy_hooks


@pytest.mark.parametrize("case", MODEL_CLASSES, indirect=True, scope="module")
def test_cells(case: Case) -> None:
    heads, d_k, d_v = case.of.cells
    found = [(c.layer, c.head, c.d_k, c.d_v, c.architecture) for c in case.model.cells]
    assert found == [(n, h, d_k, d_v, case.of.kind) for n in case.of.layers for h in range(heads)]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", MODEL_CLASSES, indirect=True, scope="module")
def test_check(case: Case, check: str) -> None:
    error = CHECKS[check](case)
    assert error <= TOLERANCE, f"{check} of {case.of.name}: off by {error:.1e} of the spread"


ADDS_NOT_ITS_PARTS = ("GraniteMoeHybridForCausalLM", "FalconH1ForCausalLM", "MiniMaxForCausalLM")


@torch.no_grad()
@pytest.mark.parametrize("case", MODEL_CLASSES, indirect=True, scope="module")
def test_the_parts_of_the_residual_stream_add_up_to_it(case: Case) -> None:
    """Where a block scales, sums or norms them, that is said instead."""
    _, cache = case.model.run_with_cache(case.tokens(2, LENGTH))
    if case.of.name.split()[0] in ADDS_NOT_ITS_PARTS:
        with refused("decompose_resid", "scales, sums or norms"):
            cache.decompose_resid()
        return
    stream = cache[f"blocks.{len(case.model.blocks) - 1}.hook_out"]
    assert share(cache.decompose_resid().sum(0), stream) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("case", MODEL_CLASSES, indirect=True, scope="module")
def test_what_a_head_adds_is_what_the_layer_lacks_without_it(case: Case) -> None:
    """With the part of the reference's W_O beside it where that is a plain matrix, as in all of them."""
    model, tokens = case.model, case.tokens(2, LENGTH)
    _, cache = model.run_with_cache(tokens)
    if case.of.name.split()[0] in ADDS_NOT_ITS_PARTS:
        for method in (cache.stack_head_results, cache.get_full_resid_decomposition):
            with refused("scales, sums or norms"):
                method()
        return
    stack, labels = cache.stack_head_results(return_labels=True, incl_remainder=True)
    assert labels == [f"L{cell.layer}H{cell.head}" for cell in model.cells] + ["remainder"]
    assert share(stack.sum(0), cache[f"blocks.{len(model.blocks) - 1}.hook_out"]) <= TOLERANCE
    layer, head = case.of.layers[-1], case.of.cells[0] - 1
    out, heads = model.hook_name(layer, "out"), model.hook_name(layer, "head_out")

    def silence(x: torch.Tensor, hook: object) -> torch.Tensor:
        return x.index_fill(2, torch.tensor([head]), 0)

    with model.hooks(fwd_hooks=[(heads, silence)]):
        _, without = model.run_with_cache(tokens, names_filter=[out])
    assert share(stack[labels.index(f"L{layer}H{head}")], cache[out] - without[out]) <= TOLERANCE


@pytest.mark.parametrize("case", MODEL_CLASSES, indirect=True, scope="module")
def test_what_is_trained_in_a_copy_is_saved(case: Case, tmp_path: Path) -> None:
    """Every weight, once each; the reference that reads the folder gives the trained copy's logits."""
    tokens, copied = case.tokens(2, LENGTH), copy.deepcopy(case.model)
    trained = [x for x in copied.parameters() if x.requires_grad]
    assert sum(x.numel() for x in trained) == sum(x.numel() for x in case.reference.parameters())
    copied(tokens, return_type="loss", use_cache=False).backward()
    torch.nn.utils.clip_grad_norm_(trained, 1)
    torch.optim.SGD(trained, lr=0.3).step()
    copied.save_pretrained(tmp_path)
    with torch.no_grad():
        found = copied(tokens, use_cache=False)
        expected = case.of.reference(tmp_path)(tokens, use_cache=False).logits
        assert share(case.logits(tokens), expected) > 100 * TOLERANCE
    assert share(found, expected) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("case", MODEL_CLASSES, indirect=True, scope="module")
def test_a_state_dict_has_every_weight(case: Case) -> None:
    tokens, copied, weights = case.tokens(2, LENGTH), copy.deepcopy(case.model), case.model.state_dict()
    for x in copied.parameters():
        x.mul_(0.5)
    copied.load_state_dict(weights)
    assert share(copied(tokens, use_cache=False), case.logits(tokens)) <= TOLERANCE
    recurrent = f".{case.of.layers[0]}."
    other = next((x for x in weights if recurrent in x and not x.startswith("blocks.")), None)
    if other is not None:  # a weight that TransformerLens has no name for
        with refused("load_state_dict", "are missing", other):
            copied.load_state_dict({name: x for name, x in weights.items() if name != other})


@torch.no_grad()
@pytest.mark.parametrize("case", MODEL_CLASSES, indirect=True, scope="module")
def test_bfloat16_rounds_no_more_than_the_reference_does(case: Case) -> None:
    tokens = case.tokens(2, LENGTH)
    truth = case.logits(tokens)
    half = HookedRecurrent.boot_transformers(case.folder, device="cpu", dtype="bfloat16")
    found = half(tokens, use_cache=False)
    stock = case.of.reference(case.folder).to(torch.bfloat16)(tokens, use_cache=False).logits
    errors = [float((x.float() - truth).square().mean().sqrt()) for x in (found, stock)]
    assert errors[0] <= 1.5 * errors[1]
