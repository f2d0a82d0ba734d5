"""The contract of every experiment in the catalogue, whatever it measures.

`CHECKS` are functions of one `Subject`; test_contract.py runs each on each experiment, test_toy_experiment.py
on an experiment that it declares itself.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin
from unittest import mock

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from hooked_models import HookedModelError
from tests.writesae_lens.experiments.truth import make_sae, silenced
from writesae_lens import WriteSAEError
from writesae_lens.experiments import Experiment, ExperimentResult
from writesae_lens.experiments.result import Progress

# Options that make a run short, for the experiments that have them.
SHORT = {
    "n_atoms": 3,
    "n_positions": 2,
    "n_tokens": 4,
    "n_trials": 6,
    "n_refinements": 1,
    "n_seeds": 2,
    "max_horizon": 3,
    "min_firings": 1,
    "top_k": 4,
}


class Subject(NamedTuple):
    """An experiment and the input of its test runs."""

    experiment: Experiment
    model: Any
    tokens: Tensor
    folder: Path

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.experiment.function, eval_str=True).parameters

    def run(self, sae: Any = None, tokens: Any = None, model: Any = None, **options: Any) -> ExperimentResult:
        """A short run; an SAE stands for whatever the experiment takes: one, several, by name, or a cell."""
        sae = make_sae(self.model) if sae is None else sae
        if "saes" in self.parameters and "Mapping" in str(self.parameters["saes"].annotation):
            sae = {"first": sae, "second": make_sae(self.model, seed=1, k=8)}
        short = {name: value for name, value in SHORT.items() if name in self.experiment.own_options}
        given = short | {"verbose": False} | options
        tokens = self.tokens if tokens is None else tokens
        return self.experiment.function(self.model if model is None else model, sae, tokens, **given)


def strict_json(folder: Path) -> Any:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)


def same(one: ExperimentResult, other: ExperimentResult) -> None:
    pd.testing.assert_frame_equal(one.records, other.records, rtol=1e-12)
    assert json.loads(json.dumps(one.summary)) == json.loads(json.dumps(other.summary))


def check_declaration(subject: Subject) -> None:
    """Question, row and help texts are there; the module bears the experiment's name."""
    experiment, function = subject.experiment, subject.experiment.function
    assert experiment.question.endswith("?")
    assert experiment.row
    assert experiment.figures
    assert all(option.help for option in experiment.options.values())
    assert {"seed", "progress_folder", "verbose"} <= set(subject.parameters)
    assert "context_size" in subject.parameters or experiment.passes_on
    assert function.__doc__
    assert "Returns:" in function.__doc__


def check_result(subject: Subject) -> None:
    """A result names its inputs, records every option, is saved, drawn and read back whole."""
    experiment = subject.experiment
    result = subject.run()
    assert result.name == experiment.name
    assert len(result.records)
    assert result.headline
    summary = result.summary
    assert summary["experiment"] == experiment.name
    assert summary["model"] == subject.model.cfg.model_name
    assert summary["architecture"] == subject.model.cells[0].architecture
    assert set(experiment.own_options) <= set(summary)
    for name, value in SHORT.items():
        if name in experiment.own_options and name != "n_atoms":  # fewer atoms may fire
            assert summary[name] == value
    folder = result.save(subject.folder / "saved")
    pictures = {f"{stem}.png" for stem in experiment.figures}
    assert {path.name for path in folder.iterdir()} == {"records.csv", "summary.json"} | pictures
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    strict_json(folder)
    back = ExperimentResult.load(folder)
    assert back.name == experiment.name
    # Empty texts come back as missing values.
    pd.testing.assert_frame_equal(back.records.fillna(""), result.records.fillna(""), check_dtype=False)
    assert back.headline == result.headline
    assert isinstance(back.plot(), Figure)


def check_seed(subject: Subject) -> None:
    """One seed gives one result."""
    same(subject.run(seed=5), subject.run(seed=5))
    assert subject.run(seed=6).summary["seed"] == 6


def check_resume(subject: Subject) -> None:
    """An interrupted run goes on with the parts that are missing, and ends as an uninterrupted one."""
    from writesae_lens.experiments import passes

    folder, part, computed = str(subject.folder / "progress"), Progress.part, []

    def interrupted(self: Progress, number: int, compute: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        def counted() -> pd.DataFrame:
            computed.append(number)
            if len(computed) == 2:
                raise KeyboardInterrupt
            return compute()

        return part(self, number, counted)

    # Experiments that decode several prompts at once would otherwise have a single part.
    with mock.patch("writesae_lens.experiments.decoding.LOGITS_PER_PASS", 1):
        whole = subject.run()
        with mock.patch.object(Progress, "part", interrupted):
            with pytest.raises(KeyboardInterrupt):
                subject.run(progress_folder=folder)
            assert len(computed) == 2
            resumed = subject.run(progress_folder=folder)
    assert passes.LOGITS_PER_PASS > 1
    assert computed[0] not in computed[1:]
    same(resumed, whole)
    with pytest.raises(WriteSAEError, match="other settings"):
        subject.run(progress_folder=folder, tokens=subject.tokens.flip(0))


def check_other_options_are_other_runs(subject: Subject) -> None:
    """Finished parts are not taken for those of another seed, unless they do not depend on options at all."""
    folder = str(subject.folder / "progress")
    first = subject.run(progress_folder=folder, seed=1)
    try:
        other = subject.run(progress_folder=folder, seed=2)
    except WriteSAEError as error:
        assert "other settings" in str(error)
    else:
        same(other, subject.run(seed=2))
        same(first, subject.run(seed=1))


def check_one_passage(subject: Subject) -> None:
    """A single passage gives a result whose summary holds no NaN and whose figures draw."""
    result = subject.run(tokens=subject.tokens[:1])
    assert len(result.records)
    strict_json(result.save(subject.folder / "one"))


def check_text_is_cut(subject: Subject) -> None:
    """Text is cut as the SAE was trained, or as context_size says."""
    text = subject.model.tokenizer.decode(subject.tokens.flatten().tolist())
    sae = make_sae(subject.model)
    sae.cfg.metadata.context_size = 10
    n_tokens = len(subject.model.to_tokens(text, prepend_bos=False, truncate=False)[0])
    for options, size in (({}, 10), ({"context_size": 16}, 16)):
        cut = subject.model.to_tokens(text, prepend_bos=False, truncate=False)[0]
        cut = cut[: n_tokens // size * size].view(-1, size)
        same(subject.run(sae, tokens=text, **options), subject.run(sae, tokens=cut))
    with pytest.raises(WriteSAEError, match="context_size cuts text; these tokens are cut"):
        subject.run(context_size=10)
    with pytest.raises(WriteSAEError, match="the text is too short"):
        subject.run(tokens="too short")


def check_nothing_fires(subject: Subject) -> None:
    """An SAE of which no atom is ever active is refused, or does not matter."""
    try:
        result = subject.run(silenced(make_sae(subject.model)))
    except WriteSAEError as error:
        assert re.search(r"no atom fires in 2 passages of 20 tokens|at no position all of them", str(error))
    else:
        strict_json(result.save(subject.folder / "silent"))


def check_wrong_subjects(subject: Subject) -> None:
    """Whatever is no model, no SAE or no passages, or does not fit the cell, gets one line."""
    model, is_cell = subject.model, "sae_or_cell" in subject.parameters
    broken = make_sae(model)
    with torch.no_grad():
        broken.b_enc[0] = float("nan")
    other_size = make_sae(model)
    other_size.cfg.d_k, other_size.cfg.d_v = 48, 32
    nameless, elsewhere, scaled = make_sae(model), make_sae(model), make_sae(model)
    nameless.cfg.metadata.hook_name = None
    elsewhere.cfg.metadata.hook_name = "blocks.0.mixer.hook_write.0"
    scaled.cfg.normalize_activations = "constant_norm_rescale"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model": "tiny-gdn"}, "the first argument must be a HookedRecurrent, got 'tiny-gdn'"),
        ({"sae": broken}, "NaN in b_enc"),
        ({"sae": other_size}, "48 x 32"),
        ({"sae": nameless}, "set sae.cfg.metadata.hook_name"),
        ({"sae": elsewhere}, "not the hook of a cell's write or state"),
        ({"sae": scaled}, "fold the scale in first"),
        ({"sae": "no SAE"}, "is wanted" if is_cell else "wanted|must be"),
        ({"tokens": torch.zeros(3)}, "LongTensor"),
        ({"tokens": torch.zeros(0, 4).long()}, "LongTensor"),
        ({"tokens": torch.full((2, 20), 10**6)}, "token ids run from"),
        ({"tokens": torch.full((2, 20), -1)}, "token ids run from"),
    ]
    for given, message in cases:
        with pytest.raises(HookedModelError, match=message) as caught:
            subject.run(**given)
        assert "\n" not in str(caught.value)


def wrong_values(option: Any) -> Iterator[Any]:
    """Values that an option's annotation does not allow."""
    kinds = [a for a in (get_args(option.annotation) or (option.annotation,)) if a is not type(None)]
    if get_origin(option.annotation) is Literal:
        yield "nonsense"
    elif option.bound is not None and int in kinds:
        yield from (option.bound.minimum - 1, option.bound.minimum + 0.5, "many", True)
    elif option.bound is not None and float in kinds:
        below = option.bound.minimum if option.bound.exclusive else option.bound.minimum - 0.5
        yield from (below, float("nan"), float("inf"), "much", True)
    elif option.bound is not None:  # several numbers
        yield from ((1, option.bound.minimum - 1), ("much",), (True,))


def check_wrong_options(subject: Subject) -> None:
    """Values outside of an option's annotation are refused in a line that names the option."""
    for name, option in subject.experiment.options.items():
        for value in wrong_values(option):
            with pytest.raises(WriteSAEError, match=rf"^{name}\b") as caught:
                subject.run(**{name: value})
            assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match="no_such_option"):
        subject.run(no_such_option=1)


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]
