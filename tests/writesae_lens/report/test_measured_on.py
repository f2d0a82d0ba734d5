"""A page tells of results of other texts and number formats, and refuses those of other weights."""

import pytest

from hooked_models import HookedRecurrent, zoo
from writesae_lens import WriteSAEError
from writesae_lens.experiments import ExperimentResult, as_passages, partition_atoms, top_contexts
from writesae_lens.experiments.catalogue import EXPERIMENTS
from writesae_lens.experiments.origin import ORIGIN, ResultWarning
from writesae_lens.report.measured_on import cautions, differences
from writesae_lens.report.page import NEEDED, make_report


@pytest.fixture(scope="module")
def shipped(model):
    return as_passages(model, zoo.text("test"), 64)


@pytest.fixture(scope="module")
def results(model, sae, shipped):
    """What a page needs, on four passages."""
    return [EXPERIMENTS[name].function(model, sae, shipped[:4], verbose=False) for name in NEEDED]


def of_earlier(result):
    """The result as an earlier version saved it."""
    new = {*ORIGIN} - {"version", "date"}
    known = {name: value for name, value in result.summary.items() if name not in new}
    return ExperimentResult(result.name, result.records, known)


def test_results_of_one_text_are_of_one_text_whatever_their_passages(model, sae, shipped, results):
    shorter = top_contexts(model, sae, as_passages(model, zoo.text("test"), 32)[-3:], verbose=False)
    plain = top_contexts(model, sae, (shipped[:4] + 0), verbose=False)  # the same token ids
    assert differences([*results, shorter, plain], model, shipped[:4]) == []


def test_other_texts_formats_and_unknown_ones_are_told(model, sae, shipped, results):
    other = top_contexts(model, sae, as_passages(model, zoo.text("validation"), 64)[:2], verbose=False)
    ids = top_contexts(model, sae, (shipped[:3] + 0), verbose=False)
    half = ExperimentResult("replace", results[0].records, results[0].summary | {"dtype": "bfloat16"})
    told = differences([*results, other, ids, half, of_earlier(results[0])], model, shipped[:4])
    assert told == [
        f"the contexts result was measured on another text ({zoo.TEXT_NAME}, validation part) than the one "
        f"that this page reads ({zoo.TEXT_NAME}, test part)",
        "the contexts result was measured on another text (tokens) than the one that this page reads "
        f"({zoo.TEXT_NAME}, test part)",
        "the replace result was measured in bfloat16, and this model is in float32",
        "the replace result does not say on which text it was measured",
    ]
    warned = ExperimentResult("sign", other.records, {"warnings": ["it rained"]})
    assert cautions([*results, warned, warned]) == ["sign: it rained"]


def test_the_page_says_it_and_so_does_a_warning(model, sae, shipped, results, tmp_path):
    other = as_passages(model, zoo.text("validation"), 64)[:2]
    again = partition_atoms(model, sae, other, n_seeds=1, verbose=False)
    some = [result for result in results if result.name != "partition"]
    with pytest.warns(ResultWarning, match="partition result was measured on another text .*validation part"):
        page = make_report(tmp_path, model, sae, shipped[:4], [*some, again], verbose=False)
    text = page.read_text("utf-8")
    assert text.count('<p class="notice">') == 1
    assert '<p class="notice">the partition result was measured on another text' in text
    assert text.count(f"Measured on {zoo.TEXT_NAME}, test part, tokens 0 to 256 (256 tokens") == 2
    assert text.count(f"Measured on {zoo.TEXT_NAME}, validation part, tokens 0 to 128 (128 tokens") == 1


def test_other_weights_are_refused(sae, shipped, results, tmp_path):
    changed = HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")
    changed.original_model.get_output_embeddings().weight.data[5, 7] += 1e-3
    with pytest.raises(WriteSAEError, match="the replace result is of another model called tiny-gdn"):
        make_report(tmp_path, changed, sae, shipped[:4], results, verbose=False)
