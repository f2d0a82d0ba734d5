"""Module names from before the move to rooms still work, with a warning that names the new place."""

import importlib
import subprocess
import sys

import pytest

import hooked_models.moved
import writesae_lens.moved

TABLE = hooked_models.moved.OLD_NAMES | writesae_lens.moved.OLD_NAMES
# What the documentation named under the old modules.
DOCUMENTED = {
    "hooked_models.checkpoints": "to_blinkdl",
    "hooked_models.gated_delta_net": "HookedGatedDeltaNet",
    "hooked_models.mamba2": "HookedMamba2",
    "hooked_models.rwkv7": "HookedRWKV7",
    "hooked_models.rwkv7_model": "RWKV7Cache RWKV7Config RWKV7ForCausalLM",
    "hooked_models.world_tokenizer": "WorldTokenizer",
    "hooked_models.torch_files": "read",
    "hooked_models.loading": "prepare",
    "writesae_lens.checkpoints": "Source load",
    "writesae_lens.config": "PAPER_SCHEDULE WriteSAEConfig WriteSAETrainingConfig",
    "writesae_lens.experiments.amplification": "amplify",
    "writesae_lens.experiments.erasure": "erase_atom",
    "writesae_lens.experiments.inputs": "as_passages",
    "writesae_lens.experiments.readers": "reader_trace",
    "writesae_lens.experiments.replacement": "replacement_test",
    "writesae_lens.experiments.signs": "sign_test",
    "writesae_lens.history": "record_training",
    "writesae_lens.hub": "fetch fetch_config published_table",
    "writesae_lens.releases": "BaseModel base_model releases",
    "writesae_lens.sae": "MatrixSAE WriteSAE",
    "writesae_lens.sharing": "default_id push",
    "writesae_lens.train": "parse_cells run_training shipped_text",
    "writesae_lens.training_sae": "WriteTrainingSAE",
    "writesae_lens.win_rate": "log_win_rate",
}


@pytest.mark.parametrize("old", TABLE)
def test_an_old_name_gives_the_objects_of_the_new_module(old, monkeypatch):
    places = [TABLE[old]] if isinstance(TABLE[old], str) else TABLE[old]
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(DeprecationWarning, match=f"^{old} is now {' and '.join(places)}$"):
        module = importlib.import_module(old)
    public = {}
    for place in map(importlib.import_module, reversed(places)):
        public |= {name: x for name, x in vars(place).items() if not name.startswith("_")}
    assert public
    assert public.keys() <= set(dir(module))
    assert all(getattr(module, name) is x for name, x in public.items())
    assert all(hasattr(module, name) for name in DOCUMENTED.get(old, "").split())
    assert not hasattr(module, "no_such_name")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"{old}.no_such_module")


def test_every_documented_module_has_a_row():
    assert DOCUMENTED.keys() <= TABLE.keys()


@pytest.mark.parametrize(
    "name", ["hooked_models.loadings", "writesae_lens.no_such", "writesae_lens.saes.hub"]
)
def test_a_name_that_never_was_is_not_found(name):
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(name)


def test_importing_the_package_imports_no_module_for_old_names():
    line = "import sys, hooked_models; print('torch' in sys.modules, 'hooked_models.files' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
