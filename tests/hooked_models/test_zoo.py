"""The parts of the shipped text."""

import jaxtyping
import pytest

from hooked_models import HookedModelError, zoo


def test_the_parts_share_nothing_and_are_the_whole_text():
    parts = {part: zoo.documents(part) for part in zoo.PARTS}
    every = [document.strip() for document in zoo.held_out_text().split("<|endoftext|>")]
    assert [*parts["train"], *parts["test"], *parts["validation"]] == every
    assert len(parts["train"]) == round(0.8 * len(every))
    paragraphs = {part: {p for d in of for p in d.split("\n\n") if len(p) > 80} for part, of in parts.items()}
    assert not paragraphs["train"] & paragraphs["test"]
    assert not paragraphs["train"] & paragraphs["validation"]
    assert not paragraphs["test"] & paragraphs["validation"]


def test_what_earlier_versions_called_it_is_what_to_train_and_what_to_test_on():
    training, testing = zoo.shipped_text()
    assert (training, testing) == (zoo.documents("train"), zoo.documents("test"))
    assert zoo.text("test") == "\n\n".join(testing)


def test_other_parts_are_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(HookedModelError, match="no part 'dev': choose train, validation, test"):
        zoo.text("dev")
