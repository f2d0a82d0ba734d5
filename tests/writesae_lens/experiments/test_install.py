"""Installs against full passes without a cache, with a hook that adds what was written."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from jaxtyping import TypeCheckError
from matplotlib.figure import Figure

from hooked_models import HookedModelError, HookedRecurrent, zoo
from writesae_lens import WriteSAE, WriteSAEConfig, WriteSAEError
from writesae_lens.experiments import install, install_tokens
from writesae_lens.experiments.decoding import Prefix

LAYER, HEAD = 1, 2
POSITIONS, SAID = 3, 4
HOW = {"positions": POSITIONS, "n_tokens": SAID, "direction": "unembedding", "verbose": False}
JACOBIAN = HOW | {"direction": "jacobian", "n_refinements": 2}


@pytest.fixture(scope="module", params=zoo.SHIPPED)
def model(request):
    return HookedRecurrent.boot_transformers(request.param, device="cpu", dtype=torch.float64)


@pytest.fixture(scope="module")
def gdn():
    return HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")


def read(model, n, length=17):
    ids = model.to_tokens(zoo.held_out_text()[:3000], prepend_bos=False, truncate=False)
    return ids[0, : n * length].view(n, length)


@pytest.fixture
def written(monkeypatch):
    """What is added in every batch of edits, and to which of its prompts: own and control in turn."""
    seen, decode = [], install._Prompts._decode

    def spy(self, added, of):
        seen.append((added.detach().clone(), of))
        return decode(self, added, of)

    monkeypatch.setattr(install._Prompts, "_decode", spy)
    return seen


def full_pass(model, tokens, added=None, first=0):
    """Logits [row, pos, d_vocab] when matrices [row, n, d_k, d_v] are added from position ``first`` on."""

    def add(write, hook):
        flat = added.flatten(-2).to(write.dtype)
        before, after = (
            torch.zeros_like(write[:, :n]) for n in (first, write.shape[1] - first - len(flat[0]))
        )
        return write + torch.cat([before, flat, after], dim=1)

    hooks = [] if added is None else [(model.write_hook_name(LAYER, HEAD), add)]
    return model.run_with_hooks(tokens, fwd_hooks=hooks, use_cache=False)


@torch.no_grad()
def say(model, prompts, added=None, n=SAID):
    """First log-probabilities, and the greedy continuation, every token by a pass over all before it."""
    first, sequence, start = None, prompts, prompts.shape[1] - (0 if added is None else added.shape[1])
    for _ in range(n):
        logits = full_pass(model, sequence, added, start)[:, -1].double()
        first = logits.log_softmax(-1) if first is None else first
        sequence = torch.cat([sequence, logits.argmax(-1, keepdim=True)], dim=1)
    return first, sequence[:, prompts.shape[1] :]


def native_writes(model, prompts):
    """[prompt, position, d_k, d_v] at the last positions."""
    name, cell = model.write_hook_name(LAYER, HEAD), model.cell(LAYER, HEAD)
    with torch.no_grad():
        _, cache = model.run_with_cache(prompts, names_filter=[name])
    return cache[name][:, -POSITIONS:].unflatten(-1, (cell.d_k, cell.d_v)).double()


def check_norms(model, prompts, records, added, control):
    """Rank 1, and magnitude x the native write's norm, for the edit and its control."""
    norms = native_writes(model, prompts).flatten(-2).norm(dim=-1)[records.prompt.to_numpy(copy=True)]
    expected = torch.tensor(records.magnitude.to_numpy(copy=True))[:, None] * norms
    for matrices in (added, control):
        values = torch.linalg.svdvals(matrices.double())
        torch.testing.assert_close(values[..., 0], expected, rtol=1e-4, atol=1e-6)
        assert float((values[..., 1] / values[..., 0]).max()) < 1e-4
    cosine = torch.nn.functional.cosine_similarity(added.flatten(-2), control.flatten(-2), dim=-1)
    assert float(cosine.abs().max()) < 0.5


@pytest.mark.parametrize("direction", ["jacobian", "unembedding"])
def test_every_number_is_that_of_full_passes_with_the_write_added(model, written, direction):
    prompts = read(model, 3)
    result = install_tokens(
        model,
        (LAYER, HEAD),
        prompts,
        magnitude=(1.0, 12.0),
        seed=1,
        **(JACOBIAN | {"direction": direction}),
    )
    records = result.records
    assert len(records) == 3 * 4 * 2
    (added, of), (control, also_of) = written
    assert of.tolist() == also_of.tolist() == records.prompt.tolist() == np.repeat([0, 1, 2], 8).tolist()
    assert records.magnitude.tolist() == [1.0, 12.0] * 12
    check_norms(model, prompts, records, added, control)
    row, target = np.arange(len(records)), records.target.to_numpy()
    base, native = (x[of] for x in say(model, prompts))
    own, own_said = say(model, prompts[of], added)
    other, other_said = say(model, prompts[of], control)
    base, own, other = (x.numpy() for x in (base, own, other))
    rank = [(p > p[row, target][:, None]).sum(1) + 1 for p in (base, own)]
    np.testing.assert_array_equal(records.native_rank, rank[0])
    np.testing.assert_array_equal(records["rank"], rank[1])
    np.testing.assert_array_equal(records.rank_shift, rank[0] - rank[1])
    np.testing.assert_allclose(records.lift, (own - base)[row, target], atol=1e-4)
    np.testing.assert_allclose(records.control_lift, (other - base)[row, target], atol=1e-4)
    assert records.continuation.map(json.loads).tolist() == own_said.tolist()
    assert records.native_continuation.map(json.loads).tolist() == native.tolist()
    for column, said in (("", own_said), ("native_", native), ("control_", other_said)):
        contained = [t in ids for t, ids in zip(target.tolist(), said.tolist(), strict=True)]
        assert records[f"{column}in_continuation"].tolist() == contained
    if direction == "jacobian":
        assert own_said.tolist() != native.tolist()
    assert float(np.abs(records.lift).max()) > 0.1
    check_summary(result)


def check_summary(result):
    records, summary = result.records, result.summary

    def check(found, part):
        n = len(part)
        assert found["target_in_continuation"] == pytest.approx(part.in_continuation.sum() / n)
        assert found["native_target_in_continuation"] == pytest.approx(part.native_in_continuation.sum() / n)
        assert found["control_target_in_continuation"] == pytest.approx(
            part.control_in_continuation.sum() / n
        )
        assert found["first_token"] == pytest.approx((part["rank"] == 1).sum() / n)
        assert found["median_rank_shift"] == np.median(part.rank_shift)
        assert found["mean_lift"] == pytest.approx(np.mean(part.lift))
        assert found["mean_control_lift"] == pytest.approx(np.mean(part.control_lift))

    check(summary, records)
    assert summary["n_installs"] == len(records)
    assert summary["n_prompts"] == records.prompt.nunique()
    for column in ("stratum", "magnitude"):
        groups = summary[f"by_{column}"]
        assert set(groups) == {str(x) for x in records[column]}
        for name, found in groups.items():
            part = records[records[column].astype(str) == name]
            assert found["n"] == len(part)
            check(found, part)
    # Wilson's interval.
    n, p, z = len(records), records.in_continuation.mean(), 1.959963984540054
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    np.testing.assert_allclose(
        summary["target_in_continuation_ci"], [middle - half, middle + half], atol=1e-9
    )


# Directions.


def test_the_unembedding_direction_is_native_key_and_the_targets_unembedding(model, written):
    prompts, targets = read(model, 2), [5, 700, 1999]
    records = install_tokens(model, (LAYER, HEAD), prompts, targets, magnitude=2.0, **HOW).records
    assert records.target.tolist() == targets * 2
    assert set(records.stratum) == {"given"}
    cell, layer = model.cell(LAYER, HEAD), model.mixers[LAYER].original_component
    w_o = (getattr(layer, "out_proj", None) or layer.o_proj).weight.detach().double()
    w_o = w_o[:, HEAD * cell.d_v : (HEAD + 1) * cell.d_v]
    w_u = model.original_model.get_output_embeddings().weight.detach().double()
    name = model.write_factor_hook_names(LAYER)[0]
    with torch.no_grad():
        _, cache = model.run_with_cache(prompts, names_filter=[name])
    keys = cache[name][:, -POSITIONS:, HEAD].double()
    added, of = written[0]
    for row, matrices in enumerate(added.double()):
        value = w_o.T @ w_u[records.target[row]]
        expected = keys[of[row], :, :, None] * value
        unit = expected / expected.flatten(-2).norm(dim=-1)[:, None, None]
        found = matrices / matrices.flatten(-2).norm(dim=-1)[:, None, None]
        torch.testing.assert_close(found, unit, rtol=0, atol=1e-5)


def objective(model, prompts, targets, native, added):
    """The soft maximum, over the coming steps, of the target's margin over the likeliest other token."""
    along = torch.cat([prompts, native[:, :-1]], dim=1)
    logits = full_pass(model, along, added, prompts.shape[1] - POSITIONS)[:, prompts.shape[1] - 1 :].double()
    steps = []
    for step in range(native.shape[1]):
        rows = []
        for row, target in enumerate(targets):
            now = logits[row, step]
            rows.append(now[target] - torch.cat([now[:target], now[target + 1 :]]).max())
        steps.append(torch.stack(rows))
    return torch.stack(steps).exp().sum(0).log()


def test_without_refinements_the_direction_is_the_leading_pair_of_the_true_gradient(model, written):
    prompts, targets = read(model, 2), [11, 900]
    install_tokens(model, (LAYER, HEAD), prompts, targets, **(JACOBIAN | {"n_refinements": 0}))
    added, of = written[0]
    native, cell = say(model, prompts)[1][of], model.cell(LAYER, HEAD)
    shape = len(of), POSITIONS, cell.d_k, cell.d_v
    nothing = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    found = objective(model, prompts[of], targets * 2, native, nothing)
    (gradient,) = torch.autograd.grad(found.sum(), nothing)
    left, values, right = torch.linalg.svd(gradient)
    assert float((values[..., 1] / values[..., 0]).max()) < 0.99  # else the leading pair means little
    pair = left[..., :, 0, None] * right[..., 0, None, :]
    unit = added.double() / added.double().flatten(-2).norm(dim=-1)[..., None, None]
    torch.testing.assert_close(unit, pair, rtol=0, atol=1e-3)


def test_refinements_never_lower_the_objective(model, written):
    prompts, targets, reached = read(model, 2), [11, 900, 1500], []
    native = say(model, prompts)[1]
    for n in (0, 1, 6):
        written.clear()
        install_tokens(model, (LAYER, HEAD), prompts, targets, **(JACOBIAN | {"n_refinements": n}))
        added, of = written[0]
        with torch.no_grad():
            reached.append(objective(model, prompts[of], targets * 2, native[of], added))
    assert float((reached[1] - reached[0]).min()) > -1e-4
    assert float((reached[2] - reached[1]).min()) > -1e-4
    if "mamba2" not in model.cfg.model_name:  # there six steps find nothing better
        assert float((reached[2] - reached[0]).mean()) > 0.05


# Targets.


def native_order(model, prompts):
    with torch.no_grad():
        return model(prompts, use_cache=False)[:, -1].argsort(dim=-1, descending=True).tolist()


def test_every_drawn_target_lies_in_its_stratum(gdn):
    prompts = read(gdn, 16)
    order, half = native_order(gdn, prompts), gdn.cfg.d_vocab // 2
    for seed in (0, 1):
        how = HOW | {"n_tokens": 1, "seed": seed, "direction": "unembedding"}
        records = install_tokens(gdn, (LAYER, HEAD), prompts, **how).records
        assert records.groupby("stratum").size().to_dict() == dict.fromkeys(install.STRATA, 16)
        for row in records.itertuples():
            rank = order[row.prompt].index(row.target) + 1
            assert abs(rank - row.native_rank) <= 1  # equal logits
            if row.stratum == "out_of_context":
                assert rank > half
                assert row.target not in prompts[row.prompt].tolist()
            else:
                low, high = {"frequent": (2, 99), "rank_100_1000": (100, 999), "rare": (1000, 2048)}[
                    row.stratum
                ]
                assert low <= rank <= high


def test_strata_begin_and_end_where_they_say(gdn, monkeypatch):
    """With a single rank in each there is no chance in it."""
    strata = {"frequent": (2, 3), "rank_100_1000": (100, 101), "last": (2048, None), "none": (2049, None)}
    monkeypatch.setattr(install, "STRATA", strata)
    prompts = read(gdn, 3)
    records = install_tokens(gdn, (LAYER, HEAD), prompts, **HOW).records
    expected = [order[rank - 1] for order in native_order(gdn, prompts) for rank in (2, 100, 2048)]
    assert records.target.tolist() == expected
    assert records.stratum.tolist() == ["frequent", "rank_100_1000", "last"] * 3


def test_tokens_of_the_prompt_are_never_out_of_context(gdn, monkeypatch):
    """All but three of the less likely half are in the prompt, so one of these is drawn."""
    monkeypatch.setattr(install, "STRATA", {"out_of_context": (None, None)})
    prompt = torch.arange(2045)[None]
    order = native_order(gdn, prompt)[0]
    left = set(order[1024:]) - set(range(2045))
    if not left:
        prompt = (prompt + 3)[:, :]
        left = set(native_order(gdn, prompt)[0][1024:]) - set(prompt[0].tolist())
    records = install_tokens(gdn, (LAYER, HEAD), prompt, **HOW).records
    assert set(records.target) <= left


def test_strata_that_the_vocabulary_has_not_are_left_out(gdn_model):
    prompts = torch.randint(4, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    result = install_tokens(gdn_model, (LAYER, HEAD), prompts, **JACOBIAN)
    assert result.records.stratum.tolist() == ["frequent", "rank_100_1000", "out_of_context"] * 2
    assert "rare" not in result.summary["by_stratum"]


def test_targets_are_given_by_id_and_by_text(gdn):
    text = gdn.tokenizer.decode([700])
    assert gdn.tokenizer.encode(text, add_special_tokens=False) == [700]
    found = install_tokens(gdn, (LAYER, HEAD), read(gdn, 2), [5, text], **HOW)
    assert found.records.target.tolist() == [5, 700] * 2
    by_id = install_tokens(gdn, (LAYER, HEAD), read(gdn, 2), [5, 700], **HOW)
    pd.testing.assert_frame_equal(found.records, by_id.records)


def test_a_cell_is_given_as_itself_its_place_or_an_sae(gdn):
    cell = gdn.cell(LAYER, HEAD)
    sae = WriteSAE(WriteSAEConfig(d_k=cell.d_k, d_v=cell.d_v, d_sae=8, k=2))
    sae.cfg.metadata.hook_name = gdn.write_hook_name(LAYER, HEAD)
    on_states = WriteSAE(WriteSAEConfig(d_k=cell.d_k, d_v=cell.d_v, d_sae=8, k=2))
    on_states.cfg.metadata.hook_name = gdn.state_hook_name(LAYER, HEAD)
    prompts = read(gdn, 2)
    first, *others = (
        install_tokens(gdn, x, prompts, [5], **HOW).records for x in (cell, (LAYER, HEAD), sae, on_states)
    )
    for other in others:
        pd.testing.assert_frame_equal(first, other)
    elsewhere = install_tokens(gdn, (LAYER, HEAD + 1), prompts, [5], **HOW).records
    assert not np.allclose(first.lift, elsewhere.lift)


# Sizes.


def test_one_prompt_of_the_least_length_and_one_token(gdn, written):
    prompt = read(gdn, 1, POSITIONS + 1)
    how = HOW | {"n_tokens": 1}
    (record,) = install_tokens(gdn, (LAYER, HEAD), prompt, [5], **how).records.itertuples()
    first, said = say(gdn, prompt, written[0][0], n=1)
    native = say(gdn, prompt, n=1)[0]
    assert json.loads(record.continuation) == said[0].tolist()
    assert record.lift == pytest.approx(float(first[0, 5] - native[0, 5]), abs=1e-4)


def test_text_is_cut_into_prompts(gdn):
    text = zoo.held_out_text()[:400]
    ids = gdn.to_tokens(text, prepend_bos=False, truncate=False)[0]
    n = len(ids) // 20
    found = install_tokens(gdn, (LAYER, HEAD), text, [5], context_size=20, **HOW).records
    cut = install_tokens(gdn, (LAYER, HEAD), ids[: n * 20].view(n, 20), [5], **HOW).records
    pd.testing.assert_frame_equal(found, cut)


# Draws.


def test_drawn_continuations_share_their_noise_with_the_native_one(gdn):
    prompts = read(gdn, 3)
    how = HOW | {"n_tokens": 12, "temperature": 1.0, "direction": "unembedding"}
    records = install_tokens(gdn, (LAYER, HEAD), prompts, [5, 900], (1e-6, 50.0), seed=3, **how).records
    small = records[records.magnitude < 1]
    assert small.continuation.tolist() == small.native_continuation.tolist()
    large = records[records.magnitude > 1]
    assert large.continuation.tolist() != large.native_continuation.tolist()
    assert small.native_continuation.nunique() == 3
    again = install_tokens(gdn, (LAYER, HEAD), prompts, [5, 900], (1e-6, 50.0), seed=3, **how).records
    pd.testing.assert_frame_equal(records, again)
    other = install_tokens(gdn, (LAYER, HEAD), prompts, [5, 900], (1e-6, 50.0), seed=4, **how).records
    assert other.native_continuation.tolist() != records.native_continuation.tolist()
    greedy = install_tokens(gdn, (LAYER, HEAD), prompts, [5], **(how | {"temperature": 0.0})).records
    assert greedy.native_continuation.map(json.loads).tolist() == say(gdn, prompts, n=12)[1].tolist()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_tokens_are_drawn_from_the_softmax_at_the_temperature(gdn, temperature):
    n = 2000
    prefix = Prefix(gdn, gdn.cell(LAYER, HEAD), torch.zeros(n, 1, dtype=torch.long))
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -20.0])
    drawn = prefix.decode(logits.expand(n, -1), None, 1, temperature, seed=0)[:, 0]
    expected = n * (logits / temperature).softmax(-1).numpy()
    found = drawn.bincount(minlength=5).numpy()
    assert found.sum() == n
    assert (np.abs(found - expected) <= 4 * np.sqrt(expected) + 1).all()


def test_the_same_seed_gives_the_same_records_and_another_does_not(gdn, written):
    prompts = read(gdn, 2)
    first, again, other = (
        install_tokens(gdn, (LAYER, HEAD), prompts, seed=seed, **HOW) for seed in (1, 1, 2)
    )  # fmt: skip
    pd.testing.assert_frame_equal(first.records, again.records)
    assert first.summary == again.summary
    assert first.records.target.tolist() != other.records.target.tolist()
    assert torch.equal(written[1][0], written[3][0])
    assert not torch.allclose(written[1][0], written[5][0])


# Bad input.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["Chapter and verse"]}, r"not one token but \d+ \('"),
        ({"targets": [""]}, "is not one token"),
        ({"targets": [2048]}, "token 2048 does not exist: ids run from 0 to 2047"),
        ({"targets": [-1]}, "token -1 does not exist"),
        ({"targets": []}, "there are no targets"),
        ({"positions": 17}, "prompts of 17 tokens are too short to write at their last 17"),
        ({"positions": 99}, "too short to write at their last 99"),
        ({"positions": 0}, "positions=0"),
        ({"magnitude": 0.0}, "magnitude must be positive"),
        ({"magnitude": -1.0}, "magnitude must be positive"),
        ({"magnitude": float("nan")}, "magnitude must be positive"),
        ({"magnitude": (1.0, float("inf"))}, "magnitude must be positive"),
        ({"magnitude": ()}, "magnitude must be positive"),
        ({"n_tokens": 0}, "n_tokens=0"),
        ({"n_refinements": -1}, "n_refinements=-1"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"seed": -1}, "seed=-1"),
        ({"context_size": 8}, "cut into passages already"),
    ],
)
def test_bad_input_is_answered_in_one_line(gdn, options, message):
    with pytest.raises(WriteSAEError, match=message) as caught:
        install_tokens(gdn, (LAYER, HEAD), read(gdn, 2), **(HOW | options))
    assert "\n" not in str(caught.value)


def test_the_pieces_of_a_target_are_named(gdn):
    ids = gdn.tokenizer.encode("Chapter and verse", add_special_tokens=False)
    with pytest.raises(WriteSAEError) as caught:
        install_tokens(gdn, (LAYER, HEAD), read(gdn, 2), ["Chapter and verse"], **HOW)
    assert f"not one token but {len(ids)}" in str(caught.value)
    assert ", ".join(repr(gdn.tokenizer.decode([i])) for i in ids) in str(caught.value)


def test_cells_directions_and_prompts_that_do_not_exist(gdn):
    with pytest.raises(HookedModelError, match="no cell at layer 2, head 0"):
        install_tokens(gdn, (2, 0), read(gdn, 2), **HOW)
    # The annotation answers first, where annotations are checked.
    with pytest.raises((WriteSAEError, TypeCheckError), match="direction"):
        install_tokens(gdn, (LAYER, HEAD), read(gdn, 2), **(HOW | {"direction": "sideways"}))
    with pytest.raises(
        WriteSAEError, match="direction='sideways' is unknown: choose jacobian or unembedding"
    ):
        install.check_choice("direction", "sideways", "jacobian", "unembedding")
    for prompts, message in ((read(gdn, 2)[:0], "LongTensor"), (read(gdn, 2) + 5000, "another tokenizer")):
        with pytest.raises(WriteSAEError, match=message):
            install_tokens(gdn, (LAYER, HEAD), prompts, **HOW)


def test_a_model_without_a_tokenizer_takes_ids_only(gdn, monkeypatch):
    prompts = read(gdn, 1)
    monkeypatch.setattr(gdn, "tokenizer", None)
    assert install_tokens(gdn, (LAYER, HEAD), prompts, [5], **HOW).records.target.tolist() == [5]
    with pytest.raises(WriteSAEError, match="no tokenizer to read text with"):
        install_tokens(gdn, (LAYER, HEAD), prompts, [" the"], **HOW)


# Going on.


def test_an_interrupted_run_resumes_and_is_saved_and_drawn(gdn, tmp_path, monkeypatch):
    monkeypatch.setattr(install, "batches", lambda n, _: [slice(i, i + 1) for i in range(n)])
    prompts, one, calls = read(gdn, 3), install._Prompts.install, []
    how = JACOBIAN | {"temperature": 1.0, "n_refinements": 1}
    whole = install_tokens(gdn, (LAYER, HEAD), prompts, **how)
    assert whole.records.prompt.tolist() == [0] * 4 + [1] * 4 + [2] * 4

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return one(*args)

    monkeypatch.setattr(install._Prompts, "install", interrupted)
    how["progress_folder"] = str(tmp_path / "p")
    with pytest.raises(KeyboardInterrupt):
        install_tokens(gdn, (LAYER, HEAD), prompts, **how)
    resumed = install_tokens(gdn, (LAYER, HEAD), prompts, **how)
    assert len(calls) == 4
    pd.testing.assert_frame_equal(resumed.records, whole.records, check_dtype=False)
    assert resumed.summary == whole.summary
    for other in (
        {"seed": 1}, {"magnitude": 2.0}, {"targets": [5]}, {"positions": 2}, {"direction": "unembedding"},
        {"n_refinements": 3}, {"n_tokens": 5}, {"temperature": 0.5},
    ):  # fmt: skip
        with pytest.raises(WriteSAEError, match="other settings"):
            install_tokens(gdn, (LAYER, HEAD), prompts, **(how | other))
    with pytest.raises(WriteSAEError, match="other settings"):
        install_tokens(gdn, (LAYER, HEAD + 1), prompts, **how)
    out = resumed.save(tmp_path / "out")
    assert {p.name for p in out.iterdir()} == {"records.csv", "summary.json", "install.png"}
    assert json.loads((out / "summary.json").read_text(), parse_constant=pytest.fail) == resumed.summary
    pd.testing.assert_frame_equal(pd.read_csv(out / "records.csv"), resumed.records, check_dtype=False)
    assert (out / "install.png").read_bytes().startswith(b"\x89PNG")
    assert isinstance(resumed.plot(), Figure)


def test_greedy_records_do_not_depend_on_how_prompts_are_batched(gdn, monkeypatch):
    prompts = read(gdn, 3)
    together = install_tokens(gdn, (LAYER, HEAD), prompts, [5, 900], **JACOBIAN).records
    monkeypatch.setattr(install, "batches", lambda n, _: [slice(0, 2), slice(2, 4)])
    apart = install_tokens(gdn, (LAYER, HEAD), prompts, [5, 900], **JACOBIAN).records
    for column in ("prompt", "target", "native_rank", "continuation", "native_continuation"):
        assert together[column].tolist() == apart[column].tolist()
    np.testing.assert_allclose(together.lift, apart.lift, atol=1e-3)
