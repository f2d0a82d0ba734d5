"""The contract of every experiment in the catalogue, whatever it measures.

`CHECKS` are functions of one `Subject`; test_contract.py runs each on each experiment, test_toy_experiment.py
on an experiment that it declares itself.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin
from unittest import mock

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from hooked_models import HookedModelError, HookedRecurrent
from tests.writesae_lens.experiments.truth import HEAD, dominant_atoms, make_codes, make_sae, silenced
from writesae_lens import WriteSAEError
from writesae_lens.experiments import Experiment, ExperimentResult, as_passages
from writesae_lens.experiments.options import Bound, Option
from writesae_lens.experiments.origin import ORIGIN, ResultWarning
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


PART = Progress.part
# Results of `Subject.whole` by the experiment's function, for all checks.
WHOLE: dict[Callable[..., Any], ExperimentResult] = {}


class Subject(NamedTuple):
    """An experiment and the input of its test runs."""

    experiment: Experiment
    model: Any
    tokens: Tensor
    folder: Path

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.experiment.function, eval_str=True).parameters

    @property
    def short(self) -> dict[str, Any]:
        """The options of every run."""
        return {name: value for name, value in SHORT.items() if name in self.experiment.own_options}

    @property
    def whole(self) -> ExperimentResult:
        """The result of the right input with the default options but `short`; computed once."""
        if self.experiment.function not in WHOLE:
            WHOLE[self.experiment.function] = self.run()
        return WHOLE[self.experiment.function]

    def run(self, sae: Any = "", tokens: Any = None, model: Any = "", **options: Any) -> ExperimentResult:
        """A short run; an SAE stands for whatever the experiment takes: one, several, by name, or a cell."""
        sae = make_sae(self.model) if isinstance(sae, str) and not sae else sae
        if "saes" in self.parameters and "Mapping" in str(self.parameters["saes"].annotation):
            if getattr(sae, "is_codes", False):
                second = make_codes(self.model, seed=1, k_value=3, head=head_of(sae))
            else:
                second = make_sae(self.model, seed=1, k=8, head=head_of(sae))
            sae = {"first": sae, "second": second}
        model = self.model if isinstance(model, str) and not model else model
        tokens = self.tokens if tokens is None else tokens
        # Experiments that decode several prompts at once would otherwise have a single part.
        few = 8 * self.model.cfg.d_vocab
        with mock.patch("writesae_lens.experiments.decoding.LOGITS_PER_PASS", few):
            return self.experiment.function(model, sae, tokens, **self.short | {"verbose": False} | options)


@functools.cache
def half_model() -> Any:
    return HookedRecurrent.boot_transformers("tiny-gdn", device="cpu", dtype=torch.bfloat16)


def head_of(sae: Any) -> int:
    """The head that an SAE names, or that of these tests."""
    name = getattr(getattr(getattr(sae, "cfg", None), "metadata", None), "hook_name", None)
    return int(name[-1]) if name else HEAD


def strict_json(folder: Path) -> Any:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)


# Entries of a summary that say how the same tokens were given.
HOW_GIVEN = ("text", "text_range", "whole_text_hash", "call")


def same(one: ExperimentResult, other: ExperimentResult, but: Sequence[str] = ()) -> None:
    """Two results are equal but for the date, and for further entries of the summary."""
    pd.testing.assert_frame_equal(one.records, other.records, rtol=1e-12)
    summaries = [json.loads(json.dumps(result.summary)) for result in (one, other)]
    first, second = ({k: v for k, v in s.items() if k not in ("date", *but)} for s in summaries)
    assert first == second


def outcome(subject: Subject, **options: Any) -> ExperimentResult | str:
    """The result of a run, or the line with which it is refused."""
    try:
        return subject.run(**options)
    except WriteSAEError as error:
        return str(error)


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
    experiment, result = subject.experiment, subject.whole
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


def check_origin(subject: Subject) -> None:
    """A result says which text, model and version it is of, by which call, and when; other ones differ."""
    summary, read = subject.whole.summary, subject.tokens
    assert set(ORIGIN) <= set(summary)
    assert (summary["text"], summary["text_range"], summary["whole_text_hash"]) == ("tokens", None, None)
    assert (summary["text_tokens"], summary["dtype"]) == (read.numel(), "float32")
    assert (summary["version"], summary["warnings"]) == (version("writesae-lens"), [])
    assert summary["call"].startswith(f"{subject.experiment.function.__name__}(model='tiny-gdn', ")
    assert "seed=0" in summary["call"]
    age = datetime.now(timezone.utc) - datetime.fromisoformat(summary["date"])
    assert timedelta(0) <= age < timedelta(hours=1)
    text = subject.model.tokenizer.decode(read.flatten().tolist())
    passages = as_passages(subject.model, text, 13, name="my.txt")[1:]
    weight = subject.model.original_model.get_output_embeddings().weight.data
    weight[-1, -1] += 1
    try:
        other = subject.run(tokens=passages)
    finally:
        weight[-1, -1] -= 1
    assert (other.summary["text"], other.summary["text_range"]) == ("my.txt", [13, 13 * (len(passages) + 1)])
    for entry in ("text_hash", "whole_text_hash", "model_fingerprint"):
        assert other.summary[entry] != summary[entry]
    assert "'my.txt'" in other.summary["call"]


def check_half_precision(subject: Subject) -> None:
    """On a model in half precision the headline, the summary and a warning say so."""
    half = half_model()
    with pytest.warns(ResultWarning, match="the model is in bfloat16, so small effects may be rounding"):
        result = subject.run(make_sae(half), model=half)
    (warning,) = result.summary["warnings"]
    assert "bfloat16" in warning
    assert result.headline.endswith(f"[{warning}]")
    assert result.summary["dtype"] == "bfloat16"


def check_seed(subject: Subject) -> None:
    """One seed gives one result, also where the caller has switched gradients off."""
    with torch.no_grad():
        same(subject.run(), subject.whole)


def check_resume(subject: Subject) -> None:
    """An interrupted run goes on with the parts that are missing, and ends as an uninterrupted one.

    Finished parts are not taken for those of other inputs, or of other options that they depend on.
    """
    folder, part, computed = str(subject.folder / "progress"), Progress.part, []

    def interrupted(self: Progress, number: int, compute: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        def counted() -> pd.DataFrame:
            computed.append(number)
            if len(computed) == 2:
                raise KeyboardInterrupt
            return compute()

        return part(self, number, counted)

    with mock.patch.object(Progress, "part", interrupted):
        with pytest.raises(KeyboardInterrupt):
            subject.run(progress_folder=folder)
        resumed = subject.run(progress_folder=folder)
    assert computed[0] not in computed[1:]  # nothing is computed twice
    same(resumed, subject.whole)
    inputs = ({"tokens": subject.tokens.flip(0)}, {"sae": make_sae(subject.model, head=HEAD + 1)})
    for other in inputs:
        with pytest.raises(WriteSAEError, match="other settings"):
            subject.run(progress_folder=folder, **other)
    for name, option in subject.experiment.options.items():
        other = {name: another_value(subject, option)}
        result = outcome(subject, progress_folder=folder, **other)
        if isinstance(result, str):
            assert "other settings" in result
        else:
            same(result, subject.run(**other))


def another_value(subject: Subject, option: Option) -> Any:
    """A value that is allowed and that no run has by default."""
    value = subject.short.get(option.name, option.default)
    kinds = [a for a in (get_args(option.annotation) or (option.annotation,)) if a is not type(None)]
    if get_origin(option.annotation) is Literal:
        return next(choice for choice in get_args(option.annotation) if choice != value)
    if isinstance(value, (tuple, list)):
        return value[:1]
    if isinstance(value, (int, float)):
        return value + 1
    if option.bound is not None:
        return 3
    if int in kinds and str not in kinds:
        return min(dominant_atoms(subject.model, make_sae(subject.model), subject.tokens))
    return 5  # a token


def check_codes(subject: Subject) -> None:
    """A dictionary of codes is a subject like any other: one seed one result, resumed, saved and drawn."""
    sae, folder = make_codes(subject.model), str(subject.folder / "progress")
    first = subject.run(sae, progress_folder=folder)
    assert len(first.records)
    assert first.headline
    strict_json(first.save(subject.folder / "codes"))
    with mock.patch.object(Progress, "part", lambda self, number, compute: part(self, number)):
        same(subject.run(sae, progress_folder=folder), first)

    for silent in (slice(0, 16), slice(16, 32)):  # no address, no content
        result = outcome(subject, sae=silenced(make_codes(subject.model), silent))
        if not isinstance(result, str):
            strict_json(result.save(subject.folder / "silent"))


def part(progress: Progress, number: int) -> pd.DataFrame:
    """A finished part, as the folder has it; nothing is computed again."""
    return PART(progress, number, lambda: pytest.fail("a finished part is computed again"))


def check_one_passage(subject: Subject) -> None:
    """A single passage gives a result whose summary holds no NaN and whose figures draw."""
    result = subject.run(tokens=subject.tokens[:1])
    assert len(result.records)
    strict_json(result.save(subject.folder / "one"))


def check_text_is_cut(subject: Subject) -> None:
    """Text is cut as the SAE was trained, or as context_size says."""
    text = subject.model.tokenizer.decode(subject.tokens.flatten().tolist())
    ids = subject.model.to_tokens(text, prepend_bos=False, truncate=False)[0]
    cut = ids[: len(ids) // 19 * 19].view(-1, 19)
    bos = torch.full_like(cut[:, :1], subject.model.tokenizer.bos_token_id)
    expected = subject.run(tokens=torch.cat([bos, cut], dim=1))
    sae = make_sae(subject.model)
    sae.cfg.metadata.prepend_bos, sae.cfg.metadata.context_size = True, 20
    same(subject.run(sae, tokens=text), expected, HOW_GIVEN)
    sae.cfg.metadata.context_size = 10
    same(subject.run(sae, tokens=text, context_size=20), expected, HOW_GIVEN)
    (subject.folder / "text").write_text("text")
    for given, message in (
        ({"context_size": 10}, "context_size cuts text; these tokens are cut"),
        ({"tokens": text, "context_size": 0}, "context_size=0 makes no sense: give 1 or more"),
        ({"tokens": text, "context_size": "16"}, "context_size='16' makes no sense: .* a whole number"),
        ({"tokens": "too short"}, "the text is too short: .* give more text or a smaller context_size"),
        ({"tokens": str(subject.folder / "text")}, r"is the name of a file: give what open\(...\).read\(\)"),
    ):
        with pytest.raises(WriteSAEError, match=message):
            subject.run(**given)


def check_nothing_fires(subject: Subject) -> None:
    """An SAE of which no atom is ever active is refused, or does not matter."""
    result = outcome(subject, sae=silenced(make_sae(subject.model)))
    if isinstance(result, str):
        assert re.search(r"nothing fires in 2 passages of 20 tokens|at no position all of them", result)
    else:
        strict_json(result.save(subject.folder / "silent"))


def check_wrong_subjects(subject: Subject) -> None:
    """Whatever is no model, no SAE or no passages, or does not fit the cell, gets one line."""
    model, tokens, folder = subject.model, subject.tokens, subject.folder
    one, of_cell = make_sae(model), "sae_or_cell" in subject.parameters
    wanted = "an SAE, a cell or .layer, head. is wanted, got" if of_cell else "is wanted, got|must be"

    def wrong(**metadata: Any) -> Any:
        sae = make_sae(model)
        for name, value in metadata.items():
            setattr(sae.cfg.metadata if name == "hook_name" else sae.cfg, name, value)
        return sae

    broken = make_sae(model)
    with torch.no_grad():
        broken.b_enc[0] = float("nan")
    (folder / "file").write_text("text")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model": None}, "the first argument must be a HookedRecurrent, got None: HookedRecurrent.boot"),
        ({"model": "tiny-gdn"}, "the first argument must be a HookedRecurrent, got 'tiny-gdn'"),
        ({"model": model.original_model}, "must be a HookedRecurrent, got a Qwen3_5ForCausalLM"),
        ({"model": one, "sae": model}, "must be a HookedRecurrent, got a WriteSAE|saes must be a list"),
        ({"sae": None}, wanted),
        ({"sae": "my_sae"}, wanted),
        ({"sae": one.cfg}, wanted),
        ({"sae": broken}, "NaN in b_enc: its training went wrong, train it again"),
        ({"sae": wrong(d_k=48, d_v=32)}, "48 x 32.* gives 32 x 48 = 1536: give the model"),
        ({"sae": wrong(hook_name=None)}, "does not say .* set sae.cfg.metadata.hook_name"),
        ({"sae": wrong(hook_name="blocks.0.mixer.hook_write.0")}, "not the hook of a cell's write or state"),
        (
            {"sae": wrong(hook_name=f"{one.cfg.metadata.hook_name}2")},
            "head 22.*this model has layer 0: heads",
        ),
        ({"sae": wrong(normalize_activations="constant_norm_rescale")}, "fold the scale in first"),
        ({"tokens": ["a", "b"]}, r"LongTensor \[passage, pos\] or a text, got \['a', 'b'\]: model.to_tokens"),
        ({"tokens": tokens.tolist()}, "LongTensor .* got a list: .* torch.tensor from lists"),
        ({"tokens": tokens.float()}, "LongTensor .* got torch.float32"),
        ({"tokens": tokens[0]}, r"LongTensor .* of shape \(20,\)"),
        ({"tokens": tokens[:0]}, "LongTensor"),
        ({"tokens": tokens * 0 + 5000}, "token ids run from 5000 .* 2048 tokens"),
        ({"tokens": tokens * 0 - 1}, "token ids run from"),
    ]
    for given, message in cases:
        with pytest.raises(HookedModelError, match=message) as caught:
            subject.run(**given)
        assert str(caught.value).isprintable()
    with pytest.raises((OSError, ValueError), match="file"):
        subject.run(progress_folder=str(folder / "file"))


def check_wrong_options(subject: Subject) -> None:
    """Values outside of an option's annotation are refused in a line that names the option and its bounds."""
    for name, option in subject.experiment.options.items():
        for value, message in wrong_values(option):
            with pytest.raises(WriteSAEError, match=rf"^{name}\b.*{message}") as caught:
                subject.run(**{name: value})
            assert str(caught.value).isprintable()
    with pytest.raises(TypeError, match="no_such_option"):
        subject.run(no_such_option=1)


def wrong_values(option: Option) -> Iterator[tuple[Any, str]]:
    """Values that an option's annotation does not allow, and a pattern of the answer."""
    is_union = get_origin(option.annotation) in (Union, types.UnionType)
    allowed = get_args(option.annotation) if is_union else (option.annotation,)
    lists = [a for a in allowed if get_origin(a) in (tuple, Sequence)]
    kind = get_args(lists[0])[0] if lists else allowed[0]
    scalars = list(wrong_scalars(kind, option.bound))
    if not scalars:  # a token or an atom: see the tests of the experiments
        return
    if kind in allowed:
        yield from scalars
        yield from [(None, scalars[-1][1])] * (types.NoneType not in allowed)
    else:
        yield from ((x, "must be a list or tuple, got .*: put it into brackets") for x in (2, "a", None))
    if lists and kind is float and option.bound is not None:
        yield from ((x, "must be positive numbers, one at least") for x in [(), *((x,) for x, _ in scalars)])
    elif lists:
        yield from (((x,), message) for x, message in scalars)


def wrong_scalars(kind: Any, bound: Bound | None) -> Iterator[tuple[Any, str]]:
    """The same for a single number or choice; options of other types have messages of their own."""
    if get_origin(kind) is Literal:
        yield "nonsense", "'nonsense' is unknown: choose .* or "
        yield 3, "is unknown: choose .* or "
    elif kind is float and bound is None:
        yield from ((x, "must be numbers") for x in ("much", True))
    elif kind is float and bound.exclusive:
        wrong = (0, -1, float("nan"), float("inf"), "much", True)
        yield from ((x, "must be positive, a number above 0, got") for x in wrong)
    elif kind is float:
        wrong = (bound.minimum - 0.5, float("nan"), float("inf"), "much", True)
        yield from ((x, f"makes no sense: give {bound.minimum} or more") for x in wrong)
    elif kind is int and bound is not None:
        most = "or more" if bound.maximum is None else f"to {bound.maximum}"
        beyond = [] if bound.maximum is None else [bound.maximum + 1]
        yield from ((x, f"makes no sense: give {bound.minimum} {most}") for x in (bound.minimum - 1, *beyond))
        yield from ((x, ", a whole number") for x in (bound.minimum + 0.5, "many", True, [3]))


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]
