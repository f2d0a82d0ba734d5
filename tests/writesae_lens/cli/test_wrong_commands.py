# ruff: noqa: E501
"""What the command line answers to a clumsy user: one line that names what is wrong, and status 2."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.writesae_lens.cli.command_line import run
from writesae_lens import WriteSAE, WriteSAEConfig
from writesae_lens.experiments.catalogue import EXPERIMENTS, OF_MODELS

HOOK = "blocks.1.linear_attn.hook_write.2"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Files and folders that are wrong in one way each, by name; SAE is right."""
    root = tmp_path_factory.mktemp("wrong")
    torch.manual_seed(0)
    sae = WriteSAE(WriteSAEConfig(d_k=32, d_v=48, d_sae=16, k=2))
    metadata = sae.cfg.metadata
    metadata.model_name, metadata.hook_name, metadata.context_size = "tiny-gdn", HOOK, 32
    sae.save_model(root / "SAE")
    (root / "EMPTY").mkdir()
    (root / "FILE").write_text("x")
    (root / "SHORT").write_text("far too short")
    (root / "BINARY").write_bytes(b"\xff\xfe\x00")
    (root / "NOTHING").write_text("")
    (root / "NUL").write_text("It is a truth\0 universally acknowledged " * 20)
    (root / "LONE").write_bytes(b"It is a truth \xed\xa0\x80 universally acknowledged " * 20)
    (root / "UTF16").write_text("It is a truth universally acknowledged " * 20, encoding="utf-16")
    no_cell = {"sae_type": "bilinear", "n_features": 4, "d_k": 32, "d_v": 48, "k": 2, "rank": 1}
    for name, config in (("BARE", no_cell), ("BARE_9", no_cell | {"layer": 9, "head": 0})):
        shapes = {"V_enc": (4, 1, 32), "W_enc": (4, 1, 48), "b_enc": (4,), "bias": (32, 48)}
        tensors = {n: torch.ones(s) for n, s in (shapes | {"V_dec": (4, 1, 32), "W_dec": (4, 1, 48)}).items()}
        torch.save({"model_state_dict": tensors, "config": config}, root / name)

    def copy(name, change):
        shutil.copytree(root / "SAE", root / name)
        cfg = json.loads((root / name / "cfg.json").read_text())
        change(root / name, cfg)
        (root / name / "cfg.json").write_text(json.dumps(cfg))

    copy("NO_HOOK", lambda _, cfg: cfg["metadata"].update(hook_name=None))
    copy("NO_MODEL", lambda _, cfg: cfg["metadata"].update(model_name=None))
    copy("WRONG_HEAD", lambda _, cfg: cfg["metadata"].update(hook_name=HOOK.replace(".2", ".9")))
    copy("NO_TYPE", lambda _, cfg: cfg.update(architecture="magic"))
    weights = "sae_weights.safetensors"
    copy("HALF", lambda folder, _: (folder / weights).write_bytes((folder / weights).read_bytes()[:900]))

    def lose_a_tensor(folder, _):
        save_file({n: t for n, t in load_file(folder / weights).items() if n != "dec_key"}, folder / weights)

    copy("NO_KEY", lose_a_tensor)
    copy("NO_JSON", lambda *_: None)
    (root / "NO_JSON" / "cfg.json").write_text("{")
    for name, lines in (("NO_COLUMN", '{"words": "hello"}\n' * 50), ("FEW_ROWS", '{"text": "hello"}\n' * 5)):
        (root / name).mkdir()
        (root / name / "rows.jsonl").write_text(lines)
    return root


TRAIN = ("train", "--model_name", "tiny-gdn", "--cells", "1:2", "--d_sae", "16", "--k", "2")
REPLACE = ("replace", "--sae", "SAE")
CELL = ("--cell", "1:2", "--model", "tiny-gdn")
CASES = [
    (("repl",), "No such command 'repl'. Did you mean 'replace'"),
    (("--verbose",), "No such option: --verbose (Possible options: --version); see writesae-lens --help"),
    (("replace",), "Missing option '--sae'; see writesae-lens replace --help"),
    (("replace", "--sae"), "Option '--sae' requires an argument"),
    (("replace", "--sae", "no/where"), "no/where is no SAE folder: cfg.json and sae_weights.safetensors not found"),
    (("replace", "--sae", "EMPTY"), "EMPTY is no SAE folder"),
    (("replace", "--sae", "FILE"), "FILE is truncated or damaged, or no PyTorch file of tensors"),
    (("replace", "--sae", "HALF"), "could not load the SAE in"),
    (("replace", "--sae", "NO_KEY"), "could not load the SAE in"),
    (("replace", "--sae", "NO_TYPE"), "could not load the SAE in"),
    (("replace", "--sae", "NO_JSON"), "could not load the SAE in"),
    (("replace", "--sae", "NO_HOOK"), "the SAE does not say which hook it belongs to"),
    (("replace", "--sae", "NO_MODEL"), "does not say which model it belongs to: give --model"),
    (("replace", "--sae", "WRONG_HEAD"), "no cell at layer 1, head 9; this model has layer 0: heads 0-3"),
    (("replace", "--sae", "no-release:L9_H4"), "Release no-release not found"),
    (("replace", "--sae", "writesae-qwen3.5-0.8b:L99"), "Valid IDs are ['L1_H4', 'L9_H4', 'L17_H4', 'L9_H4_flat']"),
    ((*REPLACE, "--text", "no.txt"), "could not read no.txt as UTF-8 text"),
    ((*REPLACE, "--text", "SHORT"), "the text is too short: 4 tokens, while one passage has 32; give more text"),
    ((*REPLACE, "--text", "BINARY"), "BINARY as UTF-8 text"),
    ((*REPLACE, "--text", "NOTHING"), "the text is too short: 0 tokens"),
    ((*REPLACE, "--text", "EMPTY"), "Is a directory"),
    ((*REPLACE, "--text", "NUL"), "NUL as UTF-8 text: character 14 is NUL, which no text has"),
    ((*REPLACE, "--text", "LONE"), "LONE as UTF-8 text: 'utf-8' codec can't decode byte 0xed in position 14"),
    ((*REPLACE, "--text", "UTF16"), "it looks like UTF-16: save it as UTF-8"),
    (("replace", "--sae", "BARE"), "does not say which model it belongs to: give --model"),
    (("replace", "--sae", "BARE", "--model", "tiny-gdn"), "does not say which hook it belongs to; put it into the metadata"),
    (("replace", "--sae", "BARE_9", "--model", "tiny-gdn"), "no cell at layer 9, head 0"),
    (("report", "--sae", "BARE", "--model", "tiny-gdn"), "does not say which hook it belongs to"),
    ((*REPLACE, "--model", "tiny_gdn"), "no model 'tiny_gdn': not a folder, not a .pth file, not a hub id"),
    ((*REPLACE, "--model", "some/model"), "some/model ships with no text: give --text FILE"),
    ((*REPLACE, "--model", "tiny-mamba2"), "one looks like 'blocks.0.mixer.hook_write.0'"),
    ((*REPLACE, "--device", "gpu"), "device 'gpu' cannot be used"),
    ((*REPLACE, "--max-firings", "many"), "Invalid value for '--max-firings'"),
    ((*REPLACE, "--max-passages", "0"), "Invalid value for '--max-passages'"),
    ((*REPLACE, "--max-firings", "0"), "Invalid value for '--max-firings'"),
    ((*REPLACE, "--context-size", "0"), "Invalid value for '--context-size'"),
    ((*REPLACE, "--scale", "big"), "'big' is not one of 'coefficient', 'matched_norm'"),
    ((*REPLACE, "--seed", "-1"), "Invalid value for '--seed'"),
    ((*REPLACE, "--out", "FILE"), "Not a directory"),
    ((*REPLACE, "more"), "unexpected extra argument"),
    ((*REPLACE, "--sea", "1"), "No such option: --sea (Possible options: --sae"),
    ((*REPLACE, "--cell", "1:2"), "No such option: --cell"),
    (("compare",), "Missing option '--sae'"),
    (("sign",), "which cell? Give one of --sae and --cell"),
    (("map",), "Missing option '--model'"),
    (("map", "--model", "tiny-gdn", "--sae", "SAE"), "No such option: --sae"),
    (("map", "--model", "gpt2"), "gpt2"),
    (("map", "--model", "EMPTY"), "ships with no text: give --text FILE"),
    (("map", "--model", "tiny-gdn", "--text", "SHORT"), "the text is too short"),
    (("map", "--model", "tiny-gdn", "--horizon", "256"), "256 tokens have no room for a horizon of 256"),
    (("map", "--model", "tiny-gdn", "--max-firings", "0"), "Invalid value for '--max-firings'"),
    (("sign", "--sae", "SAE", *CELL), "which cell? Give one of --sae and --cell"),
    (("sign", "--cell", "2:0", "--model", "tiny-gdn"), "no cell at layer 2"),
    (("sign", *CELL, "--direction", "up"), "'up' is not one of"),
    (("install", "--cell", "1:2"), "--cell names no model: give --model"),
    (("sign", "--cell", "1", "--model", "tiny-gdn"), "a cell is written LAYER:HEAD, for example 1:0, got '1'"),
    (("install", "--cell", "1", "--model", "tiny-gdn"), "for example 1:* or 0:2,3:1 or 1,3:*; got '1'"),
    (("install", "--cell", "2:*", "--model", "tiny-gdn"), "'2:*' names no cell: this model's recurrent layers are"),
    (("install", *CELL, "--targets", "unquestionably strange"), "is not one token but"),
    (("install", *CELL, "--targets", "99999"), "token 99999 does not exist"),
    (("erase", "--sae", "SAE", "--token", "unquestionably strange"), "is not one token but"),
    (("erase", "--sae", "SAE", "--atom", "16"), "atom 16 does not exist: the SAE has atoms 0 to 15"),
    (("amplify", "--sae", "SAE", "--atom", "16"), "atom 16 does not exist: the SAE has atoms 0 to 15"),
    (("formula", "--sae", "SAE", "--epsilons", "-1"), "epsilons"),
    (("formula", "--sae", "SAE", "--epsilons", "x"), "Invalid value for '--epsilons'"),
    (("compare", "--sae", "SAE", "--random", "gauss"), "'gauss' is unknown"),
    (("compare", "--sae", "SAE", "--sae", "SAE"), "one --sae is given twice"),
    (("models", "--model", "EMPTY"), "EMPTY is a folder without config.json"),
    (("pull", "nothing"), "no release 'nothing': there are writesae-qwen3.5-0.8b"),
    (("pull", "writesae-qwen3.5-0.8b", "L99"), "no L99 in writesae-qwen3.5-0.8b: there are L1_H4"),
    (("pull", "some/repository"), "which SAE of some/repository? Give its folder"),
    (("convert", "no.pt", "out"), "no.pt does not exist: give a checkpoint"),
    (("push", "SAE", "not a name"), "publishing to not a name failed"),
    (("report", "--sae", "SAE", "--results", "EMPTY"), "holds no results of experiments"),
    (("report", "--sae", "SAE", "--results", "no/where"), "no/where holds no result of an experiment"),
    (("report", "--sae", "SAE", "--text", "SHORT"), "the text is too short"),
    (("reproduce", "--config", "mine"), "no configuration 'mine': there are qwen3.5-0.8b-L1H4"),
    (("reproduce", "--config", "gla-1.3b-L12H0", "--recipe", "mine"), "'mine' is not one of 'recommended', 'paper'"),
    (("reproduce", "--config", "gla-1.3b-L12H0", "--model", "tiny-gdn", "--experiments", "all"), "no experiment is called 'all'"),
    (("demo", "--model", "gpt2"), "the demo runs on shipped models (tiny-gdn, tiny-mamba2, tiny-rwkv7), got 'gpt2'"),
    (("demo", "--cell", "2:0"), "no cell at layer 2, head 0; this model has layer 0: heads 0-3"),
    (("demo", "--cell", "x"), "a cell is written LAYER:HEAD, for example 1:0, got 'x'"),
    (("demo", "--k", "5000"), "k=5000 features cannot be active out of d_sae=2048"),
    (("demo", "--training-tokens", "5"), "Invalid value for '--training-tokens'"),
    (("demo", "--out", "FILE"), "Not a directory"),
    (("train",), "nothing to train: give --model_name and --cells"),
    (("train", "--model_name", "tiny-gdn"), "nothing to train on: give --cells or --hook_name"),
    ((*TRAIN[:4], "9:*"), "'9:*' names no cell: this model's recurrent layers are 0, 1, 3"),
    ((*TRAIN[:4], "one"), "cells are written LAYER:HEAD, with * for all"),
    ((*TRAIN[:3], "--hook_name", "blocks.1.foo"), "'blocks.1.foo' is not the hook of a cell's write or state"),
    ((*TRAIN, "--k", "5000"), "k=5000 features cannot be active out of d_sae=16"),
    ((*TRAIN, "--lr", "fast"), "argument --lr: invalid float value: 'fast'"),
    ((*TRAIN, "--encoder", "magic"), "argument --encoder: invalid choice: 'magic'"),
    ((*TRAIN, "--foo", "1"), "unrecognized arguments: --foo 1; writesae-lens train --saelens-help lists the flags"),
    ((*TRAIN, "--site", "both"), "'both' is not one of 'write', 'state'"),
    ((*TRAIN, "--win-rate", "3"), "the win rate is logged to W&B: give --log_to_wandb true"),
    ((*TRAIN, "--device", "gpu"), "device 'gpu' cannot be used"),
    ((*TRAIN, "--dataset_path", "NO_COLUMN"), "has columns words: it needs one of text or tokens"),
    ((*TRAIN, "--dataset_path", "EMPTY"), "EMPTY doesn't contain any data files"),
    ((*TRAIN, "--dataset_path", "no/where"), "no/where"),
    ((*TRAIN, "--dataset_path", "FEW_ROWS"), "Dataset may be too small"),
    (("train", "--cells", "1:*"), "no model to train on: give --model_name"),
    ((*TRAIN, "--train_batch_size_tokens", "100000"), "less than train_batch_size_tokens=100000: raise n_batches"),
    ((*TRAIN, "--resume_from_checkpoint", "no/where"), "no/where is no checkpoint: give the folder"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("arguments", "message"), CASES, ids=[" ".join(case[0])[:60] for case in CASES])
def test_one_line_says_what_is_wrong(arguments, message, places, tmp_path):
    named = {path.name: path for path in places.iterdir()}
    done = run(*(named.get(argument, argument) for argument in arguments), cwd=tmp_path)
    assert done.returncode == 2, done
    assert "Traceback" not in done.stderr
    lines = done.stderr.replace("\r", "\n").splitlines()
    if (
        arguments[0] in EXPERIMENTS | OF_MODELS
    ):  # which print nothing else but progress bars, and leave nothing behind
        lines = [line for line in lines if line.strip() and "%|" not in line and "it/s" not in line]
        assert not any(path.name.startswith("writesae-") for path in tmp_path.iterdir())
    else:
        lines = [line for line in lines if line.startswith("writesae-lens: ")]
    (line,) = lines
    assert line.startswith("writesae-lens: ")
    assert message in line


def test_the_result_of_another_sae_is_not_written_over(places, tmp_path):
    """The default folder of a command is the same for every SAE."""
    out = tmp_path / "out"
    out.mkdir()
    there = json.dumps({"hook_name": HOOK, "sae_fingerprints": ["of another"]})
    (out / "summary.json").write_text(there)
    done = run("contexts", "--sae", places / "SAE", "--max-passages", 1, "--out", out)
    assert done.returncode == 2
    assert "holds the result of another SAE" in done.stderr
    assert HOOK in done.stderr
    assert (out / "summary.json").read_text() == there
