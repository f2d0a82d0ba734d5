"""Second derivatives at every hook against finite differences, and activation checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_models import HookedRecurrent, zoo

LAYER, HEAD = 1, 1
# Norms and softmax of the first two compute in float32, and their noise asks for a longer step.
STEPS = {"tiny-gdn": (3e-4, 2e-2), "tiny-mamba2": (3e-4, 2e-2), "tiny-rwkv7": (1e-6, 1e-5)}
HOOKS = (
    "in",
    "write_key",
    "write_value",
    "read",
    "decay",
    "write",
    "erase",
    "state",
    "recurrence_out",
    "head_out",
)


@pytest.fixture(scope="module", params=zoo.SHIPPED)
def model(request: pytest.FixtureRequest) -> Any:
    return HookedRecurrent.boot_transformers(request.param, device="cpu", dtype="float64")


@pytest.fixture(scope="module")
def tokens(model: Any) -> Tensor:
    return model.to_tokens("It is a truth universally acknowledged")


def names(model: Any) -> dict[str, str]:
    own = model.mixers[LAYER].per_head_hooks
    heads = {hook: HEAD if hook in ("write", "erase", "state") else None for hook in HOOKS}
    return {
        hook: model.hook_name(LAYER, hook, head)
        for hook, head in heads.items()
        if head is None or hook in own
    }


def penalty(model: Any, tokens: Tensor, name: str, edit: Any, graph: bool) -> Tensor:
    """The squared gradient of the loss with respect to what a hook sees, or returns."""
    kept: list[Tensor] = []

    def keep(x: Tensor, hook: Any) -> Tensor | None:
        x = x if edit is None else edit(x)
        kept.append(x)
        return None if edit is None else x

    with model.hooks(fwd_hooks=[(name, keep)]):
        loss = model(tokens, return_type="loss")
    return torch.autograd.grad(loss, kept[0], create_graph=graph)[0].square().sum()


@pytest.mark.parametrize("edited", [False, True], ids=["read", "edited"])
@pytest.mark.parametrize("hook", HOOKS)
def test_the_gradient_at_a_hook_can_be_differentiated(model: Any, tokens: Tensor, hook: str, edited: bool):
    """Along one random direction of all parameters at once."""
    name = names(model).get(hook)
    if name is None:
        pytest.skip("this architecture erases nothing")
    edit = (lambda x: 0.9 * x + 0.02) if edited else None
    parameters = [x for x in model.original_model.parameters() if x.requires_grad]
    rng = torch.Generator().manual_seed(0)
    noise = [torch.randn(x.shape, generator=rng, dtype=x.dtype) for x in parameters]
    direction = [x.std().nan_to_num(0) * n for x, n in zip(parameters, noise, strict=True)]
    found = torch.autograd.grad(penalty(model, tokens, name, edit, True), parameters, allow_unused=True)
    slope = sum(float((g * d).sum()) for g, d in zip(found, direction, strict=True) if g is not None)
    ends, (step, tolerance) = [], STEPS[model.cfg.model_name]
    for sign in (1, -2, 1):  # there, to the other side, and back
        with torch.no_grad():
            for x, d in zip(parameters, direction, strict=True):
                x.add_(d, alpha=sign * step)
        ends.append(float(penalty(model, tokens, name, edit, False)))
    expected = (ends[0] - ends[1]) / 2 / step
    assert expected != 0
    assert slope == pytest.approx(expected, rel=tolerance)


def test_the_gradient_elsewhere_knows_a_hooked_write(model: Any, tokens: Tensor):
    """d/dx of the gradient at the reads, where x is a write that is hooked and left as it is."""
    write, read = names(model)["write"], names(model)["read"]
    kept: dict[str, Tensor] = {}

    def gradient(graph: bool, shift: float = 0.0) -> Tensor:
        def at_write(x: Tensor, hook: Any) -> Tensor | None:
            kept["write"] = x
            return x + shift * direction if shift else None

        def at_read(x: Tensor, hook: Any) -> None:
            kept["read"] = x

        with model.hooks(fwd_hooks=[(write, at_write), (read, at_read)]):
            loss = model(tokens, return_type="loss")
        return torch.autograd.grad(loss, kept["read"], create_graph=graph)[0].square().sum()

    with torch.no_grad():
        shown = model.run_with_cache(tokens, names_filter=[write])[1][write]
    direction = torch.randn(shown.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = gradient(graph=True)
    found = float((torch.autograd.grad(whole, kept["write"])[0] * direction).sum())
    step, tolerance = STEPS[model.cfg.model_name]
    ends = [float(gradient(graph=False, shift=sign * step)) for sign in (1, -1)]
    assert found != 0
    assert found == pytest.approx((ends[0] - ends[1]) / 2 / step, rel=tolerance)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("hooked", [False, True])
def test_checkpointing_leaves_the_gradients(model: Any, tokens: Tensor, reentrant: bool, hooked: bool):
    hooks = [(names(model)["write"], lambda x, hook: 1.5 * x + 0.1)] if hooked else []
    mask = torch.tensor([[0] * 2 + [1] * (tokens.shape[1] - 2), [1] * tokens.shape[1]])
    parameters = dict(model.original_model.named_parameters())

    def gradients() -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        with model.hooks(fwd_hooks=hooks):
            logits = model(tokens.expand(2, -1), attention_mask=mask)
            logits[:, 2:].log_softmax(-1)[..., 7].sum().backward()
        return {name: x.grad for name, x in parameters.items() if x.grad is not None}

    model.train()
    try:
        expected = gradients()
        model.original_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert model.original_model.is_gradient_checkpointing
        found = gradients()
    finally:
        model.original_model.gradient_checkpointing_disable()
        model.eval()
        model.zero_grad(set_to_none=True)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-8, atol=1e-10)
