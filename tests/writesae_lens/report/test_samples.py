"""Contexts and histograms of features against plain loops; texts of tokens; the glossary's copy."""

import base64
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.writesae_lens.experiments.truth import encoded, make_codes, make_sae, read_passages
from writesae_lens import glossary
from writesae_lens.experiments.subjects import find_site
from writesae_lens.report.samples import AFTER, BEFORE, GROUPS, N_BINS, Uses, read_uses, samples, token_texts


@pytest.mark.parametrize("kind", ["atoms", "codes"])
def test_contexts_and_histograms_are_those_of_plain_loops(model, kind):
    sae = make_sae(model) if kind == "atoms" else make_codes(model)
    tokens = read_passages(model, 6, 50)
    length = tokens.shape[1]
    acts = encoded(model, sae, tokens).double()
    found = samples(read_uses(model, sae, find_site(model, sae), tokens, verbose=False), length)
    assert set(found) == set((acts.amax((0, 1)) > 0).nonzero().flatten().tolist())
    n_key = sae.cfg.n_key if kind == "codes" else 0
    for feature, own in found.items():
        sizes = acts[..., feature]
        largest = float(sizes.max())
        assert own["n"] == int((sizes > 0).sum())
        assert own["max"] == pytest.approx(largest, rel=5e-3)
        assert sum(own["bins"]) == own["n"]
        assert len(own["bins"]) == N_BINS
        edges = np.linspace(0, largest, N_BINS + 1)
        expected, _ = np.histogram(sizes[sizes > 0].numpy(), edges)
        assert np.abs(np.cumsum(own["bins"]) - np.cumsum(expected)).max() <= 1  # at an edge either will do
        side = slice(0, n_key) if feature < n_key else slice(n_key, None)
        seen = set()
        counts = [0] * len(GROUPS)
        for group, passage, position, coefficient, dominant, *shades in own["contexts"]:
            counts[group] += 1
            assert (passage, position) not in seen
            here = sizes[passage]
            assert coefficient == pytest.approx(float(here[position]), rel=5e-3)
            assert bool(dominant) == bool(here[position] >= acts[passage, position, side].max() - 1e-6)
            shown = range(max(0, position - BEFORE), min(length, position + AFTER + 1))
            expected = {
                at - position: max(1.0, 100 * float(here[at]) / largest) for at in shown if here[at] > 0
            }
            assert dict(zip(shades[::2], shades[1::2], strict=True)) == pytest.approx(expected, abs=0.51)
            seen |= {(passage, at) for at in shown}
        first = own["contexts"][0]
        assert first[0] == 0
        assert float(sizes[first[1], first[2]]) == pytest.approx(largest, rel=1e-4)
        assert all(n <= most for n, (_, _, most) in zip(counts, GROUPS, strict=True))


def test_groups_lie_at_their_place_in_the_order():
    """One feature that is active everywhere, far apart: its contexts are the nearest to each group's rank."""
    rng = np.random.default_rng(0)
    at = np.arange(0, 400 * 100, 100)  # contexts of 41 tokens never meet
    size = rng.permutation(np.arange(1.0, 401.0))
    uses = Uses(np.zeros(400, dtype=int), at, size, np.ones(400, dtype=bool))
    (own,) = samples(uses, 40_000).values()
    ranks = [[400 - int(c[3]) for c in own["contexts"] if c[0] == group] for group in range(len(GROUPS))]
    assert ranks[0] == list(range(8))
    assert set(ranks[1]) <= {198, 199, 200, 201}
    assert set(ranks[2]) <= {378, 379, 380}
    assert [len(each) for each in ranks] == [8, 3, 3]


class Bytes:
    """A tokenizer of which each token is a byte of UTF-8."""

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")

    def batch_decode(self, rows):
        return [self.decode(row) for row in rows]


@pytest.mark.usefixtures("unchecked")
def test_characters_of_several_tokens_stand_at_the_first():
    model = SimpleNamespace(tokenizer=Bytes())
    text = "a é € 😀 b".encode()
    data = token_texts(model, torch.tensor([list(text), list(text[::-1])]))
    numbers = np.frombuffer(base64.b64decode(data["tokens"]), "<u4").reshape(2, -1)
    rows = [[data["texts"][n] for n in row] for row in numbers]
    assert rows[0] == ["a", " ", "é", "", " ", "€", "", "", " ", "😀", "", "", "", " ", "b"]
    assert len(rows[1]) == len(text)  # no characters: whatever it is, each token keeps its place
    assert rows[1][:2] == ["b", " "]
    assert token_texts(SimpleNamespace(tokenizer=None), torch.tensor([[5, 6]]))["texts"] == ["[5]", "[6]"]


def test_the_terms_are_those_of_the_documentation():
    inside = Path(glossary.__file__).with_name(glossary.FILE).read_text("utf-8")
    documented = Path(__file__).parents[3].joinpath("docs", "glossary.md").read_text("utf-8")
    assert inside == documented, f"copy docs/glossary.md to writesae_lens/{glossary.FILE}"
    by_name = {name: term.meaning for term in glossary.terms() for name in term.names}
    assert len(glossary.terms()) == documented.count("\n| **")
    assert {"write", "stand-in", "key code", "own read", "later reads", "recovered"} <= set(by_name)
    assert "<code>9:4</code>" in by_name["cell"]
    assert not [
        meaning for meaning in by_name.values() if "\\" in meaning or "$" in meaning or "`" in meaning
    ]
