"""What a result was measured on: text, model, SAEs, and what is warned of."""

import copy

import pytest
import torch

from hooked_models import HookedRecurrent, zoo
from tests.writesae_lens.experiments.truth import make_sae, writes
from writesae_lens import WriteSAEError
from writesae_lens.experiments import as_passages, compare, splice_test, top_contexts
from writesae_lens.experiments.origin import (
    ResultWarning,
    dtype_of,
    fingerprint_model,
    sentence,
    share_trained_on,
)
from writesae_lens.experiments.passages import Passages


def test_slices_of_passages_know_which_tokens_they_hold(gdn):
    text = zoo.text("test")[:4000]
    ids = gdn.to_tokens(text, prepend_bos=False, truncate=False)[0]
    passages = as_passages(gdn, text, 20, prepend_bos=True, name="mine")
    for part in (passages, passages[-5:], passages[3:-2], passages[2:][1:4], passages[:0]):
        assert type(part) is Passages
        first, last = part.token_range
        assert part[:, 1:].flatten().tolist() == ids[first:last].tolist()
        assert (part.text, part.whole_text) == ("mine", passages.whole_text)
    for plain in (passages[0], passages[:, 1:], passages + 0, passages[::2], passages.flip(0)):
        assert type(plain) is torch.Tensor
    again = as_passages(gdn, passages[4:])
    assert (again.token_range, again.text) == (passages[4:].token_range, "mine")


def test_a_part_of_the_shipped_text_is_named():
    gdn = HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")
    for part in zoo.PARTS:
        assert as_passages(gdn, zoo.text(part)).text == f"{zoo.TEXT_NAME}, {part} part"
    assert as_passages(gdn, zoo.text("test")[1:]).text == "text"
    assert as_passages(gdn, torch.tensor([[1, 2]])).text == "tokens"


def test_half_of_a_surrogate_pair_is_refused(gdn):
    with pytest.raises(WriteSAEError, match=r"the text holds '\\udc80', half of a surrogate pair"):
        as_passages(gdn, "It is a truth \udc80 universally acknowledged " * 9, 8)


@pytest.mark.parametrize("name", zoo.SHIPPED)
def test_a_models_fingerprint_is_that_of_its_weights(name):
    model = HookedRecurrent.boot_transformers(name, device="cpu")
    known = fingerprint_model(model)
    assert fingerprint_model(HookedRecurrent.boot_transformers(name, device="cpu")) == known
    for parameter in list(model.original_model.parameters())[::9]:
        entry = parameter.data.view(-1)[len(parameter.view(-1)) // 3 :][:1]
        before = entry.clone()
        entry.add_(0.25)
        assert fingerprint_model(model) != known
        entry.copy_(before)
    assert fingerprint_model(model) == known
    half = HookedRecurrent.boot_transformers(name, device="cpu", dtype=torch.bfloat16)
    assert fingerprint_model(half) != known
    assert (dtype_of(model), dtype_of(half)) == ("float32", "bfloat16")


@pytest.mark.parametrize("change", [str, lambda text: text.replace(" ", "\n"), str.strip])
def test_text_of_the_training_is_found_whatever_its_line_breaks(gdn, change):
    sae = make_sae(gdn)
    sae.cfg.metadata.dataset_path = zoo.TEXT_NAME
    trained, new = zoo.text("train")[5000:9000], zoo.text("test")[:4000]
    shares = [share_trained_on(gdn, sae, as_passages(gdn, change(text), 32)) for text in (trained, new)]
    assert shares == [1.0, 0.0]
    for part in ("test", "validation"):
        assert share_trained_on(gdn, sae, as_passages(gdn, zoo.text(part), 256)) == 0
    assert 0.3 < share_trained_on(gdn, sae, as_passages(gdn, change(trained + new), 16)) < 0.7
    sae.cfg.metadata.dataset_path = "some/dataset"
    assert share_trained_on(gdn, sae, as_passages(gdn, trained, 32)) == 0


def test_a_text_file_that_the_sae_was_trained_on_is_known(gdn, tmp_path):
    sae = make_sae(gdn)
    (tmp_path / "mine.txt").write_text(zoo.text("test")[:3000])
    sae.cfg.metadata.dataset_path = str(tmp_path / "mine.txt")
    with pytest.warns(ResultWarning, match="100% of this text is text that the SAE was trained on"):
        result = top_contexts(gdn, sae, zoo.text("test")[:3000], context_size=32, verbose=False)
    assert result.headline.endswith("[100% of this text is text that the SAE was trained on]")


def test_saes_of_several_models_are_refused_and_of_another_one_told(gdn, passages):
    one = make_sae(gdn)
    other, elsewhere = copy.deepcopy(one), make_sae(gdn, head=0)
    other.cfg.metadata.model_name = elsewhere.cfg.metadata.model_name = "someone/else"
    for test, saes in ((compare, {"one": one, "other": other}), (splice_test, [one, elsewhere])):
        with pytest.raises(WriteSAEError, match=r"of different models \(tiny-gdn, someone/else\)"):
            test(gdn, saes, passages, verbose=False)
    with pytest.warns(ResultWarning, match="the SAE is of the model someone/else, this is tiny-gdn"):
        top_contexts(gdn, other, passages, verbose=False)
    other.cfg.metadata.model_name = "/a/local/copy/of/Tiny_GDN"  # the same model by another path
    compare(gdn, {"one": one, "other": other}, passages, verbose=False)


@pytest.mark.parametrize("name", zoo.SHIPPED)
def test_cells_of_layer_0_are_marked_and_their_writes_are_n_grams(name):
    model = HookedRecurrent.boot_transformers(name, device="cpu")
    tokens = torch.randint(300, 400, (1, 20), generator=torch.Generator().manual_seed(0))
    with pytest.warns(ResultWarning, match="layer 0: its writes are functions of the token"):
        result = top_contexts(model, make_sae(model, layer=0, head=0), tokens, verbose=False)
    assert result.headline.endswith("alone, an n-gram table]")
    assert top_contexts(model, make_sae(model), tokens, verbose=False).summary["warnings"] == []
    # What stands more than three tokens before has no part in a write of layer 0, and has one in layer 1's.
    other = tokens.clone()
    other[0, :14] = other[0, :14].flip(0)
    one, two = (writes(model, x, layer=0, head=0)[0, 17:] for x in (tokens, other))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    one, two = (writes(model, x)[0, 17:] for x in (tokens, other))
    assert float((one - two).norm() / one.norm()) > 1e-3


def test_a_sentence_says_it_all_and_of_earlier_results_what_is_known(gdn):
    text = as_passages(gdn, zoo.text("test"), 20)[5:7]
    summary = top_contexts(gdn, make_sae(gdn), text, verbose=False).summary
    said = sentence(summary)
    assert said.startswith(
        "Measured on hooked_models/zoo/held_out.txt, test part, tokens 100 to 140 (40 tokens"
    )
    assert all(str(summary[x]) in said for x in ("text_hash", "version", "date", "call", "model", "dtype"))
    assert sentence({"model": "m"}) == "Measured on a text that it does not name; m."
