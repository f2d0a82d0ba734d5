"""The commands export and label, as a user types them."""

import json
import shutil

import pandas as pd
import pytest
from sae_lens import SAE

from tests.writesae_lens.cli.command_line import run
from writesae_lens.experiments.origin import fingerprint_sae
from writesae_lens.use.labels import labels_of

FEW = ("--max-passages", 4, "--context-size", 32, "--n-contexts", 2)


@pytest.fixture
def folder(sae_folder, tmp_path):
    """A copy of an SAE's folder."""
    return shutil.copytree(sae_folder, tmp_path / "sae")


def test_labels_of_a_file_are_kept_in_the_folder_and_exported(folder, tmp_path):
    before = fingerprint_sae(SAE.load_from_disk(folder))
    (tmp_path / "labels.csv").write_text("feature,label\n3,first\n7,second\n")
    done = run("label", "--sae", folder, "--labels", tmp_path / "labels.csv")
    assert (done.returncode, done.stdout) == (0, "2 of 48 features have a label\n"), done.stderr
    sae = SAE.load_from_disk(folder)
    assert labels_of(sae) == {3: "first", 7: "second"}
    assert fingerprint_sae(sae) == before
    out = tmp_path / "out"
    done = run("export", "--sae", folder, *FEW, "--out", out, "--neuronpedia", "writesae-48")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        f"export: {out}/features.jsonl\nNeuronpedia: {out}/neuronpedia\n48 features: "
    )
    assert done.stdout.endswith(" with measured effects, 2 with a label\n")
    table = pd.read_json(out / "features.jsonl", lines=True)
    assert dict(table.label[table.label != ""]) == {3: "first", 7: "second"}
    assert f" {(table.n_active > 0).sum()} active in 128 tokens" in done.stdout
    assert (out / "neuronpedia/tiny-gdn/1-writesae-48__h2/explanations/batch-0.jsonl.gz").is_file()


def test_a_folder_of_several_stands_for_all_in_it(folder, tmp_path):
    several = tmp_path / "several"
    shutil.copytree(folder, several / "L1H2")
    other = SAE.load_from_disk(folder)
    other.cfg.metadata.hook_name = "blocks.1.linear_attn.hook_write.0"
    other.save_model(several / "L1H0")
    (tmp_path / "a.csv").write_text("layer,head,feature,label\n1,0,3,first\n1,2,7,second\n")
    done = run("label", "--sae", several, "--labels", tmp_path / "a.csv")
    assert (done.returncode, done.stdout) == (0, "2 of 96 features have a label\n"), done.stderr
    done = run("export", "--sae", several, *FEW, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    table = pd.read_json(tmp_path / "out" / "features.jsonl", lines=True)
    named = table[table.label != ""]
    assert list(zip(named["head"], named.feature, named.label, strict=True)) == [
        (0, 3, "first"),
        (2, 7, "second"),
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("export",), "Missing option '--sae'"),
        (("export", "--sae", "SAE", "--sae", "SAE"), "one --sae is given twice"),
        (("export", "--sae", "SAE", "--neuronpedia", "No Name"), "is no name of a source set"),
        (("export", "--sae", "SAE", "--n-contexts", "0"), "Invalid value for '--n-contexts'"),
        (("label", "--sae", "SAE"), "Missing option '--labels'"),
        (
            ("label", "--sae", "no", "--labels", "a.json"),
            "no is no SAE folder: labels are kept in the cfg.json",
        ),
        (("label", "--sae", "SAE", "--labels", "no.csv"), "no.csv does not read as a table of labels"),
        (("label", "--sae", "SAE", "--labels", "a.json"), "a.json: feature 48 does not exist"),
    ],
)
def test_wrong_commands_are_answered_in_one_line(sae_folder, tmp_path, arguments, said):
    (tmp_path / "SAE").symlink_to(sae_folder)
    (tmp_path / "a.json").write_text(json.dumps({"48": "x"}))
    before = (sae_folder / "cfg.json").read_bytes()
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert said in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert (sae_folder / "cfg.json").read_bytes() == before
