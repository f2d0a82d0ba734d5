"""The replacement test's figures, logged while an SAE trains."""

from __future__ import annotations

from typing import Any

from sae_lens import LanguageModelSAETrainingRunner, MultiSAETrainingRunner

from hooked_models import zoo
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments import as_passages, replacement_test
from writesae_lens.saelens import upstream


def log_win_rate(
    runner: LanguageModelSAETrainingRunner | MultiSAETrainingRunner, passages: int = 4, seed: int = 0
) -> None:
    """Add a quick replacement test to a runner's evaluations (``logger.eval_every_n_wandb_logs``).

    ``replacement/median_recovered`` and ``recovered`` (at the own position), ``win_rate``, ``median_cosine``
    and ``median_kl_ratio`` appear beside SAELens's own evaluations, for every SAE of the run. Where the run
    trains on the shipped text, the test reads the first passages of its validation part; else those of the
    run's text, and training goes on with the text after them.

    Args:
        runner: before ``run()``.
        passages: how many passages of the run's context size to test on.
        seed: of the replacement test.
    """
    evaluator: Any = runner.evaluator
    model = evaluator.model
    if runner.cfg.dataset_path == zoo.TEXT_NAME:
        size, bos = runner.cfg.context_size, runner.cfg.prepend_bos
        tokens = as_passages(model, zoo.text("validation"), size, bos)[:passages]
    else:
        # Read before the run, during which another thread may read the same text (prefetch_llm_batches).
        tokens = evaluator.activations_store.get_batch_tokens(passages)

    def measure(sae: Any) -> dict[str, float]:
        try:
            result = replacement_test(model, sae, tokens, baselines=False, seed=seed, verbose=False)
        except WriteSAEError:  # no atom is active yet, or normalize_activations still scales the inputs
            return {}
        names = ("median_recovered", "recovered", "win_rate", "median_cosine")
        figures = {f"replacement/{name}": result.summary[name] for name in names}
        ratio = result.summary["kl_ratio_atom_delete_random"][1]
        return figures | {"replacement/median_kl_ratio": ratio}

    def evaluate(original: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        metrics = original(*args, **kwargs)
        saes = kwargs.get("saes", args[0] if args else kwargs.get("sae"))
        for prefix, sae in saes.items() if isinstance(saes, dict) else [("", saes)]:
            metrics |= {f"{prefix}/{key}".lstrip("/"): value for key, value in measure(sae).items()}
        return metrics

    upstream.wrap_on(runner, "evaluator", evaluate)
