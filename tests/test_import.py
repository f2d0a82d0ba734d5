"""Importing is silent, however strict the user is about warnings."""

import subprocess
import sys
from importlib.metadata import requires

from packaging.requirements import Requirement


def test_importing_warns_of_nothing():
    line = "import writesae_lens, hooked_models, writesae_lens.experiments; hooked_models.HookedRecurrent"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", line], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_version_of_transformers_that_decodes_wrongly_is_refused():
    line = (
        "import importlib.metadata as m; real = m.version; "
        "m.version = lambda name: {'transformers': '5.24.0.dev0'}.get(name) or real(name); "
        "import hooked_models"
    )
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: hooked_models does not work with transformers 5.24.0.dev0, where cached decoding would "
        "be wrong: pip install 'transformers>=5.20,<5.24'"
    )


def test_the_requirement_excludes_it():
    wanted = next(r for r in map(Requirement, requires("writesae-lens") or ()) if r.name == "transformers")
    assert wanted.specifier.contains("5.23.0")
    assert not wanted.specifier.contains("5.24.0")
