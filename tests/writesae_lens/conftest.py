import jaxtyping
import pytest
import torch

from writesae_lens import WriteSAETrainingConfig, WriteTrainingSAE


@pytest.fixture
def unchecked():
    """Without the suite's run-time type checks, which users do not have and the compiler cannot trace."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture
def make_sae():
    """A training SAE in float64 with every parameter away from its starting value."""

    def make(**options) -> WriteTrainingSAE:
        torch.manual_seed(0)
        options = {"d_k": 6, "d_v": 9, "d_sae": 40, "k": 4, "init_from_writes": False} | options
        sae = WriteTrainingSAE(WriteSAETrainingConfig(**options))
        sae = sae.to(dtype=torch.float64)
        with torch.no_grad():
            for parameter in sae.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            if not sae.cfg.decoder_bias:
                sae.b_dec.zero_()
            if sae.cfg.encoder == "tied":
                sae.enc_gain.fill_(0.6)
            sae.fold_W_dec_norm()
        return sae

    return make


@pytest.fixture
def writes():
    """Flattened rank-1 matrices [32, 6 * 9] in float64."""
    rng = torch.Generator().manual_seed(1)
    key = torch.randn(32, 6, 1, generator=rng, dtype=torch.float64)
    value = torch.randn(32, 1, 9, generator=rng, dtype=torch.float64)
    return (key * value).flatten(1)
