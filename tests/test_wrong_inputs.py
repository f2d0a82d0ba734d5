"""What wrong input gets: one line that names what was found and what to give instead.

A table of cases, each a call that a user may well make. They run without the tests' type checks, which users
do not have either.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jaxtyping
import numpy as np
import pytest
import torch
from sae_lens import (
    SAE,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    TopKSAE,
    TopKSAEConfig,
)

from hooked_models import HookedModelError, HookedRecurrent, zoo
from writesae_lens import WriteSAE, WriteSAEConfig, WriteSAETrainingConfig, baselines
from writesae_lens.experiments import EXPERIMENTS, ExperimentResult
from writesae_lens.experiments.passages import as_passages
from writesae_lens.published import sharing
from writesae_lens.reproduce import estimate, reproduce

LAYER, HEAD, D_K, D_V, D_SAE = 1, 2, 32, 48, 64
WRITE = "blocks.1.linear_attn.hook_write.2"
BOOT = HookedRecurrent.boot_transformers


@pytest.fixture(scope="module", autouse=True)
def unchecked() -> Iterator[None]:
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


class Given(NamedTuple):
    """What right calls are made with."""

    model: HookedRecurrent
    sae: WriteSAE
    tokens: torch.Tensor
    folder: Path
    file: Path
    llama: Path

    def another(self, **changes: Any) -> WriteSAE:
        """An SAE that is wrong in one way."""
        return make_sae(**changes)

    def hooked(self, function: Any, name: Any = WRITE) -> Any:
        return self.model.run_with_hooks(self.tokens, fwd_hooks=[(name, function)])


def make_sae(hook: Any = WRITE, model_name: Any = "tiny-gdn", **options: Any) -> WriteSAE:
    torch.manual_seed(0)
    sae = WriteSAE(WriteSAEConfig(**({"d_k": D_K, "d_v": D_V, "d_sae": D_SAE, "k": 4} | options)))
    sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name = hook, model_name
    return sae


@pytest.fixture(scope="module")
def given(tmp_path_factory, llama_folder) -> Given:
    model, folder = BOOT("tiny-gdn", device="cpu"), tmp_path_factory.mktemp("wrong")
    ids = model.to_tokens(zoo.held_out_text()[:500], prepend_bos=False, truncate=False)[0, :48]
    (folder / "file").write_text("text")
    return Given(model, make_sae(), ids.view(2, 24), folder, folder / "file", llama_folder)


class Case(NamedTuple):
    name: str
    call: Callable[[Given], Any]
    words: tuple[str, ...]
    error: type[Exception] | tuple[type[Exception], ...] = HookedModelError


# Models.

NAMES = ("tiny-gdn", "tiny-mamba2", "tiny-rwkv7")
VALID = ("this model has layer 0: heads 0-3", "layer 1: heads 0-3", "layer 3: heads 0-3")
RETURN = (WRITE, "returned", "expected (2, 24, 1536)", "return a tensor of that shape")


def copied(given: Given, **changes: Any) -> str:
    """A shipped model's folder with some files changed (None: left out)."""
    folder = given.folder / f"copy {len(list(given.folder.iterdir()))}"
    folder.mkdir()
    for file in zoo.model_path("tiny-gdn").iterdir():
        content = changes.get(file.stem, file.read_bytes())
        if content is not None:
            (folder / file.name).write_bytes(content)
    return str(folder)


MODELS = [
    Case("no such model", lambda g: BOOT("gpt-recurrent"), ("'gpt-recurrent'", *NAMES)),
    Case("nearly a name", lambda g: BOOT("tiny_gdn"), ("'tiny_gdn'", *NAMES)),
    Case("no name", lambda g: BOOT(None), ("not NoneType", "give a hub id", *NAMES)),
    Case("no such path", lambda g: BOOT("/no/model"), ("'/no/model'", "not a folder")),
    Case("relative path", lambda g: BOOT("my/model"), ("my/model", "no folder here, so taken for a hub id")),
    Case("empty folder", lambda g: BOOT(given_empty(g)), ("folder without config.json", "give a folder")),
    Case(
        "file of a folder", lambda g: BOOT(copied(g) + "/model.safetensors"), ("one file", "give its folder")
    ),
    Case("cut weights", lambda g: BOOT(copied(g, model=b"12345")), ("truncated or damaged", "copy")),
    Case("no weights", lambda g: BOOT(copied(g, model=None)), ("no file named model.safetensors",)),
    Case("broken config", lambda g: BOOT(copied(g, config=b"{")), ("could not read", "not a valid JSON")),
    Case("no recurrent layers", lambda g: BOOT(g.llama), ("LlamaForCausalLM", "mamba2", "use Transformer")),
    Case("device", lambda g: BOOT("tiny-gdn", device="gpu"), ("device 'gpu'", "try 'cpu'")),
    Case("dtype by nickname", lambda g: BOOT("tiny-gdn", dtype="bf16"), ("'bf16'", "give float32, bfloat16")),
    Case("dtype of numpy", lambda g: BOOT("tiny-gdn", dtype=np.float32), ("numpy.float32", "give float32")),
    Case("whole dtype", lambda g: BOOT("tiny-gdn", dtype=torch.int64), ("torch.int64", "give float32")),
    Case("unknown option", lambda g: BOOT("tiny-gdn", devise="cpu"), ("takes no argument", "'devise'")),
    Case("layer", lambda g: g.model.write_hook_name(9, 0), ("layer 9, head 0", *VALID)),
    Case("attention layer", lambda g: g.model.state_hook_name(2, 0), ("layer 2", *VALID)),
    Case("head", lambda g: g.model.cell(1, 4), ("head 4", *VALID)),
    Case("cell of texts", lambda g: g.model.cell("1", "2"), ("whole numbers", "got '1' and '2'")),
    Case("cell of floats", lambda g: g.model.write_hook_name(1.0, 2.0), ("whole numbers", "1.0 and 2.0")),
    Case("site", lambda g: g.model.site("blocks.1.hook_out"), ("'blocks.1.hook_out'", "one looks like")),
    Case("site of a number", lambda g: g.model.site(3), ("3 is not the hook", "hook_write.0")),
    Case("site's head", lambda g: g.model.site(f"{WRITE}2"), ("head 22", *VALID)),
    Case("hook name", lambda g: g.hooked(None, "hook_write.2"), ("'hook_write.2'",)),
    Case("hook's head", lambda g: g.hooked(None, f"{WRITE}2"), (f"{WRITE}2", f"did you mean {WRITE}")),
    Case("hook name a number", lambda g: g.hooked(None, 3), ("got 3", "model.write_hook_name(layer, head)")),
    Case("filter of nothing", lambda g: g.hooked(None, lambda n: n == "no"), ("true of no hook point",)),
    Case("cache of nothing", lambda g: g.model.run_with_cache(g.tokens, names_filter="no"), ("'no'",)),
    Case(
        "cache by a filter of nothing",
        lambda g: g.model.run_with_cache(g.tokens, names_filter=lambda n: False),
        ("true of no hook point", "model.hook_dict"),
    ),
    Case("cache by numbers", lambda g: g.model.run_with_cache(g.tokens, names_filter=[3]), ("text, got 3",)),
    Case(
        "hooks that are one",
        lambda g: g.model.run_with_hooks(g.tokens, fwd_hooks=(WRITE, print)),
        ("list of (name, function)", WRITE, "write fwd_hooks=[(name, function)]"),
    ),
    Case("add_hook", lambda g: g.model.add_hook(f"{WRITE}2", print), (f"{WRITE}2", f"did you mean {WRITE}")),
    Case("shape", lambda g: g.hooked(lambda w, hook: w[..., :-1]), ("shape (2, 24, 1535)", *RETURN)),
    Case("position", lambda g: g.hooked(lambda w, hook: w[:, :1]), ("shape (2, 1, 1536)", *RETURN)),
    Case("matrices", lambda g: g.hooked(lambda w, hook: w.unflatten(-1, (32, 48))), ("32, 48)", *RETURN)),
    Case("numpy", lambda g: g.hooked(lambda w, hook: w.numpy(force=True)), ("a ndarray", *RETURN)),
    Case("number", lambda g: g.hooked(lambda w, hook: 0.0), ("a float", *RETURN)),
    Case("pair", lambda g: g.hooked(lambda w, hook: (w, w)), ("a tuple", *RETURN)),
    Case(
        "layer's input",
        lambda g: g.hooked(lambda x, hook: x[:, :1], "blocks.1.linear_attn.hook_in"),
        ("blocks.1.linear_attn.hook_in", "returned shape (2, 1, 128), expected (2, 24, 128)"),
    ),
    Case("edit", lambda g: g.model(g.tokens, edit=3), ("edit must be SwappedWrites or", "got a int")),
    Case("no tokens", lambda g: g.model(""), ("no tokens to read", "give one at least")),
    Case("cache", lambda g: g.model(g.tokens, past_key_values=3), ("this int", "model.new_cache()")),
    Case(
        "swapped writes",
        lambda g: g.model.run_with_swapped_writes(
            g.tokens[0], 1, 2, torch.zeros(1).long(), torch.zeros(32), torch.zeros(48)
        ),
        ("(1, 1, 32) and (1, 1, 48)", "got (32,) and (48,)"),
    ),
]


def given_empty(given: Given) -> Path:
    (given.folder / "empty").mkdir(exist_ok=True)
    return given.folder / "empty"


# SAEs.

FOR_SAE = HookedRecurrent.for_sae
WANTED = ("an SAE is wanted", "SAE.load_from_disk")
NAMELESS = ("does not say", "set sae.cfg.metadata.hook_name")


def config(**options: Any) -> WriteSAETrainingConfig:
    return WriteSAETrainingConfig(**({"d_k": D_K, "d_v": D_V, "d_sae": D_SAE, "k": 4} | options))


def run_with(given: Given, sae: Any) -> Any:
    return given.model.run_with_saes(given.tokens, saes=[sae])


def saved(given: Given, weights: bytes | None = None, **changes: Any) -> Path:
    """An SAE's folder with other weights, or other settings in its configuration."""
    folder = given.folder / f"saved {len(list(given.folder.iterdir()))}"
    given.sae.save_model(folder)
    if weights is not None:
        (folder / "sae_weights.safetensors").write_bytes(weights)
    settings = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(settings | changes))
    return folder


def checkpoint(given: Given, held: Any) -> Path:
    path = given.folder / f"checkpoint {len(list(given.folder.iterdir()))}.pt"
    torch.save(held, path)
    return path


NUMBERS = ("aux_loss_coefficient", "write_alignment_coefficient", "dominant_share", "jumprelu_bandwidth")
COUNTS = ("k_aux", "renormalize_every", "resample_every", "l0_warm_up_steps")
LOAD, CHECKPOINT, PRETRAINED = SAE.load_from_disk, WriteSAE.from_checkpoint, SAE.from_pretrained
QWEN = "writesae-qwen3.5-0.8b"
SAES = [
    Case("k above d_sae", lambda g: config(k=65), ("k=65", "d_sae=64", "give 1 <= k <= d_sae")),
    Case("k 0", lambda g: config(k=0), ("k=0", "give 1 <= k <= d_sae")),
    Case("k a text", lambda g: config(k="4"), ("k must be a whole number, got '4'",)),
    Case("k a float", lambda g: config(k=4.0), ("k must be a whole number, got 4.0",)),
    Case("d_k 0", lambda g: config(d_k=0), ("must be positive", "d_k=0")),
    Case("encoder", lambda g: config(encoder="linear"), ("'linear'", "choose bilinear, tied, dense")),
    Case("decoder", lambda g: config(decoder="flat"), ("'flat'", "choose factored, dense")),
    Case("activation", lambda g: config(activation="relu"), ("'relu'", "choose topk, batchtopk")),
    Case("no d_v", lambda g: WriteSAETrainingConfig(d_k=3, d_sae=4), ("missing", "'d_v'"), TypeError),
    Case("unknown setting", lambda g: config(dk=3), ("unexpected", "'dk'"), TypeError),
    Case("bias a text", lambda g: config(encoder_bias="False"), ("encoder_bias must be True or", "'False'")),
    *(
        Case(f"{name} {x!r}", lambda g, n=name, x=x: config(**{n: x}), (f"{name} must be a finite", f"{x!r}"))
        for name in NUMBERS
        for x in ("0.5", None, float("inf"))
    ),
    *(
        Case(f"{name} {x!r}", lambda g, n=name, x=x: config(**{n: x}), (f"{name} must be a whole", f"{x!r}"))
        for name in COUNTS
        for x in ("10", 2.5)
    ),
    *(
        Case(f"{name} -1", lambda g, n=name: config(**{n: -1}), (f"{name} must not be negative",))
        for name in (*NUMBERS, *COUNTS)
    ),
    Case(
        "input's width", lambda g: g.sae.encode(torch.zeros(2, 99)), ("32 x 48", "last axis 1536", "(2, 99)")
    ),
    Case(
        "matrices to encode", lambda g: g.sae.encode(torch.zeros(2, 32, 48)), ("flat 32 x 48", "(2, 32, 48)")
    ),
    Case("numpy to encode", lambda g: g.sae.encode(np.zeros((2, 1536))), ("expected a tensor", "ndarray")),
    Case("number to encode", lambda g: g.sae.encode(torch.tensor(1.0)), ("last axis 1536", "shape ()")),
    Case("another's acts", lambda g: g.sae.decode(torch.zeros(2, 99)), ("of 64 atoms", "shape (2, 99)")),
    Case("dense factors", lambda g: make_sae(decoder="dense").decoder_factors(), ("no factors", "use W_dec")),
    Case("for_sae of a path", lambda g: FOR_SAE("my_sae"), ("got a str", *WANTED)),
    Case("for_sae of None", lambda g: FOR_SAE(None), ("got a NoneType", *WANTED)),
    Case("for_sae of a model", lambda g: FOR_SAE(g.model), ("got a HookedRecurrent", *WANTED)),
    Case("for_sae without hook", lambda g: FOR_SAE(g.another(hook=None)), NAMELESS),
    Case(
        "for_sae, wrong hook", lambda g: FOR_SAE(g.another(hook=f"{WRITE}2")), (f"{WRITE}2", "did you mean")
    ),
    Case("for_sae, wrong sides", lambda g: FOR_SAE(g.another(d_k=48, d_v=32)), ("48 x 32", "32 x 48")),
    Case("for_sae, wrong model", lambda g: FOR_SAE(g.another(model_name="gdn")), ("'gdn'", *NAMES)),
    Case("run with, no hook", lambda g: run_with(g, g.another(hook=None)), NAMELESS),
    Case("run with, wrong hook", lambda g: run_with(g, g.another(hook="no")), ("'no'",)),
    Case("run with, wrong sides", lambda g: run_with(g, g.another(d_k=16)), ("16 x 48", "32 x 48 = 1536")),
    Case("add_sae None", lambda g: g.model.add_sae(None), ("got a NoneType", *WANTED)),
    Case("load nothing", lambda g: LOAD(g.folder / "no"), ("No such file", "cfg.json"), OSError),
    Case(
        "load cut weights",
        lambda g: LOAD(saved(g, b"12345")),
        ("truncated or damaged",),
    ),
    Case("load other sizes", lambda g: LOAD(saved(g, d_v=40)), ("not those of the config", "dec_value")),
    Case("load k above d_sae", lambda g: LOAD(saved(g, k=99)), ("k=99", "d_sae=64")),
    Case("no checkpoint", lambda g: CHECKPOINT("no.pt"), ("no.pt does not exist", "give a checkpoint")),
    Case("checkpoint, empty folder", lambda g: CHECKPOINT(given_empty(g)), ("no best.pt", "give the folder")),
    Case("checkpoint of SAELens", lambda g: CHECKPOINT(saved(g)), ("SAELens's form", "SAE.load_from_disk")),
    Case("checkpoint of text", lambda g: CHECKPOINT(g.file), ("file", "no PyTorch file of tensors")),
    Case("checkpoint of a list", lambda g: CHECKPOINT(checkpoint(g, [1])), ("a list", "a dict of tensors")),
    Case(
        "checkpoint of a model",
        lambda g: CHECKPOINT(checkpoint(g, {"embed": torch.zeros(2, 2)})),
        ("embed", "of no known type"),
    ),
    Case("checkpoint's layer", lambda g: CHECKPOINT(g.file, layer="9"), ("layer must be a whole", "'9'")),
    Case("release", lambda g: PRETRAINED("no", "L9_H4"), ("Release no not found",), ValueError),
    Case("id", lambda g: PRETRAINED(QWEN, "L99_H4"), ("L99_H4", "Valid IDs", "L9_H4"), ValueError),
    Case("hub out of reach", lambda g: PRETRAINED(QWEN, "L9_H4"), ("check your connection",), OSError),
]


# SAELens's runner.


def train(given: Given, sae: Any = None, rows: Any = None, **options: Any) -> Any:
    folder = given.folder / f"data {len(list(given.folder.iterdir()))}"
    folder.mkdir()
    rows = [{"text": zoo.held_out_text()[:2000]}] * 10 if rows is None else rows
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "sae": sae or config(),
        "model_class_name": "HookedRecurrent",
        "model_name": "tiny-gdn",
        "hook_name": WRITE,
        "dataset_path": str(folder),
        "context_size": 64,
        "prepend_bos": False,
        "training_tokens": 512,
        "train_batch_size_tokens": 256,
        "store_batch_size_prompts": 2,
        "n_batches_in_buffer": 4,
        "device": "cpu",
        "checkpoint_path": None,
        "output_path": None,
        "logger": LoggingConfig(log_to_wandb=False),
    }
    return LanguageModelSAETrainingRunner(LanguageModelSAERunnerConfig(**(settings | options))).run()


STATE = WRITE.replace("write", "state")
SET = ("gives 32 x 48", "set d_k=32, d_v=48")
RUNNER = [
    Case("runner's hook", lambda g: train(g, hook_name=f"{WRITE}2"), (f"{WRITE}2", f"did you mean {WRITE}")),
    Case("runner without hook", lambda g: train(g, hook_name=None), ("got None", "model.write_hook_name")),
    Case("runner's model", lambda g: train(g, model_name="tiny_gdn"), ("'tiny_gdn'", *NAMES)),
    Case("runner's d_k", lambda g: train(g, config(d_k=16)), ("16 x 48", *SET)),
    Case("sides swapped", lambda g: train(g, config(d_k=48, d_v=32)), ("48 x 32", *SET)),
    Case("states' d_k", lambda g: train(g, config(d_k=16), hook_name=STATE), ("16 x 48", *SET)),
    Case("states transposed", lambda g: train(g, config(d_k=48, d_v=32), hook_name=STATE), ("48 x 32", *SET)),
    Case(
        "no text column",
        lambda g: train(g, rows=[{"body": "a"}] * 9),
        ("has columns body", "needs one of text"),
        ValueError,
    ),
    Case("short text", lambda g: train(g, rows=[{"text": "a"}]), ("too small",), ValueError),
    Case("long context", lambda g: train(g, context_size=10**5), ("too small",), ValueError),
    Case(
        "negative context", lambda g: train(g, context_size=-3), ("-3", "positive context_size"), ValueError
    ),
]


# Experiments: what all of them refuse is in their contract (tests/writesae_lens/experiments/contract.py).

FIRST = ("the first argument must be a HookedRecurrent", "HookedRecurrent.boot_transformers(name)")
LIST, CHOOSE = ("must be a list or tuple", "put it into brackets"), ("is unknown", "choose")


def call(given: Given, experiment: str, sae: Any = "", **options: Any) -> Any:
    """An experiment with right arguments but those given."""
    sae = given.sae if isinstance(sae, str) and not sae else sae
    return EXPERIMENTS[experiment].function(given.model, sae, given.tokens, verbose=False, **options)


TWO = " many words"
OTHERS = [
    *(
        Case(
            f"atom {atom!r}", lambda g, a=atom: call(g, "erase", atom=a), ("does not exist", "atoms 0 to 63")
        )
        for atom in (64, "3", 1.5)
    ),
    Case("long horizon", lambda g: call(g, "formula", max_horizon=99), ("24 tokens", "give longer ones")),
    Case("token above", lambda g: call(g, "erase", token=10**6), ("token 1000000", "0 to 2047")),
    Case("token of many", lambda g: call(g, "erase", token=TWO), (TWO, "not one token", "a space")),
    Case("half a token", lambda g: call(g, "erase", token=1.5), ("an id or the text of one", "1.5")),
    Case("target of many", lambda g: call(g, "install", targets=[TWO]), (TWO, "not one token")),
    Case("a target alone", lambda g: call(g, "install", targets=1.5), LIST),
    Case("half a target", lambda g: call(g, "install", targets=[1.5]), ("an id or the text", "1.5")),
    Case("no target", lambda g: call(g, "install", targets=[None]), ("an id or the text", "None")),
    Case("no model to cut text with", lambda g: as_passages(None, "text"), ("got None", *FIRST)),
    Case("no such cell", lambda g: call(g, "sign", sae=(2, 0)), ("layer 2, head 0", *VALID)),
    Case(
        "three numbers",
        lambda g: call(g, "sign", sae=(1, 2, 3)),
        ("(layer, head) is wanted", "(1, 2, 3)"),
    ),
    Case("hook for a cell", lambda g: call(g, "sign", sae=WRITE), ("(layer, head) is wanted", WRITE)),
    Case(
        "another model's cell",
        lambda g: call(g, "sign", sae=BOOT("tiny-mamba2", device="cpu").cell(1, 2)),
        ("mamba2", "another model's", "here it is"),
    ),
    Case("no SAEs", lambda g: call(g, "compare", sae={}), ("no SAEs", "give one at least")),
    Case("nameless SAEs", lambda g: call(g, "compare", sae=[g.sae]), ("a dict", "a list")),
    Case("one SAE", lambda g: call(g, "compare"), ("a dict", "a WriteSAE")),
    Case("nothing spliced", lambda g: call(g, "splice", sae=[]), ("give one at least",)),
    Case("None spliced", lambda g: call(g, "splice", sae=None), ("saes must be a list",)),
    Case("spliced twice", lambda g: call(g, "splice", sae=[g.sae] * 2), ("on one cell",)),
    Case("results in a file", lambda g: result(g).save(g.file), ("file",), (OSError, ValueError)),
    Case("flat_svd of ours", lambda g: baselines.flat_svd(g.sae), ("whose encoder and decoder are dense",)),
    Case("flat_svd, no sides", lambda g: baselines.flat_svd(flat()), ("rows of 1536", "give d_k and d_v")),
    Case("flat_svd, texts", lambda g: baselines.flat_svd(flat(), "32", "48"), ("d_k='32'", "whole number")),
    Case("flat_svd of None", lambda g: baselines.flat_svd(None), ("got None", *WANTED)),
    Case(
        "component of no model", lambda g: baselines.principal_component("m", 1, 2, g.tokens), ("'m'", *FIRST)
    ),
    Case(
        "component, seed",
        lambda g: baselines.principal_component(g.model, 1, 2, "x", seed="a"),
        ("seed='a'",),
    ),
    Case(
        "matched encoder", lambda g: baselines.matched_d_sae(config(), "x", "dense"), ("encoder='x'", *CHOOSE)
    ),
    Case(
        "matched decoder", lambda g: baselines.matched_d_sae(config(), "dense", "x"), ("decoder='x'", *CHOOSE)
    ),
    Case("push nothing", lambda g: sharing.push(None, "me/mine"), ("got None", *WANTED)),
    Case("push, bad name", lambda g: sharing.push(g.sae, "no / name"), ("no / name", "check the names")),
    Case("push, bad id", lambda g: sharing.push(g.sae, "me/mine", "../x"), ("'../x'", "such as L9_H4")),
    Case("push, no results", lambda g: sharing.push(g.sae, "me/mine", results=g.file), ("not what a repl",)),
    Case("no such run", lambda g: reproduce("qwen", g.folder), ("'qwen'", "mamba2-370m-L24H0")),
    Case("no such recipe", lambda g: again(g, recipe="papers"), ("recipe='papers'", "recommended or paper")),
    Case(
        "no such experiment", lambda g: again(g, experiments=("replac",)), ("replac", "replace, population")
    ),
    Case("experiments a text", lambda g: again(g, experiments="replace"), ("experiments", *LIST)),
    Case("no training", lambda g: again(g, training_tokens=0), ("training_tokens=0", "give 1 or more")),
    Case("run's seed", lambda g: again(g, seed=-1), ("seed=-1", "give 0 to 4294967295")),
    Case("estimate's dtype", lambda g: estimate("mamba2-370m-L24H0", dtype="bf16"), ("'bf16'", "bfloat16")),
]


def flat() -> TopKSAE:
    return TopKSAE(TopKSAEConfig(d_in=D_K * D_V, d_sae=8, k=2))


def result(given: Given) -> ExperimentResult:
    return call(given, "replace", max_firings=2)


def again(given: Given, **options: Any) -> Any:
    return reproduce("mamba2-370m-L24H0", given.folder / "run", "tiny-gdn", **options)


CASES = [*MODELS, *SAES, *RUNNER, *OTHERS]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_wrong_input_is_told_what_is_wrong_and_what_to_give(case, given):
    with pytest.raises(case.error) as caught:
        case.call(given)
    message = str(caught.value)
    assert not [word for word in case.words if word not in message], message
    if isinstance(caught.value, HookedModelError):
        assert message.isprintable()


def test_numbers_of_numpy_are_numbers(given):
    assert given.model.cell(np.int64(LAYER), np.int64(HEAD)).head == HEAD
    atom = result(given).records.atom[0]
    for name, wanted in (("erase", {"max_firings": 2}), ("amplify", {"n_tokens": 2})):
        assert json.dumps(call(given, name, atom=atom, **wanted).summary)
    token = given.tokens[0, 3]
    found = call(given, "install", targets=[token], n_refinements=0, n_tokens=2, magnitude=np.float64(2))
    assert set(found.records.target) == {int(token)}


def test_a_refused_hook_leaves_none_behind(given):
    def half(write, hook):
        return write[:, :1]

    with pytest.raises(HookedModelError, match="returned shape"):
        given.hooked(half)
    assert not [name for name, point in given.model.hook_dict.items() if point.fwd_hooks]
