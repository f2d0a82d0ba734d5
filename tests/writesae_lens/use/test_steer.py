"""Steered continuations and dose curves against full passes with hooks by hand, without a cache."""

from __future__ import annotations

import json
import math

import pytest
import torch

from hooked_models import HookedRecurrent, zoo
from hooked_models.errors import HookedModelError
from tests.writesae_lens.experiments.truth import make_codes, make_sae, read_passages
from tests.writesae_lens.use.test_steering import HEAD, LAYER, by_hand
from writesae_lens import WriteSAEError
from writesae_lens.experiments.result import ExperimentResult
from writesae_lens.use.labels import add_labels
from writesae_lens.use.steer import Steered, steer
from writesae_lens.use.steering import steering

OF_CODES = {3: 6.0, (5, 25): 2.0}
OF_ATOMS = {3: 4.0}
HOW = {"unit": "absolute", "doses": (1.0, 3.0), "n_tokens": 4, "temperature": 0.0, "n_continuations": 1}


@pytest.fixture(scope="module", params=zoo.SHIPPED)
def model(request):
    return HookedRecurrent.boot_transformers(request.param, device="cpu")


@pytest.fixture(scope="module")
def prompt(model):
    return read_passages(model)[0, :12]


@pytest.fixture(scope="module", params=["codes", "atoms"])
def sae_and_features(request, model):
    if request.param == "codes":
        return make_codes(model, layer=LAYER, head=HEAD), OF_CODES
    return make_sae(model, layer=LAYER, head=HEAD, rank=2), OF_ATOMS


def hooks_for(model, sae, features, dose):
    scaled = {feature: size * dose for feature, size in features.items()}
    return by_hand(model, sae, scaled) if dose else []


def log_probabilities(model, ids, hooks):
    with torch.no_grad():
        return model.run_with_hooks(ids[None], fwd_hooks=hooks, use_cache=False)[0].double().log_softmax(-1)


def greedy(model, ids, n, hooks):
    for _ in range(n):
        ids = torch.cat([ids, log_probabilities(model, ids, hooks)[-1:].argmax(-1)])
    return ids


def test_continuations_and_figures_equal_full_passes(model, prompt, sae_and_features):
    sae, features = sae_and_features
    followed = [11, 70]
    result = steer(model, sae, features, prompt, promoted=tuple(followed), **HOW)
    start, n = len(prompt) - 1, HOW["n_tokens"]
    native = greedy(model, prompt, n, [])
    along = log_probabilities(model, native[:-1], [])[start:]
    control = {}
    for one in result.summary["control"]:
        feature = one["features"][0] if len(one["features"]) == 1 else tuple(one["features"])
        control[feature] = one["coefficient"]
    assert result.records.condition.tolist() == ["native", "steered", "steered", "random", "random"]
    for row in result.records.itertuples():
        hooks = hooks_for(model, sae, control if row.condition == "random" else features, row.dose)
        own = greedy(model, prompt, n, hooks)
        assert json.loads(row.ids) == own[len(prompt) :].tolist()
        assert row.text == model.tokenizer.decode(own[len(prompt) :].tolist())
        here = log_probabilities(model, native[:-1], hooks)[start:]
        kl = float((here.exp() * (here - along)).sum(-1).mean())
        assert row.kl == pytest.approx(kl, rel=1e-3, abs=1e-7)
        assert row.promoted == pytest.approx(float(here.exp()[:, followed].sum(-1).mean()), rel=1e-4)
        natively = log_probabilities(model, own[:-1], [])[start:]
        loss = -natively.gather(-1, own[len(prompt) :, None]).mean()
        assert row.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert result.records.kl.max() > 1e-3


def test_the_control_is_another_feature_of_the_side_at_the_same_norm(model, prompt, sae_and_features):
    sae, features = sae_and_features
    result = steer(model, sae, features, prompt, **HOW)
    is_codes = sae.cfg.decoder == "codes"
    steered = {f for feature in features for f in (feature if isinstance(feature, tuple) else (feature,))}

    def norm(numbers):
        if not is_codes:
            return float(sae.W_dec[numbers[0]].detach().norm())
        return math.prod(
            float((sae.dec_key[f] if f < sae.cfg.n_key else sae.dec_value[f - sae.cfg.n_key]).detach().norm())
            for f in numbers
        )

    for own, other in zip(result.summary["features"], result.summary["control"], strict=True):
        assert not steered & set(other["features"])
        assert [is_codes and f < 16 for f in own["features"]] == [
            is_codes and f < 16 for f in other["features"]
        ]
        size = own["coefficient"] * norm(own["features"])
        assert other["coefficient"] * norm(other["features"]) == pytest.approx(size, rel=1e-5)


def test_followed_tokens_are_those_that_gain_most_at_the_prompt(model, prompt, sae_and_features):
    sae, features = sae_and_features
    result = steer(model, sae, features, prompt, **HOW)
    native, steered = (
        log_probabilities(model, prompt, hooks_for(model, sae, features, dose)) for dose in (0, 1)
    )
    terms = (steered.exp() * (steered - native)).mean(0)
    assert result.summary["promoted"] == terms.topk(5).indices.tolist()
    assert result.summary["promoted_tokens"] == [model.tokenizer.decode([t]) for t in terms.topk(5).indices]


def test_draws_are_shared_and_repeatable(gdn):
    sae, prompt = make_codes(gdn, layer=LAYER, head=HEAD), "The house was"
    how = HOW | {"temperature": 1.0, "n_continuations": 3, "doses": (1e-6,), "n_tokens": 6}
    first, again = (steer(gdn, sae, OF_CODES, prompt, **how) for _ in range(2))
    assert first.records.equals(again.records)
    by_number = first.records.groupby("continuation")
    assert all(group.ids.nunique() == 1 for _, group in by_number)  # so little moves no draw
    assert first.records.ids.nunique() == 3
    other = steer(gdn, sae, OF_CODES, prompt, **how, seed=1)
    assert set(other.records.ids) != set(first.records.ids)


def test_a_saved_result_shows_the_same(gdn, tmp_path, capsys):
    sae = make_codes(gdn, layer=LAYER, head=HEAD)
    result = steer(gdn, sae, OF_CODES, "The <b>house</b> was", **HOW)
    result.save(tmp_path / "out")
    assert (tmp_path / "out" / "steer.png").stat().st_size > 5_000
    again = Steered.load(tmp_path / "out")
    assert again._repr_html_() == result._repr_html_()
    assert "<b>house</b>" not in result._repr_html_()
    again.show()
    shown = capsys.readouterr().out
    for condition, text in result.side_by_side().items():
        assert f"{condition}: The <b>house</b> was|{text}" in shown
    assert list(result.side_by_side()) == ["native", "steered", "random"]
    assert ExperimentResult.load(tmp_path / "out").headline == result.headline
    for condition, doses in result.summary["by_dose"].items():
        for dose, figures in doses.items():
            rows = result.records
            rows = rows[(rows.condition == condition) & (rows.dose == float(dose))]
            assert figures["kl"] == pytest.approx(rows.kl.mean())


def test_prompts_are_shown_without_control_characters_and_ids_without_a_tokenizer(gdn, monkeypatch, capsys):
    sae = make_codes(gdn, layer=LAYER, head=HEAD)
    result = steer(gdn, sae, OF_CODES, "The\x1b[2J house\u202e\nwas", **HOW)
    result.show()
    shown, page = capsys.readouterr().out, result._repr_html_()
    assert "native: The[2J house\nwas|" in shown
    assert not {"\x1b", "\u202e"} & set(shown + page)
    monkeypatch.setattr(gdn, "tokenizer", None)
    result = steer(gdn, sae, OF_CODES, [5, 6, 7], **HOW)
    result.show()
    shown = capsys.readouterr().out
    assert shown.startswith(f"native: {result.records.ids[0]}\n")
    assert "None" not in shown + result._repr_html_()


def test_labels_are_whole(gdn):
    sae = make_codes(gdn, layer=LAYER, head=HEAD)
    add_labels(sae, {3: "xerox", 25: "x axis x"})
    summary = steer(gdn, sae, OF_CODES, "The house was", **HOW).summary
    assert [one["label"] for one in summary["features"]] == ["xerox", "x axis x"]
    add_labels(sae, {5: "sex"})
    summary = steer(gdn, sae, {(5, 25): 2.0}, "The house was", **HOW).summary
    assert summary["features"][0]["label"] == "sex x x axis x"


def test_without_another_feature_there_is_no_control(gdn):
    sae = make_sae(gdn, layer=LAYER, head=HEAD, d_sae=2, k=1)
    with pytest.warns(UserWarning, match="no other feature to draw a control from"):
        result = steer(gdn, sae, {0: 1.0, 1: 2.0}, "The house was", **HOW)
    assert set(result.records.condition) == {"native", "steered"}
    assert "random" not in result.headline.split("[")[0]


def test_wrong_input_is_one_line(gdn, without_type_checks):
    sae = make_codes(gdn, layer=LAYER, head=HEAD)
    length = gdn.to_tokens("The house was", prepend_bos=False).shape[1]
    for options, message in (
        ({"doses": (1.0, 1.0)}, "doses must differ"),
        ({"doses": (0.0,)}, "doses must be positive"),
        ({"promoted": (" two words",)}, "is not one token"),
        ({"positions": -1}, "0 or more"),
        ({"n_tokens": 0}, "n_tokens=0"),
        ({"promoted": (5, 5)}, "promoted must be tokens that differ"),
        ({"promoted": ()}, "promoted must be tokens that differ, one at least"),
        ({"positions": [0, 99]}, "beyond the text: positions 0 to"),
        ({"positions": slice(50, None)}, "beyond the text"),
        ({"positions": [length]}, "changes no prediction within the prompt"),
        ({"positions": [length + 3]}, f"beyond the text: positions 0 to {length + 2} "),
    ):
        with pytest.raises(WriteSAEError, match=message) as caught:
            steer(gdn, sae, OF_CODES, "The house was", **(HOW | options))
        assert "\n" not in str(caught.value)
    late = steer(gdn, sae, OF_CODES, "The house was", **HOW, positions=length, promoted=(5,))
    assert late.records.kl.max() > 0
    with steering(gdn, sae, {3: 1.0}, unit="absolute"), pytest.raises(HookedModelError, match="is hooked"):
        steer(gdn, sae, OF_CODES, "The house was", **HOW)
