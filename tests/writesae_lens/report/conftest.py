import pytest

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
