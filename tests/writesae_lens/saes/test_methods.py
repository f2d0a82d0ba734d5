"""Every method of SAELens's SAE on matrices: the dense formulas' numbers, or a refusal without effect."""

import copy
import io
import pickle

import pytest
import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.synthetic import FeatureDictionary, init_sae_to_match_feature_dict

from tests.writesae_lens.saes.steps import D_K, D_V, step_input
from writesae_lens import WriteSAE, WriteSAEConfig, WriteSAEError, WriteSAETrainingConfig, WriteTrainingSAE

D_SAE, K, D_IN = 24, 3, D_K * D_V
ACTIVATIONS = ("topk", "batchtopk", "jumprelu", "gated")
MEMBERS = [
    {"encoder": encoder, "activation": activation} | decoder
    for encoder, decoder in (
        ("bilinear", {"rank": 1}),
        ("tied", {"rank": 2}),
        ("dense", {"decoder": "dense"}),
    )
    for activation in (*ACTIVATIONS, "topk_of_batch")
]


def name_of(options):
    return "-".join(str(value) for value in options.values())


def sae_of(**options):
    """An SAE for inference in float64 whose every parameter is off its start."""
    torch.manual_seed(1)
    config = {"d_k": D_K, "d_v": D_V, "d_sae": D_SAE, "k": K, "dtype": "float64"}
    sae = WriteSAE(WriteSAEConfig(**(config | options)))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return sae


def writes(n=40, seed=2):
    rng = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(n, d, generator=rng, dtype=torch.float64) for d in (D_K, D_V))
    return torch.einsum("nk,nv->nkv", key, value).flatten(1)


def restated(sae, x):
    """Coefficients and reconstruction from the matrices W_enc and W_dec, in float64."""
    copied = copy.deepcopy(sae).to(dtype=torch.float64)
    atoms, encoder = copied.W_dec.detach(), copied.W_enc.detach()
    norms = atoms.norm(dim=-1)
    z = (x.double() @ encoder + copied.b_enc.detach()) * norms
    parts = {n: p.detach() for n, p in copied.activation_fn.named_parameters()}
    if sae.cfg.activation == "topk":
        acts = torch.zeros_like(z).scatter(-1, z.topk(K).indices, z.topk(K).values.relu())
    elif sae.cfg.activation == "topk_of_batch":
        best = z.relu().flatten().topk(K * len(z))
        acts = torch.zeros_like(z).flatten().scatter(-1, best.indices, best.values).view_as(z)
    elif sae.cfg.activation == "gated":
        opened = (z + parts["gate_bias"] > 0).to(z)
        acts = (parts["log_gain"].exp() * z + parts["magnitude_bias"]).relu() * opened
    else:
        acts = z * (z > parts["log_threshold"].exp())
    return acts / norms, (acts / norms) @ atoms + copied.b_dec.detach()


def check(sae, x, tolerance=1e-9):
    with torch.no_grad():
        acts, out = restated(sae, x)
        limit = {"atol": tolerance * float(out.abs().max()), "rtol": tolerance}
        torch.testing.assert_close(sae.encode(x).double(), acts, **limit)
        torch.testing.assert_close(sae(x).double(), out, **limit)


def refused(sae, call, error=(WriteSAEError, NotImplementedError), match=None):
    """A refusal in one line, after which the SAE is what it was."""
    before = copy.deepcopy(sae.state_dict()), str(sae.cfg.to_dict()), sae.dtype, sae.device
    with pytest.raises(error, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert sae.state_dict().keys() == before[0].keys()
    assert all(torch.equal(value, before[0][name]) for name, value in sae.state_dict().items())
    assert (str(sae.cfg.to_dict()), sae.dtype, sae.device) == before[1:]


@pytest.mark.parametrize("options", MEMBERS, ids=name_of)
def test_whitening_and_head_reshaping_are_refused_and_folds_change_no_function(options):
    sae, x = sae_of(**options), writes()
    check(sae, x)
    whitening = torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T) + torch.eye(D_IN)))
    refused(
        sae,
        lambda: sae.fold_activation_whitening(x.mean(0), whitening, torch.linalg.inv(whitening)),
        match="whiten",
    )
    refused(sae, sae.turn_on_forward_pass_hook_z_reshaping, match="reshaping")
    acts, out = restated(sae, x)
    norms = sae.W_dec.detach().norm(dim=-1)
    with torch.no_grad():
        sae.fold_W_dec_norm()
        torch.testing.assert_close(sae.encode(x), acts * norms)
        torch.testing.assert_close(sae(x), out)
        sae.fold_activation_norm_scaling_factor(3.0)
        torch.testing.assert_close(sae(x / 3.0) * 3.0, out)
    check(sae, x / 3.0)
    assert torch.equal(sae.run_time_activation_norm_fn_out(x), x)


@pytest.mark.parametrize("factor", [0.0, -2.0, float("nan"), float("inf")])
def test_a_scale_that_is_none_is_refused(factor):
    sae = sae_of()
    refused(sae, lambda: sae.fold_activation_norm_scaling_factor(factor), match="positive and finite")


@pytest.mark.parametrize("options", MEMBERS, ids=name_of)
@pytest.mark.parametrize("convert", ["half", "bfloat16", "float", "double"])
def test_torchs_own_conversions_reach_the_whole_sae(options, convert):
    """``half()`` and the like change the parameters; inputs, config and reconstruction follow."""
    sae, x = sae_of(**options), writes()
    expected = restated(sae, x)[1]
    converted = getattr(sae, convert)()
    kind = next(converted.parameters()).dtype
    assert (converted.dtype, converted.cfg.dtype) == (kind, str(kind).removeprefix("torch."))
    out = converted(x)
    assert out.dtype == kind
    if kind.itemsize >= 4:
        check(converted, x, 1e-4)
    else:
        error = (out.detach().double() - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert float(error.median()) < 0.1
    assert converted.decode(converted.encode(x).double()).dtype == kind  # coefficients of another dtype


def test_a_device_or_dtype_that_cannot_be_leaves_the_sae_as_it_is():
    sae = sae_of()
    refused(sae, lambda: sae.to("no_such_device"), RuntimeError)
    refused(sae, lambda: sae.to(torch.int8), ValueError)
    if not torch.cuda.is_available():
        refused(sae, lambda: sae.to("cuda"), (AssertionError, RuntimeError))


@pytest.mark.parametrize(
    "change",
    [
        lambda sae: setattr(sae, "W_dec", torch.zeros(D_SAE, D_IN)),
        lambda sae: setattr(sae, "W_enc", torch.nn.Parameter(torch.zeros(D_IN, D_SAE))),
        lambda sae: setattr(sae.W_dec, "data", torch.zeros(D_SAE, D_IN)),
        lambda sae: sae.W_dec.__setitem__(0, 0.0),
        lambda sae: sae.W_dec.data.__imul__(2),
        lambda sae: sae.W_enc.data.copy_(torch.zeros(D_IN, D_SAE)),
        lambda sae: sae.W_enc.detach_().zero_(),
        lambda sae: torch.nn.init.kaiming_uniform_(sae.W_dec),
        lambda sae: init_sae_to_match_feature_dict(sae, FeatureDictionary(D_SAE, D_IN)),
    ],
)
@pytest.mark.parametrize("decoder", ["factored", "dense"])
def test_a_change_of_the_built_matrices_is_refused_rather_than_lost(decoder, change):
    sae = sae_of(decoder=decoder, dtype="float32")
    refused(sae, lambda: change(sae), match="W_dec and W_enc of a WriteSAE are built anew")


def test_built_matrices_are_ordinary_tensors_to_read():
    sae = sae_of()
    atoms = torch.einsum("frk,frv->fkv", sae.dec_key, sae.dec_value).flatten(1)
    torch.testing.assert_close(sae.W_dec, atoms, check_stride=False)
    row = sae.W_dec[3]
    row *= 2  # the reader's own
    torch.testing.assert_close(row, 2 * atoms[3])
    unit = sae.W_dec.detach().clone()
    unit /= unit.norm(dim=-1, keepdim=True)
    assert torch.zeros(D_SAE, D_IN).double().add_(sae.W_dec).shape == atoms.shape
    (sae.W_dec @ torch.ones(D_IN, 2).double()).sum().backward()
    assert float(sae.dec_key.grad.abs().max()) > 0
    compiled = torch.compile(lambda w: (w * w).sum(), backend="eager")
    torch.testing.assert_close(compiled(sae.W_dec), (atoms * atoms).sum())


@pytest.mark.parametrize("kind", ["none", "layer_norm", "constant_norm_rescale"])
def test_copies_files_and_threads_of_pickles_are_the_same_sae(kind):
    sae, x = sae_of(normalize_activations=kind), writes()
    file = io.BytesIO()
    torch.save(sae, file)
    file.seek(0)
    expected = sae(x)
    again = torch.load(file, weights_only=False)
    for twin in (copy.deepcopy(sae), pickle.loads(pickle.dumps(sae)), again):
        acts = twin.encode(x)
        sae(2 * x)  # another's batch in between
        torch.testing.assert_close(twin.decode(acts), expected)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["none", "layer_norm", "constant_norm_rescale"])
def test_zero_and_undefined_rows_leave_the_others_alone(kind, activation, dtype):
    sae = sae_of(normalize_activations=kind, activation=activation, dtype=dtype)
    x = writes(8).to(sae.dtype)
    expected = torch.cat([sae(row[None]) for row in x]).detach()
    x[2], x[5] = 0, float("nan")
    out = sae(x)
    whole = [0, 1, 3, 4, 6, 7]
    torch.testing.assert_close(
        out[whole], expected[whole], atol=0.1 if dtype == "float16" else 1e-4, rtol=1e-3
    )
    assert bool(out[2].isfinite().all())
    assert bool(out[5].isnan().all())


def test_an_undefined_row_takes_no_atoms_from_a_batch():
    sae, x = sae_of(activation="topk_of_batch"), writes(8)
    expected = sae.encode(torch.cat([x[:3], x[4:]]))
    x[3] = float("nan")
    acts = sae.encode(x)
    torch.testing.assert_close(torch.cat([acts[:3], acts[4:]]), expected)
    assert bool(acts[3].isnan().all())


def test_a_reconstruction_at_run_time_norms_needs_its_batch():
    sae, x = sae_of(normalize_activations="layer_norm"), writes()
    with pytest.raises(WriteSAEError, match="encode first"):
        sae.decode(torch.zeros(3, D_SAE))
    sae.encode(x)
    with pytest.raises(WriteSAEError, match=r"expected one of shape \(3,\), found one of shape \(40,\)"):
        sae.decode(torch.zeros(3, D_SAE))
    refused(sae, lambda: sae.fold_activation_norm_scaling_factor(2.0), NotImplementedError, "at run time")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.encode(torch.ones(2, D_IN).cfloat()), "complex64"),
        (lambda s: s.decode([1.0]), "got a list"),
        (lambda s: s.decode(torch.tensor(1.0)), r"24 atoms, got shape \(\)"),
        (lambda s: s.encode_factors(torch.ones(2, D_V), torch.ones(2, D_K)), r"6 x 9 writes.*\(2, 9\)"),
        (lambda s: s.encode_factors(torch.ones(2, D_K), torch.ones(3, D_V)), r"shapes \(2, 6\) and \(3, 9\)"),
    ],
)
def test_inputs_that_are_none_are_named(unchecked, call, message):
    sae = sae_of()
    refused(sae, lambda: call(sae), WriteSAEError, message)


# In training


def training(**options):
    torch.manual_seed(0)
    config = {"d_k": D_K, "d_v": D_V, "d_sae": D_SAE, "k": K, "init_from_writes": False}
    return WriteTrainingSAE(WriteSAETrainingConfig(**(config | options)))


@pytest.mark.parametrize("kind", ["none", "constant_norm_rescale"])
def test_only_training_steps_move_the_threshold_of_batchtopk(kind):
    sae = training(activation="batchtopk", aux_loss_coefficient=0.0, normalize_activations=kind)
    x = writes().float()
    sae.training_forward_pass(step_input(x))
    held = sae.activation_fn.log_threshold.clone()
    sae(3 * x)
    sae.encode(3 * x)
    assert torch.equal(sae.activation_fn.log_threshold, held)
    sae.training_forward_pass(step_input(3 * x))
    assert not torch.equal(sae.activation_fn.log_threshold, held)


@pytest.mark.parametrize("kind", ["none", "layer_norm"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_training_that_diverges_says_so_and_saves_nothing(activation, kind, tmp_path):
    if (activation, kind) == ("gated", "layer_norm"):
        pytest.skip("refused by the config")
    sae = training(activation=activation, aux_loss_coefficient=0.0, normalize_activations=kind)
    sae.training_forward_pass(step_input(writes().float())).loss.backward()
    with torch.no_grad():
        sae.dec_key += float("inf")  # a step of an infinite learning rate
    with pytest.raises(WriteSAEError, match=r"the loss of step 7 is not finite .*diverged"):
        sae.training_forward_pass(step_input(writes().float(), step=7))
    with pytest.raises(
        WriteSAEError, match="diverged: dec_key hold NaN or infinite numbers, and nothing was saved"
    ):
        sae.save_inference_model(tmp_path / "sae")
    assert not (tmp_path / "sae").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "float16 Adam divides zero by zero"),
        ({"dtype": torch.float16}, "float16 Adam divides zero by zero"),
        ({"decoder_init_norm": 1.0}, "decoder_init_norm=1.0 would have no effect"),
        ({"normalize_activations": "covariance_whitening"}, "no longer rank 1"),
    ],
)
def test_options_that_cannot_be_followed_are_refused(options, message):
    with pytest.raises(WriteSAEError, match=message):
        training(**options)


@pytest.mark.parametrize(
    "options",
    [{"rescale_acts_by_decoder_norm": False}, {"activation": "gated", "gate_temperature": 0.1}]
    + [{"activation": "topk_of_batch"}],
    ids=name_of,
)
def test_an_sae_that_no_training_makes_cannot_be_trained_on(options, tmp_path):
    sae_of(**options).save_model(tmp_path)
    with pytest.raises(WriteSAEError, match="cannot be trained on"):
        TrainingSAE.load_from_disk(tmp_path)
    assert isinstance(SAE.load_from_disk(tmp_path), WriteSAE)


def test_weights_of_another_size_are_named_in_training_too(tmp_path):
    training(d_sae=20).save_model(tmp_path)
    with pytest.raises(WriteSAEError, match=r"dec_key of shape \[20, 1, 6\] instead of \[24, 1, 6\]"):
        training().load_weights_from_checkpoint(tmp_path)
