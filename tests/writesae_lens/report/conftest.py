import os
import shutil

import pytest
from playwright.sync_api import sync_playwright

from hooked_models import HookedRecurrent, zoo
from tests.writesae_lens.native_sae import sae_of_writes
from writesae_lens.experiments import as_passages

LAYER, HEAD, N_ATOMS = 1, 3, 2048


@pytest.fixture(scope="module")
def model():
    return HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")


@pytest.fixture(scope="module")
def passages(model):
    return as_passages(model, zoo.held_out_text()[-40_000:], 64)[-24:]


@pytest.fixture(scope="module")
def sae(model):
    """Atoms that are native writes of other text."""
    ids = as_passages(model, zoo.held_out_text()[:60_000], 512)[:8]
    return sae_of_writes(model, LAYER, HEAD, ids, N_ATOMS, context_size=64)


@pytest.fixture(scope="module")
def chromium():
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        assert not os.environ.get("CI"), "CI tests the report in a browser: install chromium"
        pytest.skip("no chromium on this machine")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
             "--no-first-run", "--disable-component-update", "--disable-quic"]  # fmt: skip
    try:
        playwright = sync_playwright().start()
    except Exception:
        if os.environ.get("CI"):
            raise
        pytest.skip("playwright's driver does not start (on Debian it wants libatomic1)")
    browser = playwright.chromium.launch(executable_path=path, args=quiet)
    yield browser
    browser.close()
    playwright.stop()
