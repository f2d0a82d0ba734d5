import signal

import pytest
from sae_lens import TrainingSAE

from hooked_models import HookedRecurrent, zoo
from tests.writesae_lens.saelens.runs import CELLS, CONTEXT, EARLY, Run, checkpoints, sae_config


@pytest.fixture(autouse=True)
def own_signals():
    """SAELens's runners replace the handlers of interrupts and leave theirs in place."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def models():
    """Every shipped model, shared: leave no hook behind."""
    return {name: HookedRecurrent.boot_transformers(name, device="cpu") for name in CELLS}


@pytest.fixture(scope="session")
def model(models):
    return models["tiny-gdn"]


@pytest.fixture(scope="session")
def token_rows(models):
    """Rows [n, CONTEXT] of held-out text for each model, some with <|endoftext|> in them."""
    rows = {}
    for name, model in models.items():
        tokens = model.to_tokens(zoo.held_out_text()[:30_000], prepend_bos=False, truncate=False)[0]
        rows[name] = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    return rows


@pytest.fixture(scope="session")
def rows(token_rows):
    """Those of tiny-gdn."""
    return token_rows["tiny-gdn"]


@pytest.fixture(scope="session")
def runs(models, token_rows, tmp_path_factory):
    """runs(model_name) -> one trained SAE of a shipped model, shared by the tests of this folder."""
    done = {}

    def get(name):
        if name not in done:
            cell = models[name].cell(*CELLS[name])
            done[name] = Run(
                tmp_path_factory.mktemp(name),
                token_rows[name],
                model_name=name,
                hook_name=models[name].write_hook_name(cell.layer, cell.head),
                sae=sae_config(d_k=cell.d_k, d_v=cell.d_v),
                n_checkpoints=2,
            )
        return done[name]

    return get


@pytest.fixture(scope="session")
def run(runs):
    return runs("tiny-gdn")


@pytest.fixture(scope="session")
def early(run):
    """The shared SAE as it was at its first checkpoint, for runs that end there."""
    return TrainingSAE.load_from_disk(checkpoints(run.runner)[EARLY])
