"""The replacement test's win rate, logged while an SAE trains."""

from __future__ import annotations

from typing import Any

from sae_lens import LanguageModelSAETrainingRunner, MultiSAETrainingRunner

from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments import replacement_test


def log_win_rate(
    runner: LanguageModelSAETrainingRunner | MultiSAETrainingRunner, passages: int = 4, seed: int = 0
) -> None:
    """Add a quick replacement test to a runner's evaluations (``logger.eval_every_n_wandb_logs``).

    ``replacement/win_rate``, ``replacement/median_kl_ratio`` and ``replacement/median_cosine`` appear beside
    SAELens's own evaluations, for every SAE of the run. The passages are the first ones of the run's text,
    which trains on what follows them.

    Args:
        runner: before ``run()``; its ``evaluator`` is wrapped.
        passages: how many passages of the run's context size to test on.
        seed: of the replacement test.
    """
    evaluator: Any = runner.evaluator
    model, store = evaluator.model, evaluator.activations_store
    # Drawn before the run, which goes on with the text after them: a thread may fetch batches during it.
    tokens = store.get_batch_tokens(passages)

    def measure(sae: Any) -> dict[str, float]:
        try:
            found = replacement_test(model, sae, tokens, seed=seed, verbose=False).summary
        except WriteSAEError:  # nothing fires yet, or inputs are still scaled
            return {}
        return {
            "replacement/win_rate": found["win_rate"],
            "replacement/median_kl_ratio": found["kl_ratio_atom_delete_random"][1],
            "replacement/median_cosine": found["median_cosine"],
        }

    def evaluate(*args: Any, **kwargs: Any) -> dict[str, Any]:
        metrics = evaluator(*args, **kwargs)
        saes = kwargs.get("saes", args[0] if args else kwargs.get("sae"))
        if isinstance(saes, dict):
            for name, sae in saes.items():
                metrics |= {f"{name}/{key}": value for key, value in measure(sae).items()}
            return metrics
        return metrics | measure(saes)

    runner.evaluator = evaluate  # type: ignore[assignment]
