"""Run every benchmark on one thread and print one table: ``make bench``."""

import os

# Threads that share a core swing timings by an order of magnitude; set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import platform
import warnings

import torch
import transformers

from tests.benchmarks import bench_experiments, bench_hooks, bench_replacement, bench_runner, bench_sae

warnings.filterwarnings("ignore")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)

print(f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} thread\n")
print("| what | against | ratio | wanted | ours | theirs |")
print("|---|---|---|---|---|---|")
for module in (bench_hooks, bench_sae, bench_runner, bench_replacement, bench_experiments):
    for row in module.rows():
        print(
            f"| {row.what} | {row.against} | {row.ratio} | {row.wanted} | {row.ours} | {row.theirs} |",
            flush=True,
        )
