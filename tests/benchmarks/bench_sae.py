"""One training step (losses and gradients) at 128 x 128, k 32, batch 256, against dense formulations.

Dense is the paper's: matrices in, einsum encoder, atoms and reconstruction built. Flat is SAELens's TopK.
Codes are 1,024 of keys and 1,024 of values, 8 of each active, against both at 2,048 atoms.
States are matrices of full rank: the paper's recipe on them, optimisers included, against SAELens's TopK, and
their encoding against one product with as many built atoms. The dead-atom loss is timed with 30% dead.
Memory is the peak of each side in a process of its own, above what was resident before the step.
"""

import multiprocessing
import re
from collections.abc import Callable
from pathlib import Path

import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput

from tests.benchmarks.timing import Row, slowdown, speedup, take_turns
from writesae_lens import WriteSAETrainingConfig, WriteTrainingSAE
from writesae_lens.saes.packed import PackedWrites, Write

D, K, BATCH = 128, 32, 256
Step = Callable[[], list[torch.Tensor]]


def rows() -> list[Row]:
    found = []
    for d_sae, rounds, wanted in ((2048, 7, ">= 45 x"), (16_384, 2, ">= 90 x")):
        steps = {side: make(d_sae) for side, make in SIDES.items()}
        if d_sae == 2048:
            steps["codes"] = _codes(d_sae)
        ours, dense = steps["ours"](), steps["dense"]()
        worst = max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(ours, dense))
        seconds = take_turns(steps, rounds)
        what = f"training step, d_sae {d_sae:,}"
        found += [
            speedup(what, seconds["ours"], seconds["dense"], "dense formulation", wanted),
            speedup(what, seconds["ours"], seconds["flat"], "SAELens's flat TopK", wanted),
            Row("its gradients", "dense formulation", f"{worst:.1e} off", "<= 1e-4", "", ""),
        ]
        if "codes" in steps:
            found += [
                speedup(
                    "training step, 1,024 + 1,024 codes", seconds["codes"], seconds[side], against, ">= 60 x"
                )
                for side, against in (("dense", "dense formulation"), ("flat", "SAELens's flat TopK"))
            ]
        del steps, ours, dense
        peak = {side: _peak_memory(side, d_sae) for side in SIDES}
        found += [
            Row(
                f"its peak memory, d_sae {d_sae:,}",
                against,
                f"1 / {peak[side] / peak['ours']:.0f}",
                "<= 1 / 10",
                f"{peak['ours'] / 2**20:,.0f} MiB",
                f"{peak[side] / 2**20:,.0f} MiB",
            )
            for side, against in (("dense", "dense formulation"), ("flat", "SAELens's flat TopK"))
        ]
    return [*found, _state_step(), *map(_state_encoding, (2048, 16_384)), *_dead_atoms()]


def _state_step() -> Row:
    """A step of the paper's recipe, with its optimiser, on states."""
    torch.manual_seed(0)
    step_input = _step_input(torch.randn(BATCH, D * D))
    ours = WriteTrainingSAE(WriteSAETrainingConfig.paper(d_k=D, d_v=D))
    flat = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D * D, d_sae=2048, k=K))
    seconds = take_turns({"ours": _optimised(ours, step_input), "flat": _optimised(flat, step_input)}, 3)
    what = "the paper's recipe on states, a step with Adam"
    return slowdown(what, seconds["ours"], seconds["flat"], "SAELens's flat TopK", "<= 0.5 x")


def _state_encoding(d_sae: int) -> Row:
    torch.manual_seed(0)
    states, atoms = torch.randn(BATCH, D * D), torch.randn(d_sae, D * D)
    sae = WriteTrainingSAE(WriteSAETrainingConfig.paper(d_k=D, d_v=D, d_sae=d_sae)).eval()
    with torch.no_grad():
        seconds = take_turns({"ours": lambda: sae.encode(states), "product": lambda: states @ atoms.T}, 2)
    what, against = f"encoding {BATCH} states, d_sae {d_sae:,}", "one product with built atoms"
    return slowdown(what, seconds["ours"], seconds["product"], against, "<= 2 x")


def _dead_atoms() -> list[Row]:
    """A step with its optimiser where 30% of 16,384 atoms, or codes, are dead, against one where none are."""
    d_sae, found = 16_384, []
    torch.manual_seed(0)
    x = PackedWrites(Write(torch.randn(512, 1, D), torch.randn(512, 1, D)))
    some = torch.rand(d_sae) < 0.3
    for what, config in (
        ("atoms of the paper's recipe", WriteSAETrainingConfig.paper(d_k=D, d_v=D, d_sae=d_sae)),
        (
            "codes",
            WriteSAETrainingConfig.recommended(
                d_k=D, d_v=D, d_sae=d_sae, init_from_writes=False, aux_loss_coefficient=0.01
            ),
        ),
    ):
        sae = WriteTrainingSAE(config)
        steps = {
            name: _optimised(sae, _step_input(x, dead))
            for name, dead in (("some", some), ("none", torch.zeros_like(some)))
        }
        seconds = take_turns(steps, 3)
        name = f"training step, 30% of {d_sae:,} {what} dead"
        found.append(slowdown(name, seconds["some"], seconds["none"], "none dead", "<= 2 x"))
    return found


def _optimised(sae: torch.nn.Module, step_input: TrainStepInput) -> Callable[[], None]:
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-4)

    def step() -> None:
        sae.training_forward_pass(step_input).loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _inputs() -> TrainStepInput:
    torch.manual_seed(0)
    x = (torch.randn(BATCH, D, 1) * torch.randn(BATCH, 1, D)).flatten(1)
    return _step_input(x)


def _step_input(x: torch.Tensor, dead: torch.Tensor | None = None) -> TrainStepInput:
    return TrainStepInput(
        sae_in=x, coefficients={}, dead_neuron_mask=dead, n_training_steps=0, is_logging_step=False
    )


def _sae(d_sae: int) -> WriteTrainingSAE:
    torch.manual_seed(0)
    # As the dense formulation: squared error alone, from a random start.
    return WriteTrainingSAE(
        WriteSAETrainingConfig(
            d_k=D, d_v=D, d_sae=d_sae, k=K, write_alignment_coefficient=0.0, init_from_writes=False
        )
    )


def _ours(d_sae: int) -> Step:
    sae, step_input = _sae(d_sae), _inputs()
    parameters = [p for p in sae.parameters() if p.requires_grad]
    return lambda: list(torch.autograd.grad(sae.training_forward_pass(step_input).loss, parameters))


def _codes(d_sae: int) -> Step:
    torch.manual_seed(0)
    config = WriteSAETrainingConfig.recommended(d_k=D, d_v=D, d_sae=d_sae, init_from_writes=False)
    sae, step_input = WriteTrainingSAE(config), _inputs()
    parameters = [p for p in sae.parameters() if p.requires_grad]
    return lambda: list(torch.autograd.grad(sae.training_forward_pass(step_input).loss, parameters))


def _dense(d_sae: int) -> Step:
    sae, x = _sae(d_sae), _inputs().sae_in
    parameters = [p for p in sae.parameters() if p.requires_grad]

    def step() -> list[torch.Tensor]:
        matrices = x.view(BATCH, D, D)
        z = torch.einsum("fk,nkv,fv->nf", sae.enc_key[:, 0], matrices, sae.enc_value[:, 0]) + sae.b_enc
        top = z.topk(K, dim=-1)
        acts = torch.zeros_like(z).scatter(-1, top.indices, top.values.relu())
        key, value = (torch.nn.functional.normalize(p[:, 0], dim=-1) for p in (sae.dec_key, sae.dec_value))
        atoms = torch.einsum("fk,fv->fkv", key, value)
        rebuilt = torch.einsum("nf,fkv->nkv", acts, atoms)
        loss = (matrices - rebuilt).square().sum((1, 2)).mean()
        return list(torch.autograd.grad(loss, parameters))

    return step


def _flat(d_sae: int) -> Step:
    torch.manual_seed(0)
    flat, step_input = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D * D, d_sae=d_sae, k=K)), _inputs()
    parameters = [p for p in flat.parameters() if p.requires_grad]
    return lambda: list(torch.autograd.grad(flat.training_forward_pass(step_input).loss, parameters))


SIDES: dict[str, Callable[[int], Step]] = {"ours": _ours, "dense": _dense, "flat": _flat}


def _peak_memory(side: str, d_sae: int) -> int:
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_measure_memory, (side, d_sae))


def _measure_memory(side: str, d_sae: int) -> int:
    """Peak bytes of one step above what its parameters and inputs take."""
    torch.set_num_threads(1)
    SIDES[side](64)()  # libraries load their own memory first
    step = SIDES[side](d_sae)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
