"""The other experiments on tiny-gdn, against one full uncached pass of the whole passage a trial.

A trial is the least that a full pass can measure: one write into one passage (formula, erase, selectivity,
trace, compare), a pass with a gradient and an edited one (sign), a passage's three conditions (splice), a
continuation (install, amplify). What ours takes is the whole call, statistics included, by its trials.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from hooked_models import HookedRecurrent, zoo
from tests.benchmarks.timing import Row, speedup
from writesae_lens import WriteSAE, WriteSAEConfig, baselines, experiments
from writesae_lens.experiments import EXPERIMENTS, as_passages
from writesae_lens.experiments.installs.directions import Climb
from writesae_lens.experiments.installs.prompts import Prompts

LAYER, HEAD = 1, 2
QUIET: dict[str, Any] = {"verbose": False}
EDITED = "one edited forward pass each"


def rows() -> list[Row]:
    torch.manual_seed(0)
    bench = Bench()
    tests = (formula, erase, sign, installed, gradient, splice, amplify, selectivity, trace, compare, suite)
    return [test(bench) for test in tests]


class Bench:
    """Model, SAE and text, and full passes that take the time."""

    def __init__(self) -> None:
        self.model = HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")
        self.cell = self.model.cell(LAYER, HEAD)
        self.hook = self.model.write_hook_name(LAYER, HEAD)
        self.sae, self.other = self.make_sae(), self.make_sae()
        self.atoms = self.sae.W_dec.detach()
        self.train, test = zoo.shipped_text()
        self.text = "\n\n".join(test)
        self.ids = self.model.to_tokens(self.text[:60_000], prepend_bos=False, truncate=False)[0]
        self.model(self.passages(1, 256))
        self.seconds: list[float] = []

    def make_sae(self) -> WriteSAE:
        sae = WriteSAE(WriteSAEConfig(d_k=self.cell.d_k, d_v=self.cell.d_v, d_sae=512, k=4))
        sae.cfg.metadata.hook_name, sae.cfg.metadata.context_size = self.hook, 256
        return sae

    def passages(self, count: int, length: int) -> Tensor:
        return self.ids[: count * length].view(count, length)

    def ours(
        self, run: Callable[[Tensor], experiments.ExperimentResult], tokens: Tensor
    ) -> tuple[experiments.ExperimentResult, float]:
        """The result and the seconds it took, after a passage or two that do not count."""
        run(tokens[:2])
        self.seconds = []
        start = time.perf_counter()
        result = run(tokens)
        return result, time.perf_counter() - start

    def native(self, passage: Tensor, also: tuple[str, ...] = ()) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits and writes, not timed."""
        with torch.no_grad():
            names = [self.hook, *also]
            logits, cache = self.model.run_with_cache(passage[None], names_filter=names, use_cache=False)
        return logits[0], {name: cache[name][0] for name in names}

    def edited(
        self, passage: Tensor, edit: Callable[[Tensor], Tensor | None], more: tuple[Any, ...] = ()
    ) -> Tensor:
        """Logits where ``edit`` changes a copy of all the native writes [pos, d_k d_v]; timed."""

        def hook(x: Tensor, hook: Any) -> Tensor:
            x = x.clone()
            edit(x[0])
            return x

        start = time.perf_counter()
        with torch.no_grad():
            logits = self.model.run_with_hooks(passage[None], fwd_hooks=[(self.hook, hook), *more])[0]
        self.seconds.append(time.perf_counter() - start)
        return logits

    def plus(self, passage: Tensor, at: int, matrix: Tensor, more: tuple[Any, ...] = ()) -> Tensor:
        """Logits where a matrix joins the write at one position."""
        return self.edited(passage, lambda x: x[at].add_(matrix.flatten()), more)

    def continuation(
        self, prompt: Tensor, n_tokens: int, edit: Callable[[Tensor], Tensor | None]
    ) -> list[int]:
        """Greedy tokens, the whole growing sequence read again for each; timed as one."""
        sequence, mine = prompt, len(self.seconds)
        for _ in range(n_tokens):
            sequence = torch.cat([sequence, self.edited(sequence, edit)[-1:].argmax(-1)])
        self.seconds[mine:] = [sum(self.seconds[mine:])]
        return sequence[len(prompt) :].tolist()

    def row(self, what: str, each: float, off: str, against: str = EDITED, seconds: Any = None) -> Row:
        theirs = seconds or self.seconds
        row = speedup(what, [each], theirs, against, "> 1 x")
        ratio = f"{statistics.median(theirs) / each:.1f} x faster"
        return row._replace(
            ratio=ratio, ours=f"{each * 1000:.2f} ms; {off}", theirs=f"{row.theirs} ({len(theirs)} runs)"
        )


def unit(matrix: Tensor) -> Tensor:
    return matrix / matrix.norm()


def divergence(patched: Tensor, base: Tensor) -> float:
    p, b = patched.double().log_softmax(-1), base.double().log_softmax(-1)
    return float((p.exp() * (p - b)).sum())


def some(records: pd.DataFrame, count: int) -> Any:
    return records.sample(count, random_state=0).itertuples()


def formula(bench: Bench) -> Row:
    """The measured shift, and the prediction as a difference quotient of what comes after the layer."""
    passages = bench.passages(2, 64)
    result, took = bench.ours(
        lambda x: experiments.logit_formula_test(bench.model, bench.sae, x, **QUIET), passages
    )
    writes = result.records.groupby(["passage", "atom", "epsilon"])
    each, worst, step, theirs = took / len(writes), [0.0, 0.0, 0.0], 0.1, []
    out = bench.hook.rsplit(".hook_write", 1)[0] + ".hook_out"
    for number, row in enumerate(some(writes.head(1), 20)):
        passage = passages[row.passage]
        base, cache = bench.native(passage, (out,))
        kept: list[Tensor] = []
        keep = (out, lambda x, hook, kept=kept: kept.append(x[0].clone()))
        shift = bench.plus(passage, row.position, row.eps * unit(bench.atoms[row.atom]), (keep,)) - base
        theirs.append(bench.seconds[-1])
        part = writes.get_group((row.passage, row.atom, row.epsilon))
        at = part.position.to_numpy() + part.horizon.to_numpy(), part.token.to_numpy()
        worst[0] = max(
            worst[0], float((shift[at].double() - torch.tensor(part.measured.to_numpy())).abs().max())
        )
        if number < 6:
            moved = kept[0] - cache[out]
            far, near = (
                bench.edited(passage, lambda x: None, ((out, lambda x, hook, s=s, m=moved: x + s * m),))
                for s in (step, -step)
            )
            slope = torch.as_tensor((far - near)[at]).double() / (2 * step)
            gap = (slope - torch.tensor(part.predicted.to_numpy())).abs().max()
            worst[1] = max(worst[1], float(gap))
            worst[2] = max(worst[2], float(part.predicted.abs().max()))
    off = f"shifts {worst[0]:.1e}, predictions (up to {worst[2]:.1f}) {worst[1]:.1e} off"
    return bench.row("logit formula (exact), per write", each, off, seconds=theirs)


def erase(bench: Bench) -> Row:
    passages = bench.passages(8, 256)
    result, took = bench.ours(lambda x: experiments.erase_atom(bench.model, bench.sae, x, **QUIET), passages)
    records, summary = result.records, result.summary
    token, atom, worst = summary["preferred_token"], summary["atom"], [0.0, 0.0]
    for row in some(records.loc[records.condition != "random"], 20):
        passage = passages[row.passage]
        base = bench.native(passage)[0][row.position]
        patched = bench.plus(passage, row.position, -row.dose * row.coefficient * bench.atoms[atom])
        patched = patched[row.position]
        change = (patched.double().log_softmax(-1) - base.double().log_softmax(-1))[token]
        worst[0] = max(worst[0], abs(float(change) - row.delta_logp))
        worst[1] = max(worst[1], abs(divergence(patched, base) - row.kl))
    off = f"log p {worst[0]:.1e}, KL {worst[1]:.1e} off"
    return bench.row(f"erase, per firing, condition and dose ({len(records)})", took / len(records), off)


def _gradient(bench: Bench, passage: Tensor, score: Callable[[Tensor], Tensor], last: int) -> Tensor:
    """Derivative of a score of the logits by the writes from ``last`` on, by a full pass; timed."""
    start = time.perf_counter()
    nothing = torch.zeros(1, len(passage), bench.cell.d_k * bench.cell.d_v, requires_grad=True)
    logits = bench.model.run_with_hooks(passage[None], fwd_hooks=[(bench.hook, lambda x, hook: x + nothing)])
    (found,) = torch.autograd.grad(score(logits[0]), nothing)
    bench.seconds.append(time.perf_counter() - start)
    return found[0, last:].unflatten(-1, (bench.cell.d_k, bench.cell.d_v))


def sign(bench: Bench) -> Row:
    passages = bench.passages(4, 256)
    how: dict[str, Any] = {"direction": "jacobian", **QUIET}
    result, took = bench.ours(lambda x: experiments.sign_test(bench.model, bench.sae, x, **how), passages)
    worst, theirs = [0.0, 0.0], []
    for row in some(result.records, 20):
        passage, at = passages[row.passage], row.position
        logits, cache = bench.native(passage)
        slope = _gradient(bench, passage, lambda x, row=row, at=at: x[at, row.token], 0)[at]
        size = cache[bench.hook][at].norm()
        measured = bench.plus(passage, at, size * unit(slope))[at, row.token] - logits[at, row.token]
        theirs.append(sum(bench.seconds[-2:]))
        worst[0] = max(worst[0], abs(float(size * slope.norm()) - row.predicted))
        worst[1] = max(worst[1], abs(float(measured) - row.measured))
    off = f"predictions {worst[0]:.1e}, shifts {worst[1]:.1e} off"
    against = "a forward pass with backward and an edited one each"
    return bench.row("sign test (jacobian), per trial", took / len(result.records), off, against, theirs)


def installed(bench: Bench) -> Row:
    """An install decodes twice, its edit and its control; the native continuation is extra."""
    positions, n_tokens, prompts = 3, 20, bench.passages(16, 64)

    def run(x: Tensor) -> experiments.ExperimentResult:
        return experiments.install_tokens(bench.model, bench.sae, x, direction="unembedding", **QUIET)

    result, took = bench.ours(run, prompts)
    unembedding = bench.model.original_model.get_output_embeddings().weight.detach()  # type: ignore[operator]
    output = bench.model.mixers[LAYER].head_output(HEAD).detach()
    key_name = bench.model.write_factor_hook_names(LAYER)[0]
    different, worst = 0, 0.0
    for row in some(result.records, 5):
        prompt = prompts[row.prompt]
        base, cache = bench.native(prompt, (key_name,))
        keys, writes = cache[key_name][-positions:, HEAD], cache[bench.hook][-positions:]
        value = output @ unembedding[row.target]
        added = torch.stack(
            [
                row.magnitude * w.norm() * unit(k[:, None] * value).flatten()
                for k, w in zip(keys, writes, strict=True)
            ]
        )

        def edit(x: Tensor, added: Tensor = added, end: int = len(prompt)) -> None:
            x[end - positions : end] += added

        first = bench.edited(prompt, edit)[-1].double().log_softmax(-1)
        bench.seconds.pop()
        lift = first[row.target] - base[-1].double().log_softmax(-1)[row.target]
        worst = max(worst, abs(float(lift) - row.lift))
        different += bench.continuation(prompt, n_tokens, edit) != json.loads(row.continuation)
    off = f"lift {worst:.1e} off, {different} of 5 texts differ"
    each = took / len(result.records) / 2
    against = "the growing text read again at each of 20 tokens"
    return bench.row("install (unembedding), per continuation", each, off, against)


def gradient(bench: Bench) -> Row:
    """What `install_tokens` takes for ``jacobian`` without refinements."""
    positions, n_tokens, n_prompts, n_targets = 3, 20, 16, 4
    prompts = bench.passages(n_prompts, 64)
    group = Prompts(bench.model, [bench.cell], prompts, positions, n_tokens, 0.0, 0)
    said = group.native.tokens
    targets = torch.randint(0, bench.model.cfg.d_vocab, (n_prompts * n_targets,))
    of = torch.arange(n_prompts).repeat_interleave(n_targets)

    def steepest() -> tuple[torch.Tensor, torch.Tensor]:
        climb = Climb(bench.model, group.prefix, [bench.cell], group.last, said, of, targets, False)
        return climb.steepest()[0][bench.cell]

    steepest()
    bench.seconds = []
    start = time.perf_counter()
    key, value = steepest()
    each = (time.perf_counter() - start) / len(of)
    found, worst = key[..., None] * value[..., None, :], 0.0
    for edit in torch.randperm(len(of))[:20].tolist():
        passage = torch.cat([prompts[of[edit]], said[of[edit], :-1]])
        target = int(targets[edit])

        def margin(x: Tensor, target: int = target) -> Tensor:
            coming = x[prompts.shape[1] - 1 :]
            others = torch.cat([coming[:, :target], coming[:, target + 1 :]], dim=1)
            return (coming[:, target] - others.amax(-1)).logsumexp(-1)

        slope = _gradient(bench, passage, margin, prompts.shape[1] - positions)[:positions]
        left, _, right = torch.linalg.svd(slope)
        pair = left[..., :, 0, None] * right[..., 0, None, :]
        worst = max(worst, float((pair - found[edit]).abs().max()))
    off = f"unit directions {worst:.1e} off"
    return bench.row("install (jacobian), per gradient", each, off, "a forward pass with backward each")


def splice(bench: Bench) -> Row:
    passages = bench.passages(8, 256)
    result, took = bench.ours(lambda x: experiments.splice_test(bench.model, bench.sae, x, **QUIET), passages)
    half, worst = 128, 0.0

    def rebuild(x: Tensor) -> None:
        x[:half] = bench.sae(x[:half])

    def delete(x: Tensor) -> None:
        x[:half] = 0

    edits = {"nll_native": lambda x: None, "nll_spliced": rebuild, "nll_deleted": delete}
    for row in some(result.records, 8):
        passage = passages[row.passage]
        for name, edit in edits.items():
            log_p = bench.edited(passage, edit)[half:-1].double().log_softmax(-1)
            nll = -log_p.gather(-1, passage[half + 1 :, None]).mean()
            worst = max(worst, abs(float(nll) - getattr(row, name)))
    theirs = [sum(bench.seconds[i : i + 3]) for i in range(0, len(bench.seconds), 3)]
    each, off = took / len(result.records), f"{worst:.1e} nats off"
    return bench.row("splice, per passage", each, off, "three edited forward passes each", theirs)


def amplify(bench: Bench) -> Row:
    """Greedy, as draws would have to be the same ones."""
    n_tokens, prompts = 100, bench.passages(16, 64)
    how = QUIET | {"n_tokens": n_tokens, "temperature": 0.0}
    result, took = bench.ours(lambda x: experiments.amplify(bench.model, bench.sae, x, **how), prompts)
    summary, different = result.summary, 0
    own = summary["mean_coefficient"] * bench.atoms[summary["atom"]]
    writes = {f"{factor:g}x": own * factor for factor in (2.0, 5.0, 10.0)}
    writes["random"] = 10 * own.norm() * unit(bench.atoms[summary["control_atom"]])
    for row in some(result.records.loc[result.records.condition != "native"], 2):

        def edit(x: Tensor, write: Tensor = writes[row.condition]) -> None:
            x[prompts.shape[1] :] += write

        said = bench.continuation(prompts[row.prompt], n_tokens, edit)
        different += said != json.loads(row.continuation)
    off = f"{different} of 2 texts differ"
    against = "the growing text read again at each of 100 tokens"
    return bench.row("amplify, per continuation", took / len(result.records), off, against)


def selectivity(bench: Bench) -> Row:
    passages = bench.passages(4, 256)
    result, took = bench.ours(lambda x: experiments.selectivity(bench.model, bench.sae, x, **QUIET), passages)
    records, worst = result.records, [0.0, 0.0]
    for row in some(records.loc[records.kind == "atom"], 20):
        passage, at = passages[row.passage], row.position
        logits, cache = bench.native(passage)
        size = cache[bench.hook][at].norm()
        patched = bench.plus(passage, at, size * unit(bench.atoms[row.atom]))[at]
        shift = patched - logits[at]
        shift = shift - shift.mean()
        top = shift.abs().topk(20).values
        given = shift[json.loads(row.top)].abs()  # tokens may be tied
        worst[0] = max(worst[0], abs(divergence(patched, logits[at]) - row.kl))
        worst[1] = max(worst[1], float((top - given).abs().max()), abs(float(top[0]) - abs(row.max_shift)))
    off = f"KL {worst[0]:.1e}, shifts {worst[1]:.1e} off"
    return bench.row("selectivity, per write", took / len(records), off)


def trace(bench: Bench) -> Row:
    passages = bench.passages(8, 96)
    result, took = bench.ours(
        lambda x: experiments.reader_trace(bench.model, bench.sae, x, **QUIET), passages
    )
    names = {
        n: bench.model.write_factor_hook_names(n)[2].replace("hook_read", "hook_recurrence_out")
        for n in bench.model.mixers
        if n >= LAYER
    }
    writes = result.records.groupby(["passage", "kind", "atom"])
    each, worst = took / len(writes), 0.0
    first = writes.head(1)
    for row in some(first.loc[first.kind == "atom"], 20):
        passage = passages[row.passage]
        native = bench.native(passage, tuple(names.values()))[1]
        moved: dict[str, Tensor] = {}
        keep = tuple((n, lambda x, hook, n=n, to=moved: to.update({n: x[0].clone()})) for n in names.values())
        matrix = result.summary["write_norm"] * unit(bench.atoms[row.atom])
        bench.plus(passage, row.position, matrix, keep)
        for layer, part in writes.get_group((row.passage, row.kind, row.atom)).groupby("layer"):
            o, change = native[names[layer]], moved[names[layer]] - native[names[layer]]  # type: ignore[index]
            share = change.norm(dim=-1) / o.norm(dim=-1).clamp(min=1e-30)
            here = share[np.asarray(part.position) + np.asarray(part.horizon), np.asarray(part["head"])]
            gap = (torch.as_tensor(here).double() - torch.tensor(part.change.to_numpy())).abs().max()
            worst = max(worst, float(gap))
    return bench.row("reader trace, per write", each, f"changes {worst:.1e} off")


def compare(bench: Bench) -> Row:
    passages, saes = bench.passages(2, 256), {"one": bench.sae, "other": bench.other}
    result, took = bench.ours(lambda x: experiments.compare(bench.model, saes, x, **QUIET), passages)
    records, worst = result.records, 0.0
    for row in some(records.loc[records["name"].isin([*saes, "delete"])], 20):
        passage, at = passages[row.passage], row.position
        base = bench.native(passage)[0][at]
        matrix = bench.atoms[0] * 0
        if row.name in saes:
            matrix = row.coefficient * saes[row.name].W_dec[row.atom].detach()
        patched = bench.edited(passage, lambda x, at=at, matrix=matrix: x[at].copy_(matrix))[at]
        worst = max(worst, abs(divergence(patched, base) - row.kl))
    return bench.row("compare, per firing and stand-in", took / len(records), f"KL {worst:.1e} off")


def suite(bench: Bench) -> Row:
    """All commands with their defaults, figures and files included; SAEs are not trained."""
    model, sae = bench.model, bench.sae
    pc = baselines.principal_component(model, LAYER, HEAD, "\n\n".join(bench.train[:100]))
    both = {"writesae": sae, "principal_component": pc}
    subjects: dict[str, Any] = {"compare": both, "splice": [sae], "stability": [sae]}
    took, cpu = {}, time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        for name, experiment in EXPERIMENTS.items():
            start = time.perf_counter()
            passages = as_passages(model, bench.text, experiment.context_size or 256)
            passages, place = passages[-experiment.max_passages :], Path(folder) / name
            kept = {"progress_folder": str(place / "progress"), **QUIET}
            experiment.function(model, subjects.get(name, sae), passages, **kept).save(place)
            took[name] = time.perf_counter() - start
    longest = sorted(took, key=lambda name: -took[name])[:3]
    what = f"all {len(took)} experiments with their defaults, one cell"
    ours = f"{time.process_time() - cpu:.0f} s of CPU; longest: " + ", ".join(
        f"{name} {took[name]:.0f} s" for name in longest
    )
    return Row(what, "time, one thread", f"{sum(took.values()):.0f} s", "<= 300 s", ours, "")
