"""Attributions against autograd through hooked full passes, finite differences, passes without a part."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hooked_models import HookedModelError, HookedRecurrent, zoo
from tests.writesae_lens.experiments.truth import make_codes, make_sae, read_passages, writes
from writesae_lens import WriteSAEError
from writesae_lens.experiments import ExperimentResult
from writesae_lens.use.attribution import attribute
from writesae_lens.use.attribution.ablations import rounding
from writesae_lens.use.attribution.memory import Question
from writesae_lens.use.labels import add_labels

pytestmark = pytest.mark.filterwarnings("ignore::writesae_lens.experiments.origin.ResultWarning")
COLUMNS = ["layer", "head", "position", "token", "text", "feature", "side", "coefficient"]
COLUMNS += ["attribution", "integrated", "ablated", "label"]
TARGET, OTHER = 300, 301


@pytest.fixture(scope="module", params=zoo.SHIPPED)
def model(request):
    """Each shipped model in float64."""
    return HookedRecurrent.boot_transformers(request.param, device="cpu", dtype=torch.float64)


@pytest.fixture(scope="module")
def prompt(model) -> Tensor:
    return read_passages(model, n=1, length=14)[0]


def saes_of(model, kind="codes"):
    """SAEs on two heads of one layer and one of a later one."""
    make = make_codes if kind == "codes" else make_sae
    options = {"rank": 2} if kind == "rank 2" else {}
    where = ((0, 1), (1, 0), (1, 2), (3, 1))
    flat = {"kind": "flat"} if kind == "flat" else {}
    return [make(model, layer=n, head=h, seed=n + h, **flat, **options) for n, h in where]


def site(sae):
    _, layer, *_, head = sae.cfg.metadata.hook_name.split(".")
    return int(layer), int(head)


def difference(model, tokens, hooks=()):
    """L at the last token of each row of a full pass."""
    logits = model.run_with_hooks(tokens, fwd_hooks=list(hooks))[:, -1]
    return logits[:, TARGET] - logits[:, OTHER]


def write_and_gradient(model, prompt, sae):
    """Native writes of the SAE's cell and dL/dW there, [pos, d_k, d_v], by autograd through a full pass."""
    name, seen = sae.cfg.metadata.hook_name, {}

    def hook(x, hook):
        seen["write"], seen["zero"] = x.detach(), torch.zeros_like(x, requires_grad=True)
        return x + seen["zero"]

    (grad,) = torch.autograd.grad(difference(model, prompt[None], [(name, hook)])[0], seen["zero"])
    cell = model.cell(*site(sae))
    return (x[0].unflatten(-1, (cell.d_k, cell.d_v)) for x in (seen["write"], grad))


def plain_parts(sae, native, only=None):
    """{(position, feature): matrix} of all that is active, from the SAE's own encoding of built writes."""
    parts = {}
    for position, write in enumerate(native):
        if only not in (None, position):
            continue
        with torch.no_grad():
            acts = sae.encode(write.flatten()[None])[0].double()
        for feature in acts.nonzero().flatten().tolist():
            if getattr(sae.cfg, "decoder", "") == "codes":
                u, w = sae.dec_key.detach().double(), sae.dec_value.detach().double()
                a, b = acts[: len(u)], acts[len(u) :]
                is_key = feature < len(u)
                key = a[feature] * u[feature] if is_key else a @ u
                value = b @ w if is_key else b[feature - len(u)] * w[feature - len(u)]
                parts[position, feature] = torch.outer(key, value)
            else:
                atom = sae.W_dec[feature].detach().double().view(write.shape)
                parts[position, feature] = acts[feature] * atom
    return parts


def part_of(model, sae, prompt, row):
    """The part of a record's feature, flattened."""
    native = writes(model, prompt[None], *site(sae))[0]
    return plain_parts(sae, native, row.position)[row.position, row.feature].flatten()


def rows_of(records, sae):
    layer, head = site(sae)
    return records[(records.layer == layer) & (records["head"] == head)]


@pytest.mark.parametrize("kind", ["codes", "atoms", "rank 2", "flat"])
def test_attributions_are_products_with_the_gradients_of_a_full_hooked_pass(model, prompt, kind):
    saes = saes_of(model, kind)
    result = attribute(model, saes, prompt, TARGET, OTHER, steps=0, n_check=0)
    assert list(result.records.columns) == COLUMNS
    assert result.records[["integrated", "ablated"]].isna().all(axis=None)
    assert result.summary["logit_difference"] == pytest.approx(difference(model, prompt[None])[0].item())
    for sae in saes:
        rows = rows_of(result.records, sae)
        native, gradients = write_and_gradient(model, prompt, sae)
        parts = plain_parts(sae, native)
        expected = {at: float((gradients[at[0]] * part).sum()) for at, part in parts.items()}
        features = rows[rows.feature >= 0]
        found = dict(zip(zip(features.position, features.feature), features.attribution))
        size = max(map(abs, expected.values()))
        assert found == pytest.approx(expected, abs=1e-4 * size)
        # Errors: what is left beside one side.
        of_one_side = features[features.side != "key"].groupby("position").attribution.sum()
        whole = (gradients * native).sum((-1, -2))
        left = [float(whole[n]) - of_one_side.get(n, 0.0) for n in range(len(prompt))]
        errors = rows[rows.feature == -1].sort_values("position")
        assert errors.side.eq("error").all()
        np.testing.assert_allclose(errors.attribution, left, atol=1e-5 * float(whole.abs().max()))
        if kind == "codes":
            of_keys = features[features.side == "key"].groupby("position").attribution.sum()
            np.testing.assert_allclose(of_keys, of_one_side, atol=1e-4 * size)


def test_an_attribution_is_a_finite_difference(model, prompt):
    saes = saes_of(model)
    row = attribute(model, saes, prompt, TARGET, OTHER, steps=0, n_check=0).records
    row = row[row.feature >= 0].iloc[0]
    sae = next(x for x in saes if site(x) == (row.layer, row["head"]))
    part = part_of(model, sae, prompt, row)
    moved = torch.stack([1e-2 * part, -1e-2 * part])

    def hook(x, hook):
        x = x.clone()
        x[:, row.position] += moved
        return x

    with torch.no_grad():
        up, down = difference(model, prompt.expand(2, -1), [(sae.cfg.metadata.hook_name, hook)])
    assert row.attribution == pytest.approx(float(up - down) / 2e-2, rel=3e-3)


@pytest.mark.parametrize("kind", ["codes", "rank 2"])
def test_ablated_effects_are_those_of_full_passes_without_the_part(model, prompt, kind):
    saes = saes_of(model, kind)
    result = attribute(model, saes, prompt, TARGET, OTHER, steps=0, n_check=5)
    features = result.records[result.records.feature >= 0]
    assert features.ablated.notna().tolist() == [True] * 5 + [False] * (len(features) - 5)
    for row in features.head(5).itertuples():
        sae = next(x for x in saes if site(x) == (row.layer, row.head))
        part = part_of(model, sae, prompt, row)

        def hook(x, hook, row=row, part=part):
            x = x.clone()
            x[:, row.position] -= part
            return x

        with torch.no_grad():
            without = difference(model, prompt[None], [(sae.cfg.metadata.hook_name, hook)])
        effect = result.summary["logit_difference"] - float(without)
        assert row.ablated == pytest.approx(effect, rel=1e-4, abs=1e-6)
    checked = features.head(5)
    r = np.corrcoef(checked.attribution, checked.ablated)[0, 1]
    assert result.summary["ablation_correlation"] == pytest.approx(r)


def test_integrated_attributions_sum_to_what_deleting_all_writes_of_the_cells_changes(model, prompt):
    saes = saes_of(model)
    result = attribute(model, saes, prompt, TARGET, OTHER, steps=24, n_check=0)
    hooks = [(sae.cfg.metadata.hook_name, lambda x, hook: torch.zeros_like(x)) for sae in saes]
    with torch.no_grad():
        deleted = float(difference(model, prompt[None], hooks)[0])
    summary = result.summary
    assert summary["deleted_difference"] == pytest.approx(deleted, abs=1e-5)
    one_side = result.records[result.records.side != "key"]
    memories = summary["logit_difference"] - deleted
    assert one_side.integrated.sum() == pytest.approx(memories, rel=0.01)
    assert summary["completeness"] == pytest.approx(one_side.integrated.sum() / memories)
    assert summary["of_features"] + summary["of_errors"] == pytest.approx(summary["completeness"])
    derivatives = one_side.attribution.sum() / memories
    assert summary["completeness_of_derivatives"] == pytest.approx(derivatives)


def test_integrated_attributions_hold_the_norm_of_a_head_at_its_native_scale():
    """In Gated DeltaNet a head gives o / rms(o) times a gate: a part c contributes c / rms(o) times it."""
    model = HookedRecurrent.boot_transformers("tiny-gdn", device="cpu", dtype=torch.float64)
    sae, prompt = make_codes(model, layer=1, head=2), read_passages(model, n=1, length=14)[0]
    records = attribute(model, sae, prompt, TARGET, OTHER, steps=12, n_check=0).records
    memory, contribution = (model.hook_name(1, name) for name in ("recurrence_out", "head_out"))
    with torch.no_grad():
        cache = model.run_with_cache(prompt[None], names_filter=[memory, contribution])[1]
    native, outputs = cache[contribution][0, :, 2], cache[memory][0, :, 2]
    nodes, weights = np.polynomial.legendre.leggauss(12)
    mean = torch.zeros_like(native)
    for node, weight in zip((nodes + 1) / 2, weights / 2):
        head = (node * native).requires_grad_()

        def hook(x, hook, head=head):
            return torch.cat([x[:, :, :2], head[None, :, None], x[:, :, 3:]], dim=2)

        (grad,) = torch.autograd.grad(difference(model, prompt[None], [(contribution, hook)])[0], head)
        mean += weight * grad
    for row in records[records.feature >= 0].head(8).itertuples():
        part = part_of(model, sae, prompt, row)

        def add(x, hook, row=row, part=part):
            x = x.clone()
            x[:, row.position] += part
            return x

        with torch.no_grad(), model.hooks(fwd_hooks=[(sae.cfg.metadata.hook_name, add)]):
            moved = model.run_with_cache(prompt[None], names_filter=[memory])[1][memory][0, :, 2]
        ratio = (native / outputs) * (moved - outputs)
        assert row.integrated == pytest.approx(float((mean * ratio).sum()), rel=1e-3, abs=1e-8)


def test_later_tokens_have_no_part_and_the_runner_up_is_the_default(gdn, passages_of_gdn):
    prompt = passages_of_gdn
    sae = make_codes(gdn)
    with torch.no_grad():
        logits = gdn(prompt[None])[0, 9]
    first, second = logits.topk(2).indices.tolist()
    inside = attribute(gdn, sae, prompt, first, position=9, n_check=2)
    assert (inside.summary["target"], inside.summary["alternative"]) == (first, second)
    assert inside.summary["logit_difference"] == pytest.approx(
        float(logits[first] - logits[second]), abs=1e-5
    )
    alone = attribute(gdn, sae, prompt[:10], first, position=-1, n_check=2)
    names = ["position", "feature", "attribution", "integrated", "ablated"]
    assert inside.records[names].to_numpy() == pytest.approx(alone.records[names].to_numpy(), nan_ok=True)
    assert inside.summary["position"] == 9
    other = attribute(gdn, sae, prompt, second, position=-11, n_check=0, steps=0)
    assert other.summary["alternative"] == first


@pytest.fixture
def passages_of_gdn(gdn):
    return read_passages(gdn)[0]


def test_labels_texts_and_figures(gdn, tmp_path):
    sae = make_codes(gdn)
    prompt = "It was late in the evening when Mr. Darcy"
    records = attribute(gdn, sae, prompt, " was", n_check=0).records
    feature = int(records[records.feature >= 0].feature.iloc[0])
    add_labels(sae, {feature: "an evening"})
    result = attribute(gdn, sae, prompt, " was", n_check=4)
    rows = result.records
    assert set(rows.label[rows.feature == feature]) == {"an evening"}
    assert set(rows.label[rows.feature != feature]) == {""}
    assert "'an evening'" in result.headline
    assert "' was' over " in result.headline
    tokens = gdn.to_tokens(prompt, prepend_bos=False)[0].tolist()
    assert result.summary["tokens"] == tokens
    assert result.summary["prompt"] == prompt
    of_error = rows[rows.feature == -1].sort_values("position")
    assert of_error.token.tolist() == tokens
    assert "".join(of_error.text) == prompt
    folder = result.save(tmp_path / "out")
    assert {"attribute.png", "attribute_ablations.png"} <= {path.name for path in folder.iterdir()}
    loaded = ExperimentResult.load(folder)
    assert loaded.records.attribution.tolist() == rows.attribution.tolist()
    assert loaded.plot().axes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": 10**6}, "token 1000000 does not exist"),
        ({"target": True}, "a token is an id or the text of one token, not True"),
        ({"target": torch.tensor(True)}, "a token is an id or the text of one token, not torch.bool"),
        ({"target": " zebra crossing"}, "is not one token"),
        ({"alternative": TARGET}, "are the same token"),
        ({"position": 14}, "position 14 does not exist: the prompt has tokens 0 to 13, or -1 to -14"),
        ({"position": 0.5}, "position 0.5 does not exist"),
        ({"steps": -1}, "steps=-1 makes no sense"),
        ({"prompt": torch.zeros(2, 5, dtype=torch.long)}, "one prompt is wanted, got 2 rows"),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_wrong_input_is_refused_in_one_line(gdn, change, message):
    arguments = {"prompt": read_passages(gdn, n=1, length=14)[0], "target": TARGET} | change
    with pytest.raises(WriteSAEError, match=message):
        attribute(gdn, make_codes(gdn), **arguments)


def test_states_and_hooked_models_are_refused(gdn):
    prompt = read_passages(gdn)[0]
    with pytest.raises(WriteSAEError, match="SAE of layer 1 head 2 is on states: give SAEs on writes"):
        attribute(gdn, make_sae(gdn, "state"), prompt, TARGET)
    sae = make_codes(gdn)
    with (
        gdn.hooks(fwd_hooks=[(gdn.write_hook_name(0, 0), lambda x, hook: 2 * x)]),
        pytest.raises(HookedModelError, match=r"hook_write\.0 is hooked: remove the hooks first"),
    ):
        attribute(gdn, sae, prompt, TARGET)
    assert not gdn.busy_hooks


def test_a_cell_where_nothing_fires_has_errors_alone(gdn):
    sae = make_codes(gdn)
    with torch.no_grad():
        sae.b_enc[:] = -1e3
    result = attribute(gdn, sae, read_passages(gdn)[0], TARGET)
    assert result.records.side.eq("error").all()
    assert result.summary["ablation_correlation"] is None
    assert result.summary["completeness"] == pytest.approx(1, abs=0.01)
    assert result.plot().axes


@pytest.mark.parametrize("name", zoo.SHIPPED)
def test_ablated_effects_that_are_rounding_are_said_to_be(name):
    """The rounding that is expected is that by which effects in bfloat16 differ from those in float32."""
    half = HookedRecurrent.boot_transformers(name, device="cpu", dtype=torch.bfloat16)
    full = HookedRecurrent.boot_transformers(name, device="cpu", dtype=torch.float32)
    full.original_model.load_state_dict(
        {key: x.float() for key, x in half.original_model.state_dict().items()}
    )
    saes = [make_codes(full, layer=0, head=1), make_codes(full, layer=1, head=2, seed=3)]
    prompt = read_passages(full, n=1, length=14)[0]
    of_half, of_full = (attribute(m, saes, prompt, TARGET, OTHER, steps=0, n_check=60) for m in (half, full))
    both = of_half.records.merge(of_full.records, on=["layer", "head", "position", "feature"])
    both = both.dropna(subset=["ablated_x", "ablated_y"])
    size = float(np.sqrt((both.ablated_x - both.ablated_y).pow(2).mean()))
    expected = [rounding(half, Question(prompt, TARGET, OTHER), layer) for layer in (0, 1)]
    assert 0.5 < size / np.mean(expected) < 2.5
    of_layer = of_half.records.ablated.abs() <= 2 * of_half.records.layer.map(dict(enumerate(expected)))
    warning = of_half.summary["warnings"][-1]
    assert warning.startswith(f"{of_layer.sum()} of 60 ablated effects are no larger than what rounding")
    assert warning in of_half.headline
    assert rounding(full, Question(prompt, TARGET, OTHER), 0) == 0
    assert not any("ablated" in found for found in of_full.summary["warnings"])
