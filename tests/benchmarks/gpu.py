"""One prepared script for a machine with a GPU, under 8 minutes: ``python -m tests.benchmarks.gpu``.

First it checks the hooks and recurrences of the shipped models on the device against float64 on the CPU. Then
it times a model of Qwen3.5-0.8B's sizes in float32 and bfloat16: forward passes, reading and editing a write,
generation, training, the replacement test and the logit formula; passes and generation beside transformers
alone, with its fast kernels where they are installed (flash-linear-attention, causal-conv1d), and without. It
prints one table for the documentation. A part that would start after ``--budget`` seconds is left out, and
named. ``--device cpu --small`` runs everything on a small model.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import transformers
from datasets import Dataset
from transformers.models.qwen3_5 import modeling_qwen3_5

from hooked_models import HookedRecurrent, zoo
from tests.benchmarks.full_size_model import build
from writesae_lens import WriteSAE, WriteSAEConfig
from writesae_lens.experiments import logit_formula_test, replacement_test
from writesae_lens.saelens.runner import train_cells

# transformers' functions that a package with fast kernels takes the place of.
_KERNELS = (
    "torch_chunk_gated_delta_rule",
    "torch_recurrent_gated_delta_rule",
    "causal_conv1d_fn",
    "causal_conv1d_update",
)
_PACKAGES = {"fla": "flash-linear-attention", "causal_conv1d": "causal-conv1d"}


class Scale(NamedTuple):
    """Sizes of the runs: the shipped models that are checked, the model's layers and cell, and tokens."""

    checked: tuple[str, ...]
    small: bool
    layers: int
    cell: tuple[int, int]
    forward: int
    decoded: int
    trained: int
    replaced: int
    firings: int


FULL = Scale(zoo.SHIPPED, False, 24, (9, 4), 4096, 64, 65_536, 1024, 64)
SMALL = Scale(zoo.SHIPPED[:1], True, 4, (1, 1), 64, 4, 512, 48, 8)


class Row(NamedTuple):
    """A line of the table: seconds and the rise of the device's peak memory, or the error of a check."""

    operation: str
    dtype: str
    seconds: float | None = None
    peak: float | None = None
    against: str = ""

    def line(self) -> str:
        seconds = "" if self.seconds is None else f"{self.seconds:.4g}"
        peak = "" if self.peak is None else f"{self.peak:.2f}"
        return f"| {' | '.join((self.operation, self.dtype, seconds, peak, self.against))} |"


def checks(scale: Scale, device: str) -> Iterator[Row]:
    """Logits, writes, states, an edited pass and its gradient on the device, against float64 on the CPU."""
    for name in scale.checked:
        exact = HookedRecurrent.boot_transformers(name, device="cpu")
        exact.original_model.double()
        tokens = exact.to_tokens(zoo.text("test")[:800], prepend_bos=False)[:, :96]
        truth = _observed(exact, tokens)
        own = _observed(HookedRecurrent.boot_transformers(name, device=device), tokens.to(device))
        for what, expected in truth.items():
            error = float((own[what].cpu().double() - expected).abs().max() / expected.abs().max())
            verdict = "as it should be" if error < 1e-4 else "WRONG"
            yield Row(f"check: {what}, {name}", "float32", against=f"{error:.1e} of the largest: {verdict}")


def _observed(model: HookedRecurrent, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the checks compare."""
    layer, head = zoo.DEFAULT_CELLS[str(model.cfg.model_name)]
    write, state = model.write_hook_name(layer, head), model.state_hook_name(layer, head)
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens, names_filter=[write, state])
        kept = model.new_cache()
        parts = [model(part, past_key_values=kept, use_cache=True) for part in tokens.split(31, dim=1)]
    like = cache[write]
    sizes = torch.linspace(0.2, 1, tokens.shape[1], dtype=like.dtype, device=like.device, requires_grad=True)
    edited = model.run_with_hooks(tokens, fwd_hooks=[(write, lambda x, hook: x * sizes[:, None])])
    (slopes,) = torch.autograd.grad(edited.log_softmax(-1)[0, -1].amax(), sizes)
    return {
        "logits": logits,
        "writes": cache[write],
        "states": cache[state],
        "cached decoding": torch.cat(parts, dim=1),
        "edited writes": edited.detach(),
        "gradients": slopes,
    }


def timings(scale: Scale, device: str, dtype: torch.dtype) -> Iterator[Row]:
    """Every operation on the model in one number format, plain transformers first."""
    pair = build(scale.layers, scale.small, device, dtype)
    plain, model, name = pair.plain, pair.hooked, str(dtype).removeprefix("torch.")
    layer, head = scale.cell
    write = model.write_hook_name(layer, head)
    tokens = torch.randint(1, model.cfg.d_vocab, (1, scale.forward), device=device)
    prompt = tokens[:, :32]
    how = {"max_new_tokens": scale.decoded, "do_sample": False}
    of_plain = how | {"min_new_tokens": scale.decoded, "attention_mask": torch.ones_like(prompt)}
    of_hooked = how | {"stop_at_eos": False, "verbose": False, "return_type": "tokens"}

    def row(
        what: str, run: Callable[[], object], against: str = "", repeats: int = 1 if scale.small else 3
    ) -> Row:
        return Row(what, name, *_timed(run, device, repeats), against)

    def halve(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return x * 0.5

    passing, decoding = f"forward, {scale.forward:,} tokens", f"generate {scale.decoded} tokens after 32"
    with torch.no_grad():
        for kernels, ready in (("with", contextlib.nullcontext), ("without", _without_kernels)):
            if kernels == "with" and not any(map(importlib.util.find_spec, _PACKAGES)):
                continue
            with ready():
                yield row(
                    f"plain {passing}", lambda: plain(tokens, use_cache=False), f"{kernels} fast kernels"
                )
                run = lambda: plain.generate(prompt, **of_plain)  # noqa: E731
                yield row(f"plain {decoding}", run, f"{kernels} fast kernels")
        yield row(f"{passing}, hooks idle", lambda: model(tokens, use_cache=False))
        options: dict[str, Any] = {"stop_at_layer": layer + 1, "use_cache": False}
        read = lambda: model.run_with_cache(tokens, names_filter=[write], **options)  # noqa: E731
        yield row(f"read one write, {scale.forward:,} tokens", read, f"stop_at_layer={layer + 1}")
        edit = lambda: model.run_with_hooks(tokens, fwd_hooks=[(write, halve)], use_cache=False)  # noqa: E731
        yield row(f"edit one write, {scale.forward:,} tokens", edit)
        yield row(decoding, lambda: model.generate(prompt, **of_hooked))
    yield row(f"train one cell, {scale.trained:,} writes", lambda: _train(model, scale), repeats=1)
    sae = WriteSAE(
        WriteSAEConfig(d_k=model.cell(*scale.cell).d_k, d_v=model.cell(*scale.cell).d_v, d_sae=512, k=4)
    )
    sae.to(device)
    sae.cfg.metadata.hook_name = write
    passage = tokens[:, : scale.replaced]
    options = {"max_firings": scale.firings, "baselines": False, "verbose": False}
    what = f"replacement test, {scale.replaced:,} tokens, {scale.firings} firings"
    yield row(what, lambda: replacement_test(model, sae, passage, **options), "baselines=False", 1)
    short = tokens[:, : min(scale.replaced, 64)]
    run = lambda: logit_formula_test(model, sae, short, n_atoms=8, verbose=False)  # noqa: E731
    yield row("logit formula, 1 passage, 8 atoms x 4 sizes", run, repeats=1)


@contextlib.contextmanager
def _without_kernels() -> Iterator[None]:
    """transformers' own functions in PyTorch in the place of those that packages bring."""
    before = {name: getattr(modeling_qwen3_5, name) for name in _KERNELS}
    for name, function in before.items():
        setattr(modeling_qwen3_5, name, getattr(function, "__wrapped__", function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(modeling_qwen3_5, name, function)


def _train(model: HookedRecurrent, scale: Scale) -> None:
    length = min(256, scale.trained // 4)
    rows = torch.randint(1, model.cfg.d_vocab, (2 * scale.trained // length, length)).tolist()
    text = Dataset.from_dict({"tokens": rows})
    options: dict[str, Any] = {"context_size": length, "prepend_bos": False, "verbose": False}
    with TemporaryDirectory() as folder:
        train_cells(model, [scale.cell], folder, scale.trained, text=text, **options)


def _timed(run: Callable[[], object], device: str, repeats: int) -> tuple[float, float | None]:
    """Seconds of the quickest run, and the rise of the device's peak in GiB (None: no such device)."""
    on_cuda, times = device.startswith("cuda"), []
    before = 0
    if on_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        if on_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times), (torch.cuda.max_memory_allocated() - before) / 2**30 if on_cuda else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table on stdout, what is under way on stderr."""
    parser = argparse.ArgumentParser(description="Checks and timings on a GPU.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--small", action="store_true", help="a small model and few tokens, to try the script"
    )
    parser.add_argument("--budget", type=float, default=420, help="seconds after which no part is started")
    given = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    start, scale = time.monotonic(), SMALL if given.small else FULL
    found = [package for name, package in _PACKAGES.items() if importlib.util.find_spec(name)]
    missing = [package for package in _PACKAGES.values() if package not in found]
    machine = torch.cuda.get_device_name(given.device) if given.device.startswith("cuda") else given.device
    print(
        f"{machine}, torch {torch.__version__}, transformers {transformers.__version__}; fast kernels of "
        f"transformers: {', '.join(found) or 'none'}; not installed: {', '.join(missing) or 'none'}\n\n"
        "| operation | dtype | seconds | peak, GiB | |\n|---|---|---|---|---|",
        flush=True,
    )
    parts: dict[str, Callable[[], Iterator[Row]]] = {"checks": lambda: checks(scale, given.device)}
    for dtype in (torch.float32, torch.bfloat16):
        parts[f"timings in {dtype}"] = lambda dtype=dtype: timings(scale, given.device, dtype)
    for name, part in parts.items():
        rows, passed = part(), time.monotonic() - start
        while passed < given.budget and (row := next(rows, None)) is not None:
            print(row.line(), flush=True)
            passed = time.monotonic() - start
            print(f"{passed:6.0f} s  {name}", file=sys.stderr, flush=True)
        if passed >= given.budget:
            print(f"| left out: the rest of the {name}, after {given.budget:.0f} s | | | | |", flush=True)


if __name__ == "__main__":
    main()
