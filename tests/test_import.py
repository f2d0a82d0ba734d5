"""Importing is silent, however strict the user is about warnings."""

import subprocess
import sys


def test_importing_warns_of_nothing():
    line = "import writesae_lens, hooked_models, writesae_lens.experiments; hooked_models.HookedRecurrent"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", line], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
