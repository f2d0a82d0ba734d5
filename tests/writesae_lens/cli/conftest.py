import pytest

from hooked_models import HookedRecurrent, zoo
from tests.writesae_lens.native_sae import sae_of_writes


@pytest.fixture(scope="session")
def sae_folder(tmp_path_factory):
    """An SAE of 48 atoms on a cell of tiny-gdn, in a folder as SAELens writes it."""
    model = HookedRecurrent.boot_transformers("tiny-gdn", device="cpu")
    ids = model.to_tokens(zoo.held_out_text()[-8000:], prepend_bos=False, truncate=False)[:, 10:400]
    folder = tmp_path_factory.mktemp("sae")
    sae_of_writes(model, 1, 2, ids, d_sae=48, context_size=32).save_model(folder)
    return folder
