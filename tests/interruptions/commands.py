"""Small runs of the commands that write much: a tiny model, a tiny SAE, a few tokens."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from hooked_models import HookedModelError, HookedRecurrent, zoo
from tests.interruptions.harness import contents
from tests.writesae_lens.cli.command_line import run
from writesae_lens import WriteSAE, WriteSAEConfig, WriteSAETrainingConfig, demo
from writesae_lens.experiments import stand_ins
from writesae_lens.experiments.catalogue import EXPERIMENTS
from writesae_lens.report import page
from writesae_lens.reproduce import run as run_of_the_paper

SIZES = (
    *("--d_sae", 24, "--k", 2, "--lr", 4e-3, "--context_size", 32, "--training_tokens", 2048),
    *("--train_batch_size_tokens", 512, "--n_batches_in_buffer", 64, "--store_batch_size_prompts", 16),
)
FEW = ("--max-passages", 2, "--context-size", 16)
TRAIN = (
    "train",
    "--model_name",
    "tiny-gdn",
    *SIZES,
    "--output_path",
    "{root}/out",
    "--checkpoint_path",
    "{root}/ck",
    "--n_checkpoints",
    1,
)
REPRODUCE = ("reproduce", "--config", "mamba2-370m-L24H0", "--model", "tiny-gdn", "--training-tokens", 10_000)
COMMANDS = {
    "train": (*TRAIN, "--cells", "1:2", "--seed"),
    "train several": (*TRAIN, "--cells", "1:2,1:3", "--seed"),
    "replace": ("replace", "--sae", "{sae}", *FEW, "--max-firings", 4, "--out", "{root}/out", "--seed"),
    "reproduce": (*REPRODUCE, "--experiments", "sign,replace", "--out", "{root}/out", "--seed"),
    "report": ("report", "--sae", "{sae}", *FEW, "--out", "{root}/out", "--seed"),
    "demo": ("demo", "--training-tokens", 10_000, "--d-sae", 24, "--out", "{root}/out", "--seed"),
}


def work(name: str, root: Path, sae: Path, seed: int = 0) -> Callable[[], None]:
    """A command as a function that raises what the command line answers with."""
    arguments = [str(x).format(root=root, sae=sae) for x in (*COMMANDS[name], seed)]

    def call() -> None:
        done = run(*arguments)
        if done.returncode:
            assert "Traceback" not in done.stderr, done.stderr
            raise HookedModelError(done.stderr.strip().splitlines()[-1])

    return call


def make_small(patch: pytest.MonkeyPatch) -> None:
    """Load each model once, read little text, and run experiments on two short passages."""
    boot = functools.cache(HookedRecurrent.boot_transformers)
    boot("tiny-gdn", device="cpu")
    patch.setattr(
        HookedRecurrent,
        "boot_transformers",
        lambda name, device="cpu", dtype="float32", **kwargs: boot(name, device="cpu"),
    )
    training, testing = zoo.shipped_text()
    short = ([text[:2000] for text in training[:20]], [text[:2000] for text in testing[:2]])
    patch.setattr(zoo, "shipped_text", lambda: short)
    patch.setattr(stand_ins, "_LEAST_WRITES", 64)
    patch.setattr(demo, "TEST_PASSAGES", 2)
    patch.setattr(demo, "MAX_FIRINGS", 8)
    patch.setitem(run_of_the_paper.OPTIONS, "replace", {"horizon": 4, "max_firings": 8})
    recommended = WriteSAETrainingConfig.recommended.__func__  # type: ignore[attr-defined]

    def small(cls: type, **options: object) -> WriteSAETrainingConfig:
        return recommended(cls, **({"d_sae": 24, "k": 2} | options))

    patch.setattr(WriteSAETrainingConfig, "recommended", classmethod(small))
    patch.setattr(Figure, "savefig", _save_outline)
    patch.setattr(page, "get_plotlyjs", lambda: "")
    for name, entry in EXPERIMENTS.items():
        patch.setitem(EXPERIMENTS, name, dataclasses.replace(entry, max_passages=2, context_size=32))


def _save_outline(figure: Figure, file: Path | io.BytesIO, **how: object) -> None:
    """In place of drawing, which takes most of the time: a file of the figure's lines."""
    lines = b"".join(line.get_xydata().tobytes() for axis in figure.axes for line in axis.lines)
    content = b"PNG" + hashlib.sha256(lines).digest()
    if isinstance(file, Path):
        file.write_bytes(content)
    else:
        file.write(content)


def make_sae(folder: Path) -> Path:
    """An untrained SAE on a cell of tiny-gdn."""
    torch.manual_seed(0)
    model = HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")
    cell = model.cell(1, 2)
    sae = WriteSAE(WriteSAEConfig(d_k=cell.d_k, d_v=cell.d_v, d_sae=24, k=2))
    metadata = sae.cfg.metadata
    metadata.model_name, metadata.hook_name = "tiny-gdn", model.write_hook_name(1, 2)
    metadata.context_size = 16
    sae.save_model(folder)
    return folder


# What differs between two runs on purpose: the date in results and pages, the seconds of an experiment, and
# the name that SAELens draws for a run's folder of checkpoints.
_DATE = re.compile(rb"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?([+-]\d\d:\d\d|Z)?(\.\d+)?( UTC)?")
_RUN = re.compile(rb"/ck/\w{8}")


def comparable(out: Path) -> dict[str, bytes]:
    """The files of an output folder, without what differs between two runs on purpose."""
    files = {}
    for name, content in contents(out).items():
        content = _RUN.sub(b"/ck/RUN", _DATE.sub(b"DATE", content))
        if name == "table.csv":
            content = b"\n".join(line.rpartition(b",")[0] for line in content.splitlines())
        if name == "table.md":
            content = b"\n".join(
                line.rstrip(b"| ").rpartition(b"|")[0] or line for line in content.splitlines()
            )
        if name.endswith("summary.json"):
            summary = json.loads(content)
            summary.pop("date", None)
            content = json.dumps(summary).encode()
        files[name] = content
    return files
