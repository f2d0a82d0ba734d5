"""What the results of a page were measured on, and where that differs from what the page is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hooked_models import HookedRecurrent
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.origin import dtype_of, fingerprint, fingerprint_model
from writesae_lens.experiments.passages import Passages
from writesae_lens.experiments.result import ExperimentResult


def check_weights(results: Sequence[ExperimentResult], model: HookedRecurrent) -> None:
    """Refuse results of a model of the same name and number format, but with other weights.

    Raises:
        WriteSAEError: the weights differ.
    """
    own, dtype = fingerprint_model(model), dtype_of(model)
    for result in results:
        summary = result.summary
        if summary.get("dtype") == dtype and summary.get("model_fingerprint", own) != own:
            raise WriteSAEError(
                f"the {result.name} result is of another model called {summary.get('model')}: its weights "
                "are not those of this one; run the experiment again on this model"
            )


def differences(results: Sequence[ExperimentResult], model: HookedRecurrent, passages: Passages) -> list[str]:
    """A line for each result that was measured on another text or in another number format than the page's.

    Args:
        results: all that the page shows.
        model: the page's model.
        passages: the page's text.
    """
    lines, dtype = [], dtype_of(model)
    for result in results:
        summary = result.summary
        if "text_hash" not in summary:
            lines.append(f"the {result.name} result does not say on which text it was measured")
        elif not _is_same_text(summary, passages):
            lines.append(
                f"the {result.name} result was measured on another text ({summary.get('text')}) than the one "
                f"that this page reads ({passages.text})"
            )
        if (other := summary.get("dtype")) not in (None, dtype):
            lines.append(f"the {result.name} result was measured in {other}, and this model is in {dtype}")
    return list(dict.fromkeys(lines))


def _is_same_text(summary: Mapping[str, Any], passages: Passages) -> bool:
    """Whether the same tokens were read, or passages of the same whole text."""
    whole = summary.get("whole_text_hash")
    return summary["text_hash"] == fingerprint(passages) or (
        whole is not None and whole == passages.whole_text
    )


def cautions(results: Sequence[ExperimentResult]) -> list[str]:
    """The results' own warnings, each once, with the names of the results that have it."""
    names: dict[str, list[str]] = {}
    for result in results:
        found = result.summary.get("warnings")
        for warning in found if isinstance(found, list) else []:
            names.setdefault(str(warning), []).append(result.name)
    return [f"{', '.join(dict.fromkeys(of))}: {warning}" for warning, of in names.items()]
