"""SAELens's tools on writes of shipped models, as its documentation uses them, and formulas to compare with.

What the tools give is compared with these dense formulas, with plain forward passes of the model, or with a
second run that must agree; never with a method of the WriteSAE itself.
"""

import copy
from pathlib import Path

import datasets
import torch
from sae_lens import (
    CacheActivationsRunner,
    CacheActivationsRunnerConfig,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
)

from writesae_lens import WriteSAETrainingConfig

CONTEXT = 32
BATCH = 128
TOKENS = 4096
EARLY = 1408  # tokens at the first of two checkpoints: in the middle of a buffer
LATE = 2816  # and at the second: where a buffer was used up
CELLS = {"tiny-gdn": (1, 2), "tiny-mamba2": (4, 4), "tiny-rwkv7": (1, 1)}
HOOK = "blocks.1.linear_attn.hook_write.2"
FACTORS = ("dec_key", "dec_value", "enc_key", "enc_value")
# One forward pass of the model gives 256 writes, that is two batches, and no write is kept for later.
SETTINGS = {
    "model_class_name": "HookedRecurrent",
    "model_name": "tiny-gdn",
    "dataset_path": "held-out text",
    "context_size": CONTEXT,
    "prepend_bos": False,
    "training_tokens": TOKENS,
    "train_batch_size_tokens": BATCH,
    "store_batch_size_prompts": 8,
    "n_batches_in_buffer": 8,
    "activations_mixing_fraction": 0.0,
    "lr": 2e-3,
    "device": "cpu",
}


def dataset(rows):
    return None if rows is None else datasets.Dataset.from_dict({"input_ids": rows.tolist()})


def sae_config(**options):
    return WriteSAETrainingConfig(**({"d_k": 32, "d_v": 48, "d_sae": 64, "k": 4} | options))


def make_runner(folder, rows, seed=0, data=None, **options):
    """SAELens's runner on rows of tokens (None: on ``data``, or the text of ``dataset_path``)."""
    paths = {"checkpoint_path": str(folder / "checkpoints"), "output_path": str(folder / "sae")}
    logger = LoggingConfig(log_to_wandb=False)
    own = {"sae": sae_config(), "hook_name": HOOK, "logger": logger, "verbose": False} | paths
    torch.manual_seed(seed)
    cfg = LanguageModelSAERunnerConfig(**(SETTINGS | own | options))
    return LanguageModelSAETrainingRunner(cfg, override_dataset=data or dataset(rows))


def make_multi_runner(folder, rows, hooks, **options):
    """SAELens's runner for several SAEs, by name, on the hooks of these names."""
    paths = {"checkpoint_path": str(folder / "checkpoints"), "output_path": str(folder / "saes")}
    own = {"saes": {name: sae_config() for name in hooks}, "hook_names": hooks} | paths
    own["logger"] = LoggingConfig(log_to_wandb=False)
    return MultiSAETrainingRunner(
        MultiSAETrainingRunnerConfig(**(SETTINGS | own | options)), override_dataset=dataset(rows)
    )


def cache_runner(folder, rows, hook, n_tokens, context=CONTEXT, prompts=8, **options):
    """A runner that caches in one shard (so many tokens of 6,144 bytes), or several, if told so."""
    own = {
        "dataset_path": "held-out text",
        "model_class_name": "HookedRecurrent",
        "model_name": "tiny-gdn",
        "model_batch_size": prompts,
        "hook_name": hook,
        "d_in": 32 * 48,
        "training_tokens": n_tokens,
        "context_size": context,
        "prepend_bos": False,
        "shuffle": False,
        "device": "cpu",
        "buffer_size_gb": n_tokens * 6200 / 1e9,
        "new_cached_activations_path": str(folder / "cache"),
    }
    return CacheActivationsRunner(CacheActivationsRunnerConfig(**(own | options)), dataset(rows))


def watch_steps(sae, before):
    """Call ``before(step_input)`` ahead of each training step of an SAE."""
    step = sae.training_forward_pass

    def watched(step_input):
        before(step_input)
        return step(step_input)

    sae.training_forward_pass = watched


def interrupt_at(sae, n_steps):
    def interrupt(step_input):
        if step_input.n_training_steps == n_steps:
            raise KeyboardInterrupt

    watch_steps(sae, interrupt)


def batches_of(sae):
    """The batches that an SAE is trained on, in a list that fills as its runner runs."""
    seen = []
    watch_steps(sae, lambda step_input: seen.append(step_input.sae_in.clone()))
    return seen


def checkpoints(runner):
    return {int(p.name): p for p in Path(runner.cfg.checkpoint_path).iterdir() if p.name.isdigit()}


class Run:
    """A finished run: its runner, SAE and the batches that it was trained on."""

    def __init__(self, folder, rows, **options):
        self.runner = make_runner(folder, rows, **options)
        self.batches = batches_of(self.runner.sae)
        self.sae = self.runner.run()
        self.saved = folder / "sae"


def same_weights(one, other):
    """Bit for bit, atoms at norm 1 (where saving for inference puts them)."""

    def weights(sae):
        sae = copy.deepcopy(sae)
        norms = sae.W_dec.norm(dim=-1)
        if not torch.isclose(norms, torch.ones_like(norms)).all():
            sae.fold_W_dec_norm()
        return {n: w for n, w in sae.state_dict().items() if n != "progress"}

    mine, theirs = weights(one), weights(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


def writes(model, hook, tokens):
    """A hook's activations, from a plain forward pass."""
    with torch.no_grad():
        return model.run_with_cache(tokens, names_filter=[hook], prepend_bos=False)[1][hook]


def dense_encode(sae, x):
    z = x @ sae.W_enc.detach() + sae.b_enc.detach()
    top = (z * sae.W_dec.detach().norm(dim=-1)).topk(sae.cfg.k, dim=-1).indices
    return torch.zeros_like(z).scatter(-1, top, z.gather(-1, top).relu())


def dense_decode(sae, acts):
    return acts @ sae.W_dec.detach() + sae.b_dec.detach()


def dense(sae, x):
    return dense_decode(sae, dense_encode(sae, x))


def run_with_dense(model, sae, hook, tokens, reconstruct=dense):
    """Logits of the model with the dense reconstruction in each write's place."""
    with torch.no_grad():
        return model.run_with_hooks(tokens, fwd_hooks=[(hook, lambda x, hook: reconstruct(sae, x))])


def unexplained(sae, x):
    """|X - X^|^2 as a share of |X|^2."""
    x = x.reshape(-1, sae.cfg.d_in)
    return float((dense(sae, x) - x).square().sum() / x.square().sum())
