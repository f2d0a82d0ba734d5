"""The replacement test on tiny-gdn at T = 256, against one full forward pass per firing and condition."""

import time

import torch

from hooked_models import HookedRecurrent, zoo
from tests.benchmarks.timing import Row, speedup
from writesae_lens import WriteSAE, WriteSAEConfig
from writesae_lens.experiments import replacement_test

LENGTH, PASSAGES, FULL_PASSES = 256, 4, 90


def rows() -> list[Row]:
    torch.manual_seed(0)
    model = HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")
    cell = model.cell(1, 2)
    sae = WriteSAE(WriteSAEConfig(d_k=cell.d_k, d_v=cell.d_v, d_sae=512, k=4))
    name = sae.cfg.metadata.hook_name = model.write_hook_name(1, 2)
    ids = model.to_tokens(zoo.held_out_text()[:20_000], prepend_bos=False, truncate=False)
    tokens = ids[0, : PASSAGES * LENGTH].view(PASSAGES, LENGTH)
    replacement_test(model, sae, tokens[:1], verbose=False)
    start = time.perf_counter()
    records = replacement_test(model, sae, tokens, verbose=False).records
    each = (time.perf_counter() - start) / len(records) / 3

    some = records.sample(FULL_PASSES // 3, random_state=0)
    worst, seconds = 0.0, []
    with torch.no_grad():
        for row in some.itertuples():
            passage = tokens[row.passage][None]
            base = model(passage)[0, row.position].double().log_softmax(-1)
            for column, matrix in (
                ("kl_atom", sae.W_dec[row.atom] * row.coefficient),
                ("kl_delete", torch.zeros(cell.d_k * cell.d_v)),
                (None, torch.randn(cell.d_k * cell.d_v)),
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
    what = "replacement test, per firing and condition"
    against = "one edited forward pass each"
    row = speedup(what, [each], seconds, against, ">= 50 x")
    return [
        row._replace(ours=f"{each * 1000:.2f} ms"),
        Row("its KLs", against, f"{worst:.1e} off", "<= 1e-4", "", ""),
    ]
