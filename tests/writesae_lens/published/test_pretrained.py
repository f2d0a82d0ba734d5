"""Published SAEs from a hub in memory, through SAELens's own lines and the real client."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from tests.writesae_lens.published.hub import Client, RemoteError
from tests.writesae_lens.published.made import checkpoint, matrices, save, truth
from writesae_lens.published.releases import REPOSITORY, releases

PRELOAD = f"""
import sys, time, warnings
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import torch
import writesae_lens
from tests.writesae_lens.cli.command_line import run as command
from sae_lens import SAE
from sae_lens.loading.pretrained_sae_loaders import load_sae_config_from_huggingface

time.sleep = lambda seconds: None  # between its attempts the client waits
warnings.simplefilter("error")  # less those that SAELens itself gives of repositories that it lists
warnings.filterwarnings("ignore", message="You are loading an SAE using the HuggingFace repo_id")

def known(sae, x):
    acts = sae.encode(torch.tensor(x))
    return {{"type": type(sae).__name__, "acts": acts.tolist(), "out": sae.decode(acts).tolist(),
            "metadata": sae.cfg.metadata.to_dict()}}
"""
ONE = "writesae/qwen0p8b/L9_H4"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("pretrained") / "cache"


@pytest.fixture(scope="module")
def client(hub, cache):
    with Client(hub, cache, PRELOAD, HF_TOKEN="hf_here") as client:
        yield client


@pytest.fixture(scope="module")
def held():
    """What each published file of the releases holds; the cells are smaller than the models'."""
    found = {}
    for release in releases().values():
        for number, (name, folder) in enumerate(release.saes_map.items()):
            kind = "flat" if name.endswith("_flat") else "bilinear"
            layer, head = (int(part[1:]) for part in name.split("_")[:2])
            found[folder] = checkpoint(kind, seed=number, layer=layer, head=head)
    return found


@pytest.fixture(scope="module")
def published(hub, held, tmp_path_factory):
    """The published repository; its commit and the files' hashes."""
    folder = tmp_path_factory.mktemp("published")
    files = {f"{name}/best.pt": save(folder / name, one).read_bytes() for name, one in held.items()}
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    manifest = {
        name.removesuffix("/best.pt"): {"sha256": digest, "size": len(files[name]), "description": "x"}
        for name, digest in hashes.items()
    }
    files["manifest.json"] = json.dumps(manifest).encode()
    return hub.put(REPOSITORY, files), hashes


def put(hub, repo, tmp_path, held, folder=ONE, **files):
    data = save(tmp_path / repo.replace("/", "_"), held).read_bytes()
    return hub.put(
        repo, {f"{folder}/best.pt": data} | {name.replace("__", "."): x for name, x in files.items()}
    )


def run(client, *arguments):
    """Status, output and errors of a command."""
    return client.run("result = command(*arguments)", arguments=list(arguments))


def fails(client, *arguments):
    """The one line with which a command refuses its input."""
    code, _, said = run(client, *arguments)
    assert code == 2
    assert said.startswith("writesae-lens: ")
    assert said.count("\n") == 1
    return said


def refused(client, repo, folder=ONE, kind="WriteSAEError"):
    """The error of SAE.from_pretrained."""
    with pytest.raises(RemoteError) as error:
        client.run("SAE.from_pretrained(repo, folder)", repo=repo, folder=folder)
    assert kind in error.value.mro
    assert kind != "WriteSAEError" or error.value.message.isprintable()
    return error.value


def assert_is(found, held, x):
    acts, out = truth(held, x)
    torch.testing.assert_close(torch.tensor(found["acts"]).double(), acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.tensor(found["out"]).double(), out.flatten(1), rtol=1e-5, atol=1e-4)


def test_the_promised_line(client, published, held):
    commit, hashes = published
    x = matrices(7, 6, 4)
    found = client.run(
        f'result = known(SAE.from_pretrained("{REPOSITORY}", "{ONE}"), x)', x=x.flatten(1).tolist()
    )
    assert_is(found, held[ONE], x)
    metadata = found["metadata"]
    assert metadata["provenance"] == {
        "repository": REPOSITORY,
        "revision": commit,
        "file": f"{ONE}/best.pt",
        "sha256": hashes[f"{ONE}/best.pt"],
        "sha256_checked": True,
    }
    assert metadata["hook_name"] == "blocks.9.linear_attn.hook_state.4"
    assert (metadata["layer"], metadata["head"]) == (9, 4)
    assert metadata["model_name"] == "Qwen/Qwen3.5-0.8B"
    assert metadata["model_class_name"] == "HookedRecurrent"


@pytest.mark.parametrize("release", sorted(releases()))
def test_every_release_by_name(client, published, held, release):
    x = matrices(5, 6, 4)
    lookup = releases()[release]
    for name, folder in lookup.saes_map.items():
        found = client.run(
            f"""
            sae, cfg, sparsity = SAE.from_pretrained_with_cfg_and_sparsity({release!r}, {name!r})
            told = load_sae_config_from_huggingface({release!r}, {name!r})
            assert sparsity is None and told["d_sae"] == sae.cfg.d_sae == cfg["d_sae"]
            assert told["metadata"]["hook_name"] == sae.cfg.metadata.hook_name
            result = known(sae, x)
            """,
            x=x.flatten(1).tolist(),
        )
        assert found["type"] == ("TopKSAE" if name.endswith("_flat") else "WriteSAE")
        assert found["metadata"]["model_name"] == lookup.model
        # Mamba-2's too: of 6 x 4 the state side is the longer one already.
        assert_is(found, held[folder], x)


def test_the_directory_lists_them_beside_saelens_own(client):
    assert client.run("""
        from sae_lens.loading import pretrained_saes_directory as directory
        from sae_lens.loading import pretrained_sae_loaders as loaders
        from sae_lens.saes import sae as saes
        found = directory.get_pretrained_saes_directory()
        assert found is loaders.get_pretrained_saes_directory() is saes.get_pretrained_saes_directory()
        result = "writesae-qwen3.5-0.8b" in found and "gpt2-small-res-jb" in found
    """)


def test_saelens_own_listing_takes_them(client):
    assert client.run("""
        from sae_lens.evals import all_loadable_saes
        result = ["writesae-gla-1.3b", "L12_H0", 1.0, 0.0] in [list(row) for row in all_loadable_saes()]
    """)


def test_what_saelens_refuses_it_refuses_as_before(client, published):
    error = refused(client, "writesae-qwen3.5-0.8b", "L5_H5", "ValueError")
    assert error.message.startswith("ID L5_H5 not found in release")
    assert "cfg.json" in refused(client, REPOSITORY, "writesae/none", "EntryNotFoundError").message
    assert refused(client, "user/nothing", "writesae/none", "OSError").kind == "RepositoryNotFoundError"


@pytest.mark.parametrize("folder", ["writesae_L9_H4_nf2048_k7_s42", "a/b c/L9_H4", "best"])
def test_any_folder_with_a_checkpoint(client, hub, tmp_path, folder):
    held = checkpoint("bilinear_tied", without=["k"] if "k7" in folder else [])
    put(hub, "user/other", tmp_path, held, folder)
    x = matrices(4, 6, 4)
    found = client.run(
        f'result = known(SAE.from_pretrained("user/other", {folder!r}), x)', x=x.flatten(1).tolist()
    )
    assert found["metadata"]["layer"] == 9
    assert found["metadata"]["provenance"]["sha256_checked"] is False
    if "k7" in folder:
        held["config"]["k"] = 7
    assert_is(found, held, x)


def test_a_file_by_its_path_and_a_folder_above_it(client, hub, tmp_path):
    put(hub, "user/deep", tmp_path, checkpoint("flat"), "flat_baseline/qwen0p8b_L9_H4/run1")
    for name in ("flat_baseline/qwen0p8b_L9_H4/run1/best.pt", "flat_baseline/qwen0p8b_L9_H4"):
        file = client.run(
            f'result = SAE.from_pretrained("user/deep", {name!r}).cfg.metadata.provenance["file"]'
        )
        assert file == "flat_baseline/qwen0p8b_L9_H4/run1/best.pt"


def test_a_manifest_that_lists_another_hash(client, hub, tmp_path):
    """Every layout of a manifest: test_manifest.py."""
    manifest = json.dumps({ONE: {"sha256": "0" * 64}}).encode()
    put(hub, "user/differs", tmp_path, checkpoint("bilinear"), manifest__json=manifest)
    assert "but manifest.json says " + "0" * 64 in refused(client, "user/differs").message


def test_a_manifest_of_paths_elsewhere_is_only_read(client, hub, cache, tmp_path):
    manifest = {
        "../../../outside": {"sha256": "0" * 64, "path": "/etc/passwd"},
        "/elsewhere/x": {"file": "../../y"},
    }
    put(hub, "user/away", tmp_path, checkpoint("rank1"), manifest__json=json.dumps(manifest).encode())
    before = {path for path in cache.parent.rglob("*") if cache not in path.parents}
    found = client.run(f'result = SAE.from_pretrained("user/away", "{ONE}").cfg.metadata.provenance')
    assert found["sha256_checked"] is False
    assert {path for path in cache.parent.rglob("*") if cache not in path.parents} == before


def test_a_hostile_file_is_refused_in_one_line(client, hub, tmp_path):
    class Code:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    put(hub, "user/hostile", tmp_path, {"sae": Code(), "config": {}})
    assert "wants to run code" in refused(client, "user/hostile").message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("token", [None, "hf_here"])
def test_a_gated_repository(client, hub, tmp_path, token):
    """Without a login it answers 401, to those who may not have it 403."""
    put(hub, f"user/gated{token}", tmp_path, checkpoint("bilinear"))
    hub.gate(f"user/gated{token}", 403)
    client.run("import os; os.environ.pop('HF_TOKEN') if token is None else None", token=token)
    try:
        error = refused(client, f"user/gated{token}", kind="RepositoryNotFoundError")
        assert error.kind == "GatedRepoError"
        assert ("401" if token is None else "403") in error.message
        fails(client, "pull", f"user/gated{token}", ONE)
        hub.gate(f"user/gated{token}", 401)  # those with a login may
        if token:
            assert run(client, "pull", f"user/gated{token}", ONE)[0] == 0
    finally:
        client.run("os.environ['HF_TOKEN'] = 'hf_here'")


def test_an_interrupted_download_leaves_nothing_and_is_taken_up_again(client, hub, cache, tmp_path):
    put(hub, "user/broken", tmp_path, checkpoint("bilinear"))
    hub.interrupt(f"{ONE}/best.pt", 1000, 50)
    error = refused(client, "user/broken")
    assert "peer closed connection" in error.message
    assert "try again" in error.message
    assert not [p for p in (cache / "hub/models--user--broken").rglob("best.pt") if p.stat().st_size]
    hub.interrupt(f"{ONE}/best.pt", 1000, 0)
    assert client.run(f'result = SAE.from_pretrained("user/broken", "{ONE}").cfg.d_sae') == 24


def test_pull_tells_what_came(client, published, hub, tmp_path):
    _, hashes = published
    code, out, _ = run(client, "pull", "writesae-qwen3.5-0.8b", "L9_H4")
    assert code == 0
    assert hashes[f"{ONE}/best.pt"] in out
    assert "as manifest.json says" in out
    assert "blocks.9.linear_attn.hook_state.4" in out
    first = put(hub, "user/twice", tmp_path, checkpoint("bilinear", seed=1))
    hub.tag("user/twice", "v1")
    second = put(hub, "user/twice", tmp_path, checkpoint("bilinear", seed=2))
    for revision, commit in (("v1", first), ("main", second), (first, first)):
        out = run(client, "pull", "user/twice", ONE, "--revision", revision)[1]
        assert commit in out.splitlines()[0]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["writesae-nothing"], "no release 'writesae-nothing': there are writesae-qwen3.5-0.8b"),
        (["writesae-qwen3.5-4b", "L9_H4"], "no L9_H4 in writesae-qwen3.5-4b: there are L12_H8"),
        (["a b/c", "nowhere"], "check the names"),
        (["user/repo/extra", "nowhere"], "check the names"),
        (["user/twice"], "which SAE of user/twice? Give its folder"),
        (["user/twice", "nowhere"], "404"),
        (["user/absent", "nowhere"], "404"),
    ],
)
def test_pull_of_what_is_not_there(client, published, arguments, part):
    assert part in fails(client, "pull", *arguments)


def test_pull_goes_on_after_what_is_absent(client, hub, tmp_path):
    put(hub, "user/some", tmp_path, checkpoint("bilinear"))
    code, out, said = run(client, "pull", "user/some", "nowhere", f"{ONE}/")
    assert code == 2
    assert "nowhere" in said
    assert f"user/some {ONE}/best.pt" in out


def test_names_cannot_command_a_terminal(client, hub, tmp_path):
    data = save(tmp_path, {"nothing": 1}).read_bytes()
    hub.put("user/escape", {"x/\x1b[31mred\nline/best.pt": data})
    refused(client, "user/escape", "x")
    for arguments in (["pull", "user/escape", "x"], ["replace", "--sae", "user/escape:x"]):
        code, out, said = run(client, *arguments)
        assert code == 2
        assert (out + said).replace("\n", "", 1).isprintable()


def test_the_table_of_models(client, published, hub):
    run(client, "pull", "writesae-qwen3.5-0.8b", "L9_H4")
    out = run(client, "models")[1]
    rows = [line.split() for line in out.splitlines()]
    size = f"{len(hub.files(REPOSITORY)[f'{ONE}/best.pt']) / 1e6:.1f}"
    assert ["writesae-qwen3.5-0.8b", "L9_H4", "Qwen/Qwen3.5-0.8B", "9:4", size, "MB", "yes"] in rows
    assert {row[0] for row in rows if row} >= {"tiny-gdn", *releases()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A published checkpoint for a cell of tiny-gdn, on states."""
    held = checkpoint("bilinear", d_k=32, d_v=48, layer=1, head=2)
    return save(tmp_path_factory.mktemp("tiny") / "writesae/tiny-gdn/L1_H2", held)


def test_push_publishes_with_a_card_and_it_comes_back(client, hub, tiny, tmp_path):
    hook = "blocks.1.linear_attn.hook_state.2"
    summary = {"win_rate": 0.875, "win_rate_ci": [0.8, 0.925], "strict_chain_rate": 0.5, "n_firings": 1234}
    summary |= {"kl_ratio_atom_delete_random": [1.0, 2.5, 3.0], "hook_name": hook}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    pushed = ["push", str(tiny), "user/mine", "--results", str(tmp_path)]
    code, out, said = run(client, *pushed)
    assert code == 0, said
    assert out == 'published: SAE.from_pretrained("user/mine", "L1_H2")\n'
    files = hub.files("user/mine")
    assert set(files) >= {
        "L1_H2/cfg.json",
        "L1_H2/sae_weights.safetensors",
        "L1_H2/replacement.json",
        "README.md",
    }
    card = files["README.md"].decode()
    assert card.startswith("---\n")
    assert "library_name: saelens" in card
    for part in ("87.5% (80.0% to 92.5%)", "1.0 : 2.5 : 3.0", "1,234", hook, "tiny-gdn"):
        assert part in card
    hub.put("user/mine", "README.md", card.replace("library_name: saelens", "library_name: other").encode())
    run(client, *pushed[:3], "--id", "more/b")
    run(client, *pushed[:3])
    card = hub.files("user/mine")["README.md"].decode()
    assert card.count("## L1_H2") == card.count("## more/b") == 1
    assert "87.5%" not in card  # this section was written anew, without results
    assert "library_name: other" in card  # the rest is its owner's
    code, out, _ = run(client, "pull", "user/mine", "L1_H2")
    assert code == 0
    assert "bilinear, 24 atoms for 32 x 48 matrices, k 5" in out
    same = client.run(
        """
        from writesae_lens import WriteSAE
        a, b = WriteSAE.from_checkpoint(path), SAE.from_pretrained("user/mine", "L1_H2")
        result = [type(b).__name__, a.state_dict().keys() == b.state_dict().keys()]
        result += [torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items()]
        result += [a.cfg.metadata.provenance == b.cfg.metadata.provenance, b.cfg.metadata.hook_name == hook]
        """,
        path=str(tiny),
        hook=hook,
    )
    assert same[0] == "WriteSAE"
    assert all(same[1:])


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--id", "../up"], "is no id"),
        (["--id", "a b"], "is no id"),
        (["--id", "README.md"], "is no id"),
        (["--id", "."], "is no id"),
        (["--results", "/nowhere"], "is not what a replacement test saved"),
    ],
)
def test_push_of_what_cannot_be_published(client, hub, tiny, options, part):
    assert part in fails(client, "push", str(tiny), "user/refused", *options)
    assert "user/refused" not in hub.repos


def test_stock_upload_publishes_ours(client, hub, tiny, tmp_path):
    """As an object and as a folder, which may hold a sparsity."""
    assert client.run(
        """
        from safetensors.torch import save_file
        from sae_lens.training.upload_saes_to_huggingface import upload_saes_to_huggingface
        from writesae_lens import WriteSAE
        sae = WriteSAE.from_checkpoint(path)
        sae.save_model(folder)
        save_file({"sparsity": torch.full((24,), -2.0)}, folder + "/sparsity.safetensors")
        upload_saes_to_huggingface({"layer1/head2": sae, "b": folder}, "user/stock", show_progress=False)
        x = torch.randn(4, 32 * 48)
        for name in ("layer1/head2", "b"):
            back, cfg, sparsity = SAE.from_pretrained_with_cfg_and_sparsity("user/stock", name)
            assert type(back) is WriteSAE and torch.equal(sae.encode(x), back.encode(x))
            assert back.cfg.metadata.hook_name == sae.cfg.metadata.hook_name == cfg["metadata"]["hook_name"]
            assert (sparsity is None) == (name != "b")
        result = True
        """,
        path=str(tiny),
        folder=str(tmp_path / "sae"),
    )
    files = hub.files("user/stock")
    assert files["b/sae_weights.safetensors"] == (tmp_path / "sae/sae_weights.safetensors").read_bytes()


def test_codes_are_published_and_come_back(client, hub):
    """Through SAELens's own upload, and through the command, with a card."""
    assert client.run(
        """
        from sae_lens.training.upload_saes_to_huggingface import upload_saes_to_huggingface
        from writesae_lens import WriteSAE, WriteSAEConfig
        cfg = WriteSAEConfig(d_k=32, d_v=48, decoder="codes", n_key=20, n_value=30, k_key=2, k_value=3)
        sae = WriteSAE(cfg)
        sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name = hook, "tiny-gdn"
        upload_saes_to_huggingface({"codes": sae}, "user/codes", show_progress=False)
        sae.save_model(folder)
        assert command("push", folder, "user/codes", "--id", "pushed")[0] == 0
        x = torch.randn(4, 32, 1) * torch.randn(4, 1, 48)
        for name in ("codes", "pushed"):
            back = SAE.from_pretrained("user/codes", name)
            assert type(back) is WriteSAE and back.is_codes
            assert (back.cfg.n_key, back.cfg.n_value, back.cfg.k_key, back.cfg.k_value) == (20, 30, 2, 3)
            assert torch.equal(sae.encode(x.flatten(1)), back.encode(x.flatten(1)))
            assert torch.equal(sae.mean_key, back.mean_key)
        result = True
        """,
        hook="blocks.1.linear_attn.hook_write.2",
        folder="codes-folder",
    )
    assert b"codes" in hub.files("user/codes")["README.md"]


def test_from_the_hub_to_an_experiment(client, hub, tiny):
    hub.put("user/tiny", "writesae/tiny-gdn/L1_H2/best.pt", tiny.read_bytes())
    found = client.run("""
        from hooked_models import HookedRecurrent, zoo
        from writesae_lens.experiments import replacement_test
        sae = SAE.from_pretrained("user/tiny", "writesae/tiny-gdn/L1_H2")
        model = HookedRecurrent.for_sae(sae)
        done = replacement_test(model, sae, zoo.held_out_text()[:4000], max_firings=50)
        result = [model.cfg.model_name, done.summary["n_firings"], done.summary["hook_name"]]
    """)
    assert found == ["tiny-gdn", 50, "blocks.1.linear_attn.hook_state.2"]


def test_off_line_with_a_warm_cache_and_without_the_plugin(client, hub, cache, tiny, published):
    """Another process: SAELens alone, then with the plugin; nothing may be asked of the hub."""
    client.run(f'SAE.from_pretrained("{REPOSITORY}", "{ONE}")')
    client.run('SAE.from_pretrained("writesae-qwen3.5-0.8b", "L9_H4")')
    run(client, "push", str(tiny), "user/offline")
    deep = "flat_baseline/qwen0p8b_L9_H4"
    hub.put(
        "user/deeper", f"{deep}/run/best.pt", save(cache.parent / "deeper", checkpoint("flat")).read_bytes()
    )
    client.run(f'SAE.from_pretrained("user/deeper", "{deep}")')
    client.run('SAE.from_pretrained("user/offline", "L1_H2")')
    asked = len(hub.requests)
    with Client(hub, cache, "from sae_lens import SAE", HF_HUB_OFFLINE="1") as alone:
        with pytest.raises(RemoteError) as error:
            alone.run('SAE.from_pretrained("user/offline", "L1_H2")')
        assert (error.value.kind, error.value.message) == ("KeyError", "'writesae'")
        alone.run("import writesae_lens")
        assert alone.run('result = SAE.from_pretrained("user/offline", "L1_H2").cfg.d_k') == 32
        assert alone.run(f'result = SAE.from_pretrained("user/deeper", "{deep}").cfg.d_sae') == 24
        for release, name in ((REPOSITORY, ONE), ("writesae-qwen3.5-0.8b", "L9_H4")):
            provenance = alone.run(
                f"result = SAE.from_pretrained({release!r}, {name!r}).cfg.metadata.provenance"
            )
            assert provenance["sha256_checked"] is True
            assert provenance["revision"] == published[0]
        with pytest.raises(RemoteError) as error:
            alone.run(f'SAE.from_pretrained("user/never", "{ONE}")')
        assert "EntryNotFoundError" in error.value.mro
    assert len(hub.requests) == asked


@pytest.mark.parametrize(
    ("reference", "part"),
    [
        ("nothing:L9_H4", "Release nothing not found"),
        ("writesae-qwen3.5-0.8b:L5_H5", "ID L5_H5 not found in release"),
        ("user/absent:L5_H5", "404"),
        ("nowhere", "nowhere is no SAE folder"),
    ],
)
def test_replace_of_an_sae_that_is_not_there(client, published, reference, part):
    assert part in fails(client, "replace", "--sae", reference)


def test_replace_of_an_sae_of_the_hub(client, hub, tiny, tmp_path):
    hub.put("user/tiny2", "writesae/tiny-gdn/L1_H2/best.pt", tiny.read_bytes())
    options = ["--max-passages", "1", "--context-size", "64", "--out", str(tmp_path / "out")]
    for reference in ("user/tiny2:writesae/tiny-gdn/L1_H2", str(tiny), str(tiny.parent)):
        code, out, said = run(client, "replace", "--sae", reference, *options)
        assert code == 0, said
        assert out.splitlines()[-1].startswith("recovered in the median")
    said = fails(client, "replace", "--sae", str(tiny), *options, "--scale", "huge")
    assert "--scale" in said
    assert "matched_norm" in said


def test_convert(client, tiny, tmp_path):
    out = str(tmp_path / "converted")
    code, said, _ = run(client, "convert", str(tiny.parent), out)
    assert code == 0
    assert said.endswith(f"converted: {out}\n")
    assert "bilinear, 24 atoms for 32 x 48 matrices, k 5" in said
    assert {path.name for path in Path(out).iterdir()} >= {"cfg.json", "sae_weights.safetensors"}
    assert client.run("result = SAE.load_from_disk(path).cfg.metadata.layer", path=out) == 1
