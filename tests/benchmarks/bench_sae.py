"""One training step (losses and gradients) at 128 x 128, k 32, batch 256, against dense formulations.

Dense is the paper's: matrices in, einsum encoder, atoms and reconstruction built. Flat is SAELens's TopK.
"""

import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput

from tests.benchmarks.timing import Row, speedup, take_turns
from writesae_lens import WriteSAETrainingConfig, WriteTrainingSAE

D, D_SAE, K, BATCH, ROUNDS = 128, 2048, 32, 256, 7


def rows() -> list[Row]:
    torch.manual_seed(0)
    sae = WriteTrainingSAE(
        WriteSAETrainingConfig(d_k=D, d_v=D, d_sae=D_SAE, k=K, write_alignment_coefficient=0.0)
    )
    flat = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D * D, d_sae=D_SAE, k=K))
    x = (torch.randn(BATCH, D, 1) * torch.randn(BATCH, 1, D)).flatten(1)
    step_input = TrainStepInput(
        sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False
    )
    parameters = [p for p in sae.parameters() if p.requires_grad]
    sae.training_forward_pass(step_input)  # the atoms start as writes

    def ours() -> list[torch.Tensor]:
        return list(torch.autograd.grad(sae.training_forward_pass(step_input).loss, parameters))

    def dense() -> list[torch.Tensor]:
        matrices = x.view(BATCH, D, D)
        z = torch.einsum("fk,nkv,fv->nf", sae.enc_key[:, 0], matrices, sae.enc_value[:, 0]) + sae.b_enc
        top = z.topk(K, dim=-1)
        acts = torch.zeros_like(z).scatter(-1, top.indices, top.values.relu())
        key, value = (torch.nn.functional.normalize(p[:, 0], dim=-1) for p in (sae.dec_key, sae.dec_value))
        atoms = torch.einsum("fk,fv->fkv", key, value)
        rebuilt = torch.einsum("nf,fkv->nkv", acts, atoms)
        loss = (matrices - rebuilt).square().sum((1, 2)).mean()
        return list(torch.autograd.grad(loss, parameters))

    def stock() -> None:
        flat.zero_grad()
        flat.training_forward_pass(step_input).loss.backward()

    worst = max(
        float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(ours(), dense(), strict=True)
    )
    seconds = take_turns({"ours": ours, "dense": dense, "stock": stock}, ROUNDS)
    what = f"training step, d_sae {D_SAE:,}"
    return [
        speedup(what, seconds["ours"], seconds["dense"], "dense formulation", ">= 35 x"),
        speedup(what, seconds["ours"], seconds["stock"], "SAELens's flat TopK", ""),
        Row("its gradients", "dense formulation", f"{worst:.1e} off", "<= 1e-4", "", ""),
    ]
