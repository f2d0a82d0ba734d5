"""Memory over a long training and many experiments: ``python -m tests.benchmarks.endurance``.

Prints the resident memory of the process every so often, then its slope: MiB per 10 minutes of training, and
MiB per 100 calls of the replacement test, each by least squares over all but the first fifth, where caches
and allocators fill.
"""

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sae_lens import SAE

from hooked_models import HookedRecurrent, zoo
from writesae_lens import WriteTrainingSAE
from writesae_lens.experiments import replacement_test
from writesae_lens.saelens import upstream
from writesae_lens.saelens.runner import train_cells

Samples = list[tuple[float, float]]  # (minutes or calls, MiB)


def resident() -> float:
    """Resident memory of this process, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def report(what: str, samples: Samples, per: float, unit: str) -> None:
    """Print how memory went and its slope per ``per`` of the samples' unit."""
    settled = np.array(samples[len(samples) // 5 :])
    slope = np.polyfit(settled[:, 0], settled[:, 1], 1)[0] * per
    print(
        f"{what}: {settled[0, 1]:,.0f} MiB after a fifth, {settled[-1, 1]:,.0f} at the end, highest "
        f"{settled[:, 1].max():,.0f}; slope {slope:+.2f} MiB per {per:g} {unit}",
        flush=True,
    )


class TimeIsUp(Exception):
    """Ends the training; SAELens's runner has no limit of time."""


def train(model: HookedRecurrent, minutes: float) -> None:
    """Train a WriteSAE for so many minutes through the runner that users call."""
    samples: Samples = []
    start = time.monotonic()

    def sampled(step: Callable[..., object], *args: object, **kwargs: object) -> object:
        passed = (time.monotonic() - start) / 60
        if not samples or passed - samples[-1][0] > minutes / 200:
            samples.append((passed, resident()))
        if passed > minutes:
            raise TimeIsUp
        return step(*args, **kwargs)

    upstream.wrap_on(WriteTrainingSAE, "training_forward_pass", sampled)
    with tempfile.TemporaryDirectory() as folder:
        try:
            train_cells(model, [zoo.DEFAULT_CELLS["tiny-gdn"]], folder, training_tokens=10**9)
        except TimeIsUp:
            report(f"training, {minutes:g} minutes", samples, 10, "minutes")


def replace(model: HookedRecurrent, calls: int) -> None:
    """Run the replacement test so many times on one model and SAE."""
    samples: Samples = []
    with tempfile.TemporaryDirectory() as folder:
        (path,) = train_cells(model, [zoo.DEFAULT_CELLS["tiny-gdn"]], folder, training_tokens=50_000)
        sae = SAE.load_from_disk(path)
    tokens = model.to_tokens(zoo.held_out_text()[-20_000:], prepend_bos=False)[:, : 2 * 256].view(2, 256)
    for call in range(calls):
        replacement_test(model, sae, tokens, max_firings=64, seed=call, verbose=False)
        samples.append((call, resident()))
    report(f"{calls:,} replacement tests", samples, 100, "calls")


def main() -> None:
    """Run both, and print a line for each."""
    parser = argparse.ArgumentParser(description="Memory over a long training and many experiments.")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--calls", type=int, default=1000)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    model = HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")
    replace(model, options.calls)
    train(model, options.minutes)


if __name__ == "__main__":
    main()
