"""The replacement test against full edited forward passes of the same model."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from sae_lens import TopKSAE, TopKSAEConfig

from hooked_models import HookedModelError, HookedRecurrent, zoo
from writesae_lens import WriteSAE, WriteSAEConfig, WriteSAEError
from writesae_lens.experiments import replacement_test
from writesae_lens.experiments.replace import CONDITIONS
from writesae_lens.report.page import make_report


@pytest.fixture(scope="module")
def model():
    return HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")


@pytest.fixture(scope="module", params=zoo.SHIPPED)
def each_model(request):
    return HookedRecurrent.boot_transformers(request.param, device="cpu")


@pytest.fixture(scope="module")
def tokens(model):
    ids = model.to_tokens(zoo.held_out_text()[:3000], prepend_bos=False, truncate=False)
    return ids[0, : 3 * 40].view(3, 40)


def make_sae(model, layer=1, head=2, kind="write", **options):
    torch.manual_seed(0)
    cell = model.cell(layer, head)
    sae = WriteSAE(WriteSAEConfig(d_k=cell.d_k, d_v=cell.d_v, **({"d_sae": 64, "k": 4} | options)))
    with torch.no_grad():
        sae.b_enc.normal_(std=0.05)
    sae.cfg.metadata.hook_name = getattr(model, f"{kind}_hook_name")(layer, head)
    return sae


def log_probs_with_write(model, passage, layer, head, position, matrix, replaces="write"):
    """The next-token distribution at one position when the cell writes ``matrix`` there."""

    def put(new):
        def swap(x, hook):
            x = x.clone()
            x[:, position] = new.flatten()
            return x

        return swap

    write = model.write_hook_name(layer, head)
    hooks = [(write, put(matrix))]
    if replaces == "update" and model.mixers[layer].erases:
        hooks.append((write.replace("hook_write", "hook_erase"), put(torch.zeros_like(matrix))))
    with torch.no_grad():
        logits = model.run_with_hooks(passage[None], fwd_hooks=hooks)
    return logits[0, position].double().log_softmax(-1)


def matrices_of_record(model, sae, passage, row, scale):
    """Native write, and atom at its size, both built from the hook's own activation."""
    name = sae.cfg.metadata.hook_name.replace("hook_state", "hook_write")
    with torch.no_grad():
        _, cache = model.run_with_cache(passage[None], names_filter=[name])
    write = cache[name][0, row.position].double()
    atom = sae.W_dec[row.atom].detach().double()
    size = row.coefficient if scale == "coefficient" else write.norm() / atom.norm()
    return write, atom * size


@pytest.mark.parametrize(
    ("options", "layer", "kind", "rank"),
    [
        ({}, 0, "write", 1),
        ({"scale": "matched_norm"}, 1, "state", 1),
        ({"kl": "base_patched"}, 3, "write", 2),
        ({"replaces": "update"}, 3, "write", 1),
    ],
)
def test_every_condition_is_a_full_edited_forward_pass(each_model, tokens, options, layer, kind, rank):
    model, sae = each_model, make_sae(each_model, layer, 1, kind, rank=rank)
    result = replacement_test(model, sae, tokens, max_firings=9, verbose=False, seed=3, **options)
    for row in result.records.itertuples():
        passage = tokens[row.passage]
        write, atom = matrices_of_record(model, sae, passage, row, options.get("scale", "coefficient"))
        assert row.token == passage[row.position]
        assert row.write_norm == pytest.approx(write.norm().item(), rel=1e-4)
        cosine = torch.nn.functional.cosine_similarity(write, atom, dim=0)
        assert row.cosine == pytest.approx(cosine.item(), abs=1e-4)
        with torch.no_grad():
            base = model(passage[None])[0, row.position].double().log_softmax(-1)
        for name, matrix in (("atom", atom), ("delete", torch.zeros_like(atom))):
            replaces = options.get("replaces", "write")
            patched = log_probs_with_write(model, passage, layer, 1, row.position, matrix, replaces)
            p, q = (base, patched) if options.get("kl") == "base_patched" else (patched, base)
            expected = (p.exp() * (p - q)).sum().item()
            assert getattr(row, f"kl_{name}") == pytest.approx(expected, abs=1e-4, rel=1e-3)


def test_the_coefficient_and_the_atom_are_the_saes_own(model, tokens):
    sae = make_sae(model)
    records = replacement_test(model, sae, tokens, verbose=False).records
    name = sae.cfg.metadata.hook_name
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=[name])
        acts = sae.encode(cache[name])
    fires = acts.amax(-1) > 0
    assert len(records) == int(fires.sum())
    at = acts[torch.tensor(records.passage), torch.tensor(records.position)]
    np.testing.assert_array_equal(records.atom, at.argmax(-1))
    np.testing.assert_allclose(records.coefficient, at.amax(-1), rtol=1e-4)


def test_random_matrices_have_the_atoms_norm(model, tokens, monkeypatch):
    seen = []
    run = HookedRecurrent.run_with_swapped_writes

    def spy(self, *args, **kwargs):
        seen.append(torch.einsum("brk,brv->bkv", args[4], args[5]).flatten(1).norm(dim=1))
        return run(self, *args, **kwargs)

    monkeypatch.setattr(HookedRecurrent, "run_with_swapped_writes", spy)
    for random in ("gaussian", "atom"):
        replacement_test(
            model, make_sae(model), tokens[:1], random=random, scale="matched_norm", verbose=False
        )
        atom, delete, other = seen.pop().chunk(3)
        torch.testing.assert_close(other, atom, rtol=1e-4, atol=1e-6)
        assert (delete == 0).all()


def test_a_flat_sae_goes_through_the_same_call(model, tokens):
    cell = model.cell(1, 2)
    torch.manual_seed(0)
    sae = TopKSAE(TopKSAEConfig(d_in=cell.d_k * cell.d_v, d_sae=32, k=4))
    sae.cfg.metadata.hook_name = model.write_hook_name(1, 2)
    row = next(replacement_test(model, sae, tokens[:1], verbose=False).records.itertuples())
    _, atom = matrices_of_record(model, sae, tokens[0], row, "coefficient")
    patched = log_probs_with_write(model, tokens[0], 1, 2, row.position, atom)
    with torch.no_grad():
        base = model(tokens[:1])[0, row.position].double().log_softmax(-1)
    expected = (patched.exp() * (patched - base)).sum().item()
    assert row.kl_atom == pytest.approx(expected, abs=1e-4, rel=1e-3)


def test_summary_says_what_the_records_say(model, tokens):
    result = replacement_test(model, make_sae(model), tokens, verbose=False)
    records, summary = result.records, result.summary
    wins = records.kl_atom < records.kl_delete
    assert summary["win_rate"] == pytest.approx(wins.mean())
    chain = wins & (records.kl_delete < records.kl_random)
    assert summary["strict_chain_rate"] == pytest.approx(chain.mean())
    for name in CONDITIONS:
        assert summary[f"median_kl_{name}"] == pytest.approx(records[f"kl_{name}"].median())
    medians = [records[f"kl_{name}"].median() for name in CONDITIONS]
    assert summary["kl_ratio_atom_delete_random"] == pytest.approx([m / medians[0] for m in medians])
    assert summary["n_atoms"] + summary["n_atoms_never_dominant"] == 64
    assert summary["n_firings"] == len(records)


def test_same_seed_same_records_and_thinning_keeps_a_subset(model, tokens):
    sae = make_sae(model)
    full = replacement_test(model, sae, tokens, verbose=False, seed=5).records
    pd.testing.assert_frame_equal(full, replacement_test(model, sae, tokens, verbose=False, seed=5).records)
    few = replacement_test(
        model, sae, tokens, verbose=False, max_firings_per_atom=2, skip_positions=10
    ).records
    assert few.groupby("atom").size().max() <= 2
    assert few.position.min() >= 10
    keys = ["passage", "position"]
    joined = few.merge(full, on=keys, suffixes=("", "_full"))
    assert len(joined) == len(few)
    np.testing.assert_allclose(joined.kl_delete, joined.kl_delete_full, atol=1e-9, rtol=1e-3)


def test_an_interrupted_run_resumes_to_the_same_records(model, tokens, tmp_path, monkeypatch):
    sae = make_sae(model)
    whole = replacement_test(model, sae, tokens, verbose=False).records
    run, calls = HookedRecurrent.run_with_swapped_writes, []

    def stops(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(self, *args, **kwargs)

    monkeypatch.setattr(HookedRecurrent, "run_with_swapped_writes", stops)
    with pytest.raises(KeyboardInterrupt):
        replacement_test(model, sae, tokens, verbose=False, progress_folder=str(tmp_path))
    resumed = replacement_test(model, sae, tokens, verbose=False, progress_folder=str(tmp_path)).records
    assert len(calls) == 4  # one finished, one interrupted, two more: nothing was done twice
    pd.testing.assert_frame_equal(resumed, whole, check_dtype=False)
    with pytest.raises(WriteSAEError, match="other settings"):
        replacement_test(model, sae, tokens, seed=1, verbose=False, progress_folder=str(tmp_path))


def test_saving_writes_records_summary_and_figures(model, tokens, tmp_path):
    result = replacement_test(model, make_sae(model), tokens, verbose=False)
    result.save(tmp_path)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "records.csv"), result.records, check_dtype=False)
    assert json.loads((tmp_path / "summary.json").read_text()) == result.summary
    for stem in ("replacement", "replacement_by_effect"):
        assert (tmp_path / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.part"))
    titles = [axis.get_title(loc="left") for axis in result.plot().axes]
    assert f"{result.summary['win_rate']:.1%}" in titles[0]


def test_bad_input_is_answered_in_one_line(model, tokens):
    sae = make_sae(model)
    cases = [
        (lambda: replacement_test(model, sae, "too short", verbose=False), "too short: .* tokens"),
        (lambda: replacement_test(model, sae, tokens[:0], verbose=False), "must be a LongTensor"),
    ]
    other = make_sae(model)
    other.cfg.metadata.hook_name = "blocks.2.linear_attn.hook_write.0"
    cases.append((lambda: replacement_test(model, other, tokens), "no cell at layer 2"))
    nameless = make_sae(model)
    nameless.cfg.metadata.hook_name = None
    cases.append((lambda: replacement_test(model, nameless, tokens), "does not say which hook"))
    small = WriteSAE(WriteSAEConfig(d_k=4, d_v=5, d_sae=8, k=2))
    small.cfg.metadata.hook_name = sae.cfg.metadata.hook_name
    cases.append((lambda: replacement_test(model, small, tokens), "made for 4 x 5 matrices"))
    cases += [
        (lambda: replacement_test(model, sae, tokens + 5000, verbose=False), "another tokenizer"),
        (lambda: replacement_test(model, sae, tokens, max_firings=0), "max_firings=0 makes no sense"),
        (lambda: replacement_test(model, sae, tokens, context_size=8), "cut into passages already"),
        (lambda: replacement_test(model, sae, tokens, skip_positions=99, verbose=False), "left none"),
    ]
    silent = make_sae(model)
    with torch.no_grad():
        silent.b_enc.fill_(-1e6)
    cases.append((lambda: replacement_test(model, silent, tokens, verbose=False), "no atom fires"))
    for call, message in cases:
        with pytest.raises(HookedModelError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_text_is_cut_as_the_sae_was_trained(model):
    sae = make_sae(model)
    sae.cfg.metadata.prepend_bos, sae.cfg.metadata.context_size = True, 20
    text = zoo.held_out_text()[:400]
    records = replacement_test(model, sae, text, verbose=False).records
    assert set(records[records.position == 0].token) == {model.tokenizer.bos_token_id}
    ids = model.to_tokens(text, prepend_bos=False)[0]
    first = records[records.passage == 0]
    assert first.position.max() <= 19
    later = first[first.position > 0]
    assert ids[torch.tensor(later.position.to_numpy()) - 1].tolist() == list(later.token)


def test_a_damaged_part_is_computed_again_and_another_model_is_refused(model, tokens, tmp_path):
    sae = make_sae(model)
    whole = replacement_test(model, sae, tokens, verbose=False, progress_folder=str(tmp_path)).records
    (tmp_path / "part_000001.csv").write_text("")
    again = replacement_test(model, sae, tokens, verbose=False, progress_folder=str(tmp_path)).records
    pd.testing.assert_frame_equal(again, whole, check_dtype=False)
    other = HookedRecurrent.boot_transformers("tiny-gdn", device="cpu", dtype=torch.bfloat16)
    with pytest.raises(WriteSAEError, match="other settings"):
        replacement_test(other, sae, tokens, verbose=False, progress_folder=str(tmp_path))


@pytest.mark.parametrize(
    ("replaces", "said"), [("write", "The native write of"), ("update", "erase and write")]
)
def test_the_report_says_what_was_replaced(model, tokens, tmp_path, replaces, said):
    sae = make_sae(model)
    result = replacement_test(model, sae, tokens[:1], replaces=replaces, verbose=False)
    assert said in make_report(tmp_path, model, sae, tokens[:1], [result], verbose=False).read_text()
