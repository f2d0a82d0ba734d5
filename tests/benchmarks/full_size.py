"""Operations on a model of full size against what they truly need: ``make bench-full``, one thread, minutes.

The model is Qwen3.5-0.8B with random weights (`full_size_model`). *Needed* is counted: tokens through the
layers up to the cell's and above it, unembedded positions, and compared distributions, each at the cost that
this run measures of it (`writesae_lens.reproduce.units`). The peak is the rise of the process's resident
memory, the model not counted.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import transformers
from datasets import Dataset
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput

from hooked_models.unembedding import logits_of, run_to_residual
from tests.benchmarks.full_size_model import LAYERS, Pair, build
from writesae_lens import WriteSAE, WriteSAEConfig, WriteSAETrainingConfig, WriteTrainingSAE
from writesae_lens.divergences import divergence
from writesae_lens.experiments.catalogue import EXPERIMENTS
from writesae_lens.experiments.passages import DEFAULT_CONTEXT
from writesae_lens.reproduce.units import Units
from writesae_lens.reproduce.work import Text, Work, work_of
from writesae_lens.saelens.runner import train_cells


@dataclass(frozen=True)
class Sizes:
    """How large the model and the rows are.

    Args:
        layers, small: of the model.
        layer, head: the cell.
        units: tokens of the passes that unit costs are measured on, and rows that are unembedded for them.
        replace: (tokens, firings) of the replacement tests.
        splice: tokens of the spliced passages.
        length: tokens of the other experiments' passages.
        firings: positions that erase reads, and trials of the sign test.
        d_sae, large: features of the SAEs, and of the larger SAE that encodes states.
        batch: states of a step.
        trained: writes that one cell is trained on; all heads of its layer are trained on half as many.
        forward, decoded: tokens of the idle pass, and of the continuation.
    """

    layers: int = LAYERS
    small: bool = False
    layer: int = 9
    head: int = 4
    units: int = 512
    replace: tuple[tuple[int, int], ...] = ((1024, 64), (512, 256))
    splice: tuple[int, ...] = (1024, 4096)
    length: int = 256
    firings: int = 32
    d_sae: int = 2048
    large: int = 16_384
    batch: int = 256
    trained: int = 8192
    forward: int = 1024
    decoded: int = 10


SMALL = Sizes(
    4, True, 1, 1, 64, ((64, 8), (32, 16)), (64,), 32, 8, 32, 64, 16, trained=512, forward=64, decoded=3
)


class Row(NamedTuple):
    """A line of the table."""

    operation: str
    seconds: float
    peak: float | None
    against: str
    ratio: str
    wanted: str = ""

    def line(self) -> str:
        peak = "" if self.peak is None else f"{self.peak:.2f}"
        cells = self.operation, f"{self.seconds:,.3g}", peak, self.against, self.ratio, self.wanted
        return f"| {' | '.join(cells)} |"


class Bench:
    """The model, its unit costs, and the rows of the table, each a method that `ROWS` names."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.pair: Pair = build(sizes.layers, sizes.small)
        self.model, self.layer, self.head = self.pair.hooked, sizes.layer, sizes.head
        self.cell = self.model.cell(self.layer, self.head)
        self.sae = _sae(self.cell.d_k, self.cell.d_v, sizes.d_sae)
        self.sae.cfg.metadata.hook_name = self.model.write_hook_name(self.layer, self.head)
        self.units = self._units()

    def tokens(self, length: int, rows: int = 1) -> torch.Tensor:
        rng = torch.Generator().manual_seed(length)
        return torch.randint(1, self.model.cfg.d_vocab, (rows, length), generator=rng)

    @torch.no_grad()
    def _units(self) -> Units:
        tokens = self.tokens(self.sizes.units)
        count = tokens.numel()
        every = _seconds(lambda: run_to_residual(self.model, tokens, use_cache=False)) / count
        first = lambda: self.model(tokens, stop_at_layer=self.layer + 1, use_cache=False)  # noqa: E731
        below = _seconds(first) / count
        residual = run_to_residual(self.model, tokens, use_cache=False)[0, :128]
        logits = logits_of(self.model, residual)
        unembedded = _seconds(lambda: logits_of(self.model, residual)) / len(residual)
        near = logits + 0.01 * torch.randn_like(logits)
        compared = _seconds(lambda: divergence(near, logits)) / len(logits)
        return Units(below, every - below, unembedded, compared, 0.0)

    def unit_rows(self) -> Iterator[Row]:
        """What the counts of the other rows are multiplied with."""
        names = (
            f"a token, layers up to the cell's ({self.layer + 1} of {self.sizes.layers})",
            "a token, layers above",
            "an unembedded position",
            "a KL of two distributions",
        )
        for name, seconds in zip(names, self.units):
            yield Row(f"unit: {name}", seconds, None, "", "")

    def _experiment(
        self,
        name: str,
        what: str,
        tokens: torch.Tensor,
        needed: Work | None,
        wanted: str,
        sae: Any = None,
        **options: Any,
    ) -> Row:
        """An experiment's own call, beside the work that it needs."""
        run = EXPERIMENTS[name].function
        subject = self.cell if name == "sign" else sae or self.sae
        _, seconds, peak = _measured(lambda: run(self.model, subject, tokens, verbose=False, **options))
        if needed is None:
            text = Text(len(tokens), tokens.shape[1], self.sizes.d_sae, codes=False)
            needed = work_of(EXPERIMENTS[name], text, options)
        limit = self.units.seconds(needed)
        return Row(
            f"{name}: {what}", seconds, peak, f"needed {limit:.3g} s", f"{seconds / limit:.2f} x", wanted
        )

    def replace(self) -> Iterator[Row]:
        """The whole replacement test, the pass that finds the firings included."""
        for length, firings in self.sizes.replace:
            what = f"{length:,} tokens, {firings} firings, baselines=False"
            options = {"max_firings": firings, "baselines": False}
            wanted = "<= 1.4 x, 0.7 GiB"
            yield self._experiment("replace", what, self.tokens(length), None, wanted, **options)

    def formula(self) -> Iterator[Row]:
        """Its defaults for one passage of 17 tokens after the write, with four atoms for fifty."""
        options = {"n_atoms": 4, "max_horizon": 16}
        tokens = self.tokens(17)  # so that the write is at the first token, and no cache comes before
        what = "1 passage, 4 atoms x 4 sizes x 17 tokens"
        yield self._experiment("formula", what, tokens, None, "<= 1.4 x, 0.7 GiB", **options)

    def erase(self) -> Iterator[Row]:
        """One native pass is needed; half of the positions choose the token, the others are tested.

        They are tested with the feature and with a random matrix taken out, at four doses each, and so are as
        many positions as there are in all where the feature is not active. The SAE is small, so that a
        feature is active at many positions.
        """
        length, count = self.sizes.length, self.sizes.firings
        tokens, sae = self.tokens(length), _sae(self.cell.d_k, self.cell.d_v, 16)
        sae.cfg.metadata.hook_name = self.sae.cfg.metadata.hook_name
        active = int((self._acts(sae, tokens[0]) > 0).sum(0).max())
        places = min(count, active) // 2
        rows = places * (1 + 4 * 4)
        needed = Work(length, length + rows, rows + 4 * places, rows - places)
        what = f"{length} tokens, {places} + {places} positions, 4 doses"
        wanted = "<= 1.4 x, 0.7 GiB"
        yield self._experiment("erase", what, tokens, needed, wanted, sae, max_firings=count)

    def sign(self) -> Iterator[Row]:
        """One native pass is needed; each trial is a row with a derivative, and a row with the write."""
        length, count = self.sizes.length, self.sizes.firings
        needed = Work(length, length + 3 * count, 3 * count + count, 0)
        what = f"{length} tokens, {count} trials"
        yield self._experiment("sign", what, self.tokens(length), needed, "<= 1.4 x, 0.7 GiB", n_trials=count)

    def splice(self) -> Iterator[Row]:
        """Passages in three conditions."""
        for length in self.sizes.splice:
            wanted = "0.6 GiB" if length <= 1024 else "0.8 GiB"
            yield self._experiment("splice", f"{length:,} tokens", self.tokens(length), None, wanted)

    def defaults(self) -> Iterator[Row]:
        """Every experiment at its command's defaults, counted, not run."""
        total = Work()
        for entry in EXPERIMENTS.values():
            length = entry.context_size or DEFAULT_CONTEXT
            dictionaries = 2 if entry.name in ("compare", "stability") else 1
            work = work_of(entry, Text(entry.max_passages, length, 2048, True, dictionaries))
            total = total.plus(work)
            yield self._counted(f"defaults, counted: {entry.name}", work)
        yield self._counted("defaults, counted: all", total, "<= 3,240 s")

    def _counted(self, what: str, work: Work, wanted: str = "") -> Row:
        counts = f"{work.tokens:,.0f} tokens, {work.unembedded:,.0f} logits, {work.compared:,.0f} KLs"
        return Row(what, self.units.seconds(work), None, counts, "", wanted)

    def states(self) -> Iterator[Row]:
        """A step of the paper's recipe, and encoding, on states."""
        sizes, d_k, d_v = self.sizes, self.cell.d_k, self.cell.d_v
        torch.manual_seed(0)
        x, d_in = torch.randn(sizes.batch, d_k * d_v), d_k * d_v
        k = min(32, sizes.d_sae // 4)
        flat = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d_in, d_sae=sizes.d_sae, k=k))
        _, theirs, _ = _measured(_step_of(flat, x), 2)
        del flat
        own = WriteTrainingSAE(WriteSAETrainingConfig.paper(d_k=d_k, d_v=d_v, d_sae=sizes.d_sae, k=k))
        _, ours, peak = _measured(_step_of(own, x), 2)
        what = f"a step of the paper's recipe, {sizes.batch} states"
        against = f"SAELens's flat TopK {theirs:.3g} s"
        yield Row(what, ours, peak, against, f"{ours / theirs:.2f} x", "<= 0.5 x")
        del own
        for d_sae in (sizes.d_sae, sizes.large):
            sae, weight = _sae(d_k, d_v, d_sae), torch.randn(min(d_sae, 2048), d_in)
            product = _seconds(lambda weight=weight: x @ weight.T) * d_sae / len(weight)
            with torch.no_grad():
                _, ours, peak = _measured(lambda sae=sae: sae.encode(x))
            what, against = (
                f"encode {sizes.batch} states, {d_sae:,} atoms",
                f"a dense product {product:.3g} s",
            )
            yield Row(what, ours, peak, against, f"{ours / product:.2f} x", "<= 2 x")

    def idle(self) -> Iterator[Row]:
        """Forward passes and continuations with hooks that nobody listens to."""
        tokens, prompt = self.tokens(self.sizes.forward), self.tokens(min(32, self.sizes.forward))
        n, plain, model = self.sizes.decoded, self.pair.plain, self.model
        how = {"max_new_tokens": n, "do_sample": False}
        pairs = (
            (
                f"forward of {tokens.numel():,} tokens, hooks idle",
                lambda: model(tokens, use_cache=False),
                lambda: plain(tokens, use_cache=False),
                "<= 1.02 x",
            ),
            (
                f"generate {n} tokens after {prompt.numel()}",
                lambda: model.generate(prompt, **how, stop_at_eos=False, verbose=False, return_type="tokens"),
                lambda: plain.generate(
                    prompt, **how, min_new_tokens=n, attention_mask=torch.ones_like(prompt)
                ),
                "<= 1.05 x",
            ),
        )
        with torch.no_grad():
            for what, ours, theirs, wanted in pairs:
                times = [(_seconds(ours, 1), _seconds(theirs, 1)) for _ in range(3)]
                _, _, peak = _measured(ours)
                best = [min(side) for side in zip(*times)]
                against, ratio = f"plain transformers {best[1]:.3g} s", f"{best[0] / best[1]:.2f} x"
                yield Row(what, best[0], peak, against, ratio, wanted)

    def training(self) -> Iterator[Row]:
        """One cell and all heads of its layer: the share of the model's own pass up to the layer."""
        heads = [cell for cell in self.model.cells if cell.layer == self.layer]
        for cells, tokens, wanted in (
            ([self.cell], self.sizes.trained, ">= 90%"),
            (heads, self.sizes.trained // 2, ">= 85%"),
        ):
            passed, (_, seconds, peak) = self._train(cells, tokens)
            share = passed * self.units.below / seconds
            what = f"train {len(cells)} cell{'s' * (len(cells) > 1)}, {tokens:,} writes"
            yield Row(
                what, seconds, peak, f"{passed:,} tokens of the model's pass", f"{share:.0%} of it", wanted
            )

    def _train(self, cells: Sequence[Any], tokens: int) -> tuple[int, tuple[Any, float, float]]:
        """Train, and count the tokens that the model's first block is given."""
        passed = 0

        def count(module: Any, given: Any, options: Any) -> None:
            nonlocal passed
            x = given[0] if given else options["hidden_states"]
            passed += x.shape[0] * x.shape[1]

        length = min(DEFAULT_CONTEXT, tokens // 4)
        data = Dataset.from_dict({"tokens": self.tokens(length, 2 * tokens // length).tolist()})
        how: dict[str, Any] = {
            "store_batch_size_prompts": 4,
            "n_batches_in_buffer": 4,
            "context_size": length,
        }
        handle = self.model.blocks[0].register_forward_pre_hook(count, with_kwargs=True)
        with TemporaryDirectory() as folder:
            found = _measured(
                lambda: train_cells(
                    self.model, cells, folder, tokens, text=data, prepend_bos=False, verbose=False, **how
                )
            )
        handle.remove()
        return passed, found

    def _acts(self, sae: WriteSAE, passage: torch.Tensor) -> torch.Tensor:
        """Coefficients of an SAE's features in a passage."""
        name = self.model.write_hook_name(self.layer, self.head)
        with torch.no_grad():
            _, cache = self.model.run_with_cache(
                passage[None], names_filter=[name], stop_at_layer=self.layer + 1, use_cache=False
            )
        return sae.encode(cache[name][0])


ROWS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "units": Bench.unit_rows,
    "idle": Bench.idle,
    "replace": Bench.replace,
    "formula": Bench.formula,
    "erase": Bench.erase,
    "sign": Bench.sign,
    "splice": Bench.splice,
    "states": Bench.states,
    "training": Bench.training,
    "defaults": Bench.defaults,
}


def _sae(d_k: int, d_v: int, d_sae: int) -> WriteSAE:
    torch.manual_seed(0)
    return WriteSAE(WriteSAEConfig(d_k=d_k, d_v=d_v, d_sae=d_sae, k=4))


def _step_of(sae: Any, x: torch.Tensor) -> Callable[[], None]:
    """A step of an SAE: losses, gradients, clipping, Adam."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4)
    dead = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)

    def step() -> None:
        sae.training_forward_pass(TrainStepInput(x, {}, dead, 1, False)).loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()  # the optimiser's own tensors are there from now on
    return step


def _seconds(run: Callable[[], object], repeats: int = 2) -> float:
    """CPU seconds of the quickest of some runs."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def _measured(run: Callable[[], Any], repeats: int = 1) -> tuple[Any, float, float]:
    """What a call returns, its CPU seconds (the quickest of some), and the rise of the peak, in GiB."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that is freed but kept would hide part of the rise
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    found, times = None, []
    for _ in range(repeats):
        start = time.process_time()
        found = run()
        times.append(time.process_time() - start)
    return found, min(times), (_status("VmHWM") - before) / 2**30


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table on stdout, what is under way on stderr."""
    parser = argparse.ArgumentParser(
        description="Operations on a model of full size, against what they need."
    )
    parser.add_argument(
        "--only", choices=ROWS, action="append", help="rows to run; more than once for several"
    )
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the model, 12 or more; it has 24")
    parser.add_argument(
        "--small", action="store_true", help="a small model and few tokens, to try the script"
    )
    given = parser.parse_args(arguments)
    if given.layers < 12:
        parser.error("--layers: 12 or more, for the cell is in layer 9")
    sizes = SMALL if given.small else Sizes(layers=given.layers)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    start = time.monotonic()

    def tell(what: str) -> None:
        print(f"{time.monotonic() - start:6.0f} s  {what}", file=sys.stderr, flush=True)

    tell("building the model, measuring unit costs")
    bench = Bench(sizes)
    model = "a small model" if sizes.small else "Qwen3.5-0.8B"
    print(
        f"{model} with random weights, {sizes.layers} of {sizes.layers if sizes.small else LAYERS} layers, "
        f"float32, cell {bench.layer}:{bench.head}, one thread, torch {torch.__version__}\n\n"
        "| operation | CPU s | peak, GiB | against | ratio | wanted |\n|---|---|---|---|---|---|",
        flush=True,
    )
    for name in given.only or ROWS:
        tell(name)
        for row in ROWS[name](bench):
            print(row.line(), flush=True)
    tell("done")


if __name__ == "__main__":
    main()
