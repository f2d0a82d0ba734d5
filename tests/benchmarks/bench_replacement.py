"""The replacement test on tiny-gdn at T = 256, against one full forward pass per firing and condition."""

import statistics
import time

import torch

from hooked_models import HookedRecurrent, zoo
from tests.benchmarks.timing import Row, speedup
from writesae_lens import WriteSAE, WriteSAEConfig
from writesae_lens.experiments import replacement_test

LENGTH, PASSAGES, FULL_PASSES = 256, 4, 90
# Later reads: the firings and the horizon of the documented runs.
LATER_PASSAGES, FIRINGS, HORIZON = 32, 512, 32
# Conditions that are run over later tokens: the SAE's own, deletion, control, and three untrained stand-ins.
LATER_CONDITIONS = 6


def rows() -> list[Row]:
    torch.manual_seed(0)
    model = HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")
    cell = model.cell(1, 2)
    sae = WriteSAE(WriteSAEConfig(d_k=cell.d_k, d_v=cell.d_v, d_sae=512, k=4))
    sae.cfg.metadata.hook_name = model.write_hook_name(1, 2)
    ids = model.to_tokens(zoo.text("test"), prepend_bos=False, truncate=False)
    tokens = ids[0, : LATER_PASSAGES * LENGTH].view(LATER_PASSAGES, LENGTH)
    own, seconds = _own(model, sae, tokens[:PASSAGES])
    return [*own, *_later(model, sae, tokens, statistics.median(seconds))]


def _own(model: HookedRecurrent, sae: WriteSAE, tokens: torch.Tensor) -> tuple[list[Row], list[float]]:
    """The own position alone; and the seconds of the full passes that it is compared with."""
    name, how = sae.cfg.metadata.hook_name, {"baselines": False, "verbose": False}
    replacement_test(model, sae, tokens[:1], **how)
    start = time.perf_counter()
    records = replacement_test(model, sae, tokens, **how).records
    n_conditions = sum(column.startswith("kl_") for column in records) - 1
    each = (time.perf_counter() - start) / len(records) / n_conditions

    some = records.sample(FULL_PASSES // 3, random_state=0)
    worst, seconds = 0.0, []
    with torch.no_grad():
        for row in some.itertuples():
            passage = tokens[row.passage][None]
            base = model(passage)[0, row.position].double().log_softmax(-1)
            for column, matrix in (
                ("kl_atom", sae.W_dec[row.atom] * row.coefficient),
                ("kl_delete", torch.zeros(sae.cfg.d_in)),
                (None, torch.randn(sae.cfg.d_in)),
            ):

                def swap(x, hook, at=row.position, matrix=matrix):
                    x = x.clone()
                    x[:, at] = matrix
                    return x

                start = time.perf_counter()
                logits = model.run_with_hooks(passage, fwd_hooks=[(name, swap)])
                seconds.append(time.perf_counter() - start)
                if column:
                    patched = logits[0, row.position].double().log_softmax(-1)
                    kl = float((patched.exp() * (patched - base)).sum())
                    worst = max(worst, abs(kl - getattr(row, column)))
    what, against = "replacement test, per firing and condition", "one edited forward pass each"
    row = speedup(what, [each], seconds, against, ">= 50 x")
    exact = Row("its KLs", against, f"{worst:.1e} off", "<= 1e-4", "", "")
    return [row._replace(ours=f"{each * 1000:.2f} ms"), exact], seconds


def _later(model: HookedRecurrent, sae: WriteSAE, tokens: torch.Tensor, full_pass: float) -> list[Row]:
    """With a horizon: 512 firings of 32 passages, all conditions, as one call."""
    start = time.perf_counter()
    records = replacement_test(
        model, sae, tokens, horizon=HORIZON, max_firings=FIRINGS, verbose=False
    ).records
    whole = time.perf_counter() - start
    brute = full_pass * len(records) * LATER_CONDITIONS
    what = f"replacement test, horizon {HORIZON}, {len(records)} firings, six conditions, all included"
    return [
        Row(
            what,
            "one edited forward pass each",
            f"{brute / whole:.0f} x faster",
            ">= 2 x",
            f"{whole:.0f} s",
            f"{brute:.0f} s",
        ),
        Row(what, "a minute", f"{whole:.0f} s", "<= 60 s", "", ""),
    ]
