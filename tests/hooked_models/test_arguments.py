"""Arguments of the public methods of a model take effect, or are refused by name in one line."""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import Any

import pytest
import torch
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from torch import Tensor, nn

from hooked_models import HookedModelError, HookedRecurrent, zoo
from hooked_models.bridge import arguments
from tests.hooked_models.architectures import assert_close, nothing, refused, sae_at

TEXT, SHORT = "It is a truth universally acknowledged", "It"
NO_DRAWING = {"do_sample": False, "verbose": False, "max_new_tokens": 4}


@pytest.fixture(scope="module", params=zoo.SHIPPED)
def model(request: pytest.FixtureRequest) -> Any:
    return HookedRecurrent.boot_transformers(request.param, device="cpu").requires_grad_(False)


@pytest.fixture(scope="module")
def gdn() -> Any:
    return HookedRecurrent.boot_transformers("tiny-gdn", device="cpu").requires_grad_(False)


def write(model: Any, cell: int = 0) -> str:
    return model.write_hook_name(model.cells[cell].layer, model.cells[cell].head)


def refuses_each(name: str, method: Any, *args: Any, **cases: Any) -> None:
    """Each keyword, with each of its values, is refused by its name, and leaves no hook."""
    for argument, values in cases.items():
        for value in values:
            with refused(argument):
                method(*args, **{argument: value})


# One check of the signature for all methods.


BRIDGES = SAETransformerBridge.__mro__[: SAETransformerBridge.__mro__.index(nn.Module)]
PUBLIC = {x: None for owner in BRIDGES for x in vars(owner) if x[0] != "_"}
METHODS = [x for x in PUBLIC if inspect.isfunction(getattr(HookedRecurrent, x)) and x != "diffusion_generate"]


def test_the_methods_of_the_bridges_are_those_that_are_checked():
    assert {"generate", "run_with_cache", "run_with_saes", "to_tokens", "reset_hooks", "add_sae"} <= set(
        METHODS
    )


def _entered(result: Any) -> None:
    """Context managers and generators begin to work only when they are used."""
    if hasattr(result, "__enter__"):
        result.__enter__()
    next(iter(result), None)


@pytest.mark.parametrize("name", METHODS)
def test_every_public_method_refuses_a_misspelt_keyword(gdn, name):
    method = getattr(gdn, name)
    required = [
        p.name
        for p in inspect.signature(method).parameters.values()
        if p.default is p.empty and p.kind in (0, 1)
    ]
    values = {"input": gdn.to_tokens(TEXT), "names_filter": None, "logits": torch.zeros(1, 2, 3)}
    values |= {"name": write(gdn), "hook_fn": nothing, "sae": sae_at(write(gdn), 1536)}
    given = {name: values.get(name) for name in required}
    positional = [gdn.to_tokens(TEXT)] if name.startswith("run_with") and "input" not in given else []
    with pytest.raises((HookedModelError, TypeError), match="no_such_keyword"):
        _entered(method(*positional, **given, no_such_keyword=1))
    gdn.reset_saes()
    assert not gdn.busy_hooks


@pytest.mark.parametrize(("argument", "other"), [("fwd_hooks", "run_with_hooks"), ("saes", "run_with_saes")])
def test_an_argument_of_another_method_is_refused_with_the_name_of_that_method(gdn, argument, other):
    with refused(f"run_with_cache takes no argument '{argument}', which {other} has"):
        gdn.run_with_cache(gdn.to_tokens(TEXT), **{argument: []})


@pytest.mark.parametrize("name", sorted(arguments.RULES))
def test_rules_exclude_what_is_of_another_kind(name):
    rule = arguments.RULES[name]
    assert not rule.holds(object())
    for value in (float("nan"), [object()], b"x"):
        assert not rule.holds(value)


def test_errors_keep_their_kind():
    for kind in (KeyError, AttributeError, AssertionError, RuntimeError, TypeError, ValueError):
        with pytest.raises(kind) as caught, arguments.refusals("method", "advice"):
            raise kind("two\nlines")
        assert isinstance(caught.value, HookedModelError)
        assert str(caught.value) == "method: two lines; advice"


# Generation.


def test_generate_refuses_what_it_would_ignore(gdn):
    tokens = gdn.to_tokens(TEXT)
    impossible: dict[str, Any] = {
        "max_new_tokens": (-1, 0, 2.5, True, "3"),
        "top_k": (0, -1, 2.5),
        "top_p": (0, 1.5),
    }
    impossible |= {"temperature": (-1.0, float("nan"), "1"), "freq_penalty": (-1.0,), "do_sample": ("no",)}
    impossible |= {
        "repetition_penalty": (0, -1.0),
        "return_type": ("x", None, "logits"),
        "stop_strings": ("",),
    }
    impossible |= {
        "eos_token_id": (-1, 10**6, "a", []),
        "padding_side": ("middle",),
        "prepend_bos": (True, "yes"),
    }
    impossible |= {"names_filter": ("x",), "device": ("cpu",), "top_kk": (3,), "past_key_values": (None,)}
    impossible |= {"stop_at_layer": (1,), "labels": (tokens,), "num_beams": (2,), "use_cache": (True,)}
    impossible |= {"attention_mask": (torch.ones(1, 3),), "pixel_values": (tokens,)}
    refuses_each("generate", gdn.generate, tokens, **impossible)
    for given in ({"top_k": 3}, {"temperature": 0.5}, {"freq_penalty": 1.0}, {"top_p": 0.5}):
        with refused(*given):
            gdn.generate(tokens, do_sample=False, **given)
    with refused("top_p"):
        gdn.generate(tokens, top_k=3, top_p=0.5)
    assert gdn.hf_generate(tokens, top_k=3, top_p=0.5, max_new_tokens=2).shape[1] <= tokens.shape[1] + 2
    with refused("eos_token_id"):
        gdn.generate(tokens, eos_token_id=torch.tensor(0))
    with refused("eos_token_id"):
        gdn.generate(tokens, stop_at_eos=False, eos_token_id=3)
    with refused("return_type"):
        gdn.generate(tokens, output_logits=True, return_type="str")
    for prompt in (None, [], [[1, 2]], 3, b"text"):
        with refused("input"):
            gdn.generate(prompt)
    with refused("padding_side"):
        gdn.generate([TEXT, SHORT], padding_side="right")
    refuses_each(
        "stream", gdn.generate_stream, tokens, padding_side=("left",), max_new_tokens=(0,), top_kk=(1,)
    )
    refuses_each("hf", gdn.hf_generate, tokens, top_kk=(3,), return_type=("x",), stop_at_eos=(False,))


def test_generate_gives_one_result_for_one_prompt(model):
    """Whatever it is given as; with and without a cache; of transformers and of TransformerLens."""
    tokens = model.to_tokens(TEXT)
    expected = model.generate(tokens, **NO_DRAWING)
    text = model.tokenizer.decode(expected[0], skip_special_tokens=True)
    for other in ({"use_past_kv_cache": False}, {"temperature": 0}, {"stop_at_eos": False}):
        assert torch.equal(model.generate(tokens[0], **NO_DRAWING, **other), expected)
    assert model.generate(tokens, **NO_DRAWING, return_type="str") == text
    streamed = model.generate_stream(tokens, **NO_DRAWING)
    assert torch.equal(torch.cat(list(streamed), dim=1), expected)
    of_transformers = {"do_sample": False, "max_new_tokens": 4}
    assert torch.equal(model.hf_generate(tokens, **of_transformers), expected)
    assert torch.equal(model.hf_generate(tokens, **of_transformers, use_past_kv_cache=False), expected)
    assert model.hf_generate(TEXT, **of_transformers) == text
    assert model.hf_generate(tokens, **of_transformers, return_type="str") == text


def test_penalties_are_honoured_without_a_cache(model):
    """Mamba-2 without a cache used to be handed over to transformers, and its arguments dropped."""
    tokens = model.to_tokens(TEXT)
    options = NO_DRAWING | {"repetition_penalty": 1e6, "max_new_tokens": 8}
    found = model.generate(tokens, **options, use_past_kv_cache=False)
    assert torch.equal(found, model.generate(tokens, **options))
    assert len(set(found[0].tolist())) == len(set(tokens[0].tolist())) + 8


@pytest.mark.parametrize("prepend_bos", [None, False, True])
@torch.no_grad()
def test_texts_in_a_batch_are_read_as_alone(model, prepend_bos):
    """Padding is told from a BOS token that is the same token, on either side, in logits and loss."""
    texts = [TEXT, SHORT]
    alone = [model(text, prepend_bos=prepend_bos)[0] for text in texts]
    losses = [model(x, prepend_bos=prepend_bos, return_type="loss", loss_per_token=True)[0] for x in texts]
    for side in ("left", "right"):
        together = model(texts, prepend_bos=prepend_bos, padding_side=side)
        for row, expected in zip(together, alone, strict=True):
            count = len(expected)
            assert_close(row[-count:] if side == "left" else row[:count], expected)
        loss = model(texts, prepend_bos=prepend_bos, padding_side=side, return_type="loss")
        assert_close(loss, torch.cat(losses).mean())
    together = model.generate(texts, prepend_bos=prepend_bos, **NO_DRAWING)
    assert together == [model.generate(text, prepend_bos=prepend_bos, **NO_DRAWING) for text in texts]


def test_transformers_reads_texts_as_generate_does(model):
    options = {"do_sample": False, "max_new_tokens": 4}
    expected = model.generate([TEXT, SHORT], **NO_DRAWING)
    assert model.hf_generate([TEXT, SHORT], **options) == expected


# Running with a cache of activations, hooks and SAEs.


def test_run_with_cache_refuses_what_it_would_ignore(gdn):
    tokens, name = gdn.to_tokens(TEXT), write(gdn)
    cases: dict[str, Any] = {
        "fwd_hooks": ([(name, nothing)], []),
        "bwd_hooks": ([],),
        "use_error_term": (True,),
    }
    cases |= {"names_filter": ([], (), [nothing, name]), "stop_at_layer": (5, -5, 1.0, True, "1")}
    cases |= {"start_at_layer": (1,), "return_type": ("x", "predictions"), "prepend_bos": (True,)}
    cases |= {
        "padding_side": ("left",),
        "loss_per_token": (True,),
        "incl_bwd": (True, 1),
        "name_filter": (name,),
    }
    cases |= {"pos_slice": (99, -99, "x", [1, 99]), "saes": ([],), "return_cache_object": (None,)}
    refuses_each("run_with_cache", gdn.run_with_cache, tokens, **cases)
    with refused("remove_batch_dim"):
        gdn.run_with_cache(tokens.repeat(2, 1), remove_batch_dim=True, return_cache_object=False)
    with_bos = gdn.to_tokens(TEXT, prepend_bos=True)  # of which prepend_bos=True holds already
    assert torch.equal(gdn.run_with_cache(with_bos, names_filter=name, prepend_bos=True)[0], gdn(with_bos))
    with refused("stop_at_layer", "unembed"):
        gdn.run_with_cache(tokens, names_filter="unembed.hook_out", stop_at_layer=2)
    with refused("device"):
        gdn.run_with_cache(tokens, names_filter=name, device="nowhere")
    assert not gdn.busy_hooks


@torch.no_grad()
def test_run_with_cache_honours_what_it_takes(model):
    tokens, name = model.to_tokens(TEXT), write(model)
    logits, cache = model.run_with_cache(tokens, names_filter=name)
    expected = cache[name]
    for names in ((name,), {name}, iter([name]), lambda x: x == name):
        assert torch.equal(model.run_with_cache(tokens, names_filter=names)[1][name], expected)
    for chosen, part in ((-1, expected[:, -1:]), ((1, 3), expected[:, 1:3]), ([2, 0], expected[:, [2, 0]])):
        cache = model.run_with_cache(tokens, names_filter=name, pos_slice=chosen)[1]
        assert torch.equal(cache[name], part)
    found, cache = model.run_with_cache(TEXT, names_filter=name, padding_side="left", remove_batch_dim=True)
    assert torch.equal(found, logits)
    assert torch.equal(cache[name], expected[0])
    last = model.run_with_cache(tokens, names_filter=name, stop_at_layer=len(model.blocks))
    assert torch.equal(last[1][name], expected)


def test_run_with_hooks_refuses_what_it_would_ignore(gdn):
    tokens, name, late = gdn.to_tokens(TEXT), write(gdn), write(gdn, -1)
    cases: dict[str, Any] = {"names_filter": (name,), "fwd_hook": ([],), "dir": ("bwd",), "pos_slice": (1,)}
    cases |= {"stop_at_layer": (5, -5), "clear_contexts": (3,)}
    refuses_each("run_with_hooks", gdn.run_with_hooks, tokens, **cases)
    for hooks in (None, {name: nothing}, [(name, None)], [(name, lambda x: x)], [name], "name"):
        for run in (
            lambda hooks=hooks: gdn.run_with_hooks(tokens, fwd_hooks=hooks),
            lambda h=hooks: gdn.hooks(h),
        ):
            with refused("function"):
                run()
    with refused("stop_at_layer"):
        gdn.run_with_hooks(tokens, fwd_hooks=[(late, nothing)], stop_at_layer=1)
    with refused("remove_batch_dim"):
        gdn.run_with_hooks(tokens.repeat(2, 1), fwd_hooks=[(name, nothing)], remove_batch_dim=True)
    for given in ({"dir": "backward"}, {"level": 1}, {"is_permanent": "yes"}):
        with refused(*given):
            gdn.add_hook(name, nothing, **given)
    with refused("function"):
        gdn.add_hook(name, None)
    with refused("direction"):
        gdn.reset_hooks(direction="forward")
    assert not gdn.busy_hooks


@torch.no_grad()
def test_hooks_see_one_row_without_its_axis(model):
    tokens, name, shapes = model.to_tokens(TEXT), write(model), []

    def silence(x: Tensor, hook: Any) -> Tensor:
        shapes.append(x.ndim)
        return 0 * x

    expected = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: 0 * x)])
    found = model.run_with_hooks(tokens, fwd_hooks=[(name, silence)], remove_batch_dim=True)
    assert torch.equal(found, expected)
    assert shapes == [2]
    unchanged = model.run_with_hooks(tokens, fwd_hooks=[(name, nothing)], remove_batch_dim=True)
    assert torch.equal(unchanged, model(tokens))


def test_saes_that_would_not_run_are_refused(gdn):
    tokens, name = gdn.to_tokens(TEXT), write(gdn)
    sae, other = sae_at(name, 1536), sae_at(name, 1536, seed=1)
    for saes, part in (
        ([sae, other], "two SAEs"),
        ([sae, sae], "two SAEs"),
        (None, "saes"),
        ({name: sae}, "saes"),
    ):
        with refused(part):
            gdn.run_with_saes(tokens, saes=saes)
    refuses_each(
        "run_with_saes",
        gdn.run_with_saes,
        tokens,
        exclude_special_tokens=([1],),
        sae=(sae,),
        use_error_term=("no",),
    )
    with refused("return_type"):
        gdn.run_with_saes(tokens, [sae])
    other.cfg.metadata.hook_name_out = "blocks.0.nowhere"
    with refused("blocks.0.nowhere"):
        gdn.run_with_saes(tokens, saes=[other])
    with refused("nowhere"):
        gdn.reset_saes("nowhere")
    assert gdn.acts_to_saes == {}
    assert not gdn.busy_hooks


@torch.no_grad()
def test_a_hook_where_an_sae_stands_is_refused(gdn):
    """TransformerLens leaves it out: its hook point is gone while the SAE is there."""
    tokens, name = gdn.to_tokens(TEXT), write(gdn)
    with gdn.saes([sae_at(name, 1536)]):
        for run in (
            lambda: gdn.run_with_cache(tokens, names_filter=name),
            lambda: gdn.run_with_hooks(tokens, fwd_hooks=[(name, nothing)]),
            lambda: gdn.add_hook(name, nothing),
        ):
            with refused(f"an SAE stands in the place of {name}", "hook_sae_acts_post"):
                run()
        cache = gdn.run_with_cache(tokens, names_filter=f"{name}.hook_sae_acts_post")[1]
        assert len(cache) == 1


# Text and tokens.


def test_texts_and_tokens_that_are_none(gdn):
    for text in (None, 3, [], ["a", None], b"a", [1, 2], torch.zeros(1, 2)):
        with refused("to_tokens", "text"):
            gdn.to_tokens(text)
    for text in ("\ud800", "a\udc00b", ["a", "\ud83d"]):
        for read in (gdn.to_tokens, gdn, gdn.generate, gdn.to_str_tokens):
            with refused("surrogate"):
                read(text)
    for tokens in (torch.tensor([-1]), torch.tensor([10**6]), torch.tensor([1.5]), "a b", None):
        for read in (gdn.to_string, gdn.tokens_to_residual_directions):
            with refused(read.__name__ if tokens != "a b" else "to_"):
                read(tokens)
    with pytest.raises(AssertionError, match="single token"):
        gdn.to_single_token(TEXT)
    with refused("prepend_bos"):
        gdn.to_str_tokens(torch.tensor([1, 2]), prepend_bos=True)
    with refused("loss_fn", "positions"):
        gdn.loss_fn(torch.zeros(1, 4, 2048), torch.zeros(1, 3, dtype=torch.long))


@torch.no_grad()
def test_a_model_without_a_tokenizer(gdn):
    """It reads tokens; text is refused in one line, wherever it is given."""
    tokens, tokenizer = gdn.to_tokens(TEXT), gdn.tokenizer
    expected = gdn.generate(tokens, **NO_DRAWING, stop_at_eos=False)
    gdn.tokenizer = None
    try:
        for read in (
            gdn,
            gdn.generate,
            gdn.to_tokens,
            gdn.run_with_cache,
            gdn.run_with_hooks,
            gdn.to_str_tokens,
        ):
            for text in (TEXT, [TEXT, SHORT]):
                with refused("tokenizer"):
                    read(text)
        for read in (gdn.to_string, gdn.hf_generate):
            with refused("tokenizer"):
                read(tokens)
        assert torch.equal(gdn.generate(tokens, **NO_DRAWING, stop_at_eos=False), expected)
        assert torch.equal(gdn.generate(tokens, **NO_DRAWING, eos_token_id=0), expected)
    finally:
        gdn.tokenizer = tokenizer


# The activation cache, and weights that a recurrent layer has not.


@torch.no_grad()
def test_the_residual_stream_is_the_sum_of_its_components(model):
    _, cache = model.run_with_cache(model.to_tokens(TEXT))
    count = len(model.blocks)
    for layer in range(count + 1):
        parts, labels = cache.decompose_resid(layer, return_labels=True)
        assert len(parts) == len(labels) == len(set(labels))
        stream = cache[f"blocks.{layer}.hook_in"] if layer < count else cache[f"blocks.{count - 1}.hook_out"]
        assert_close(parts.sum(0), stream)
    start = getattr(model.blocks[0], "pre_norm", lambda x: x)  # of RWKV-7
    assert_close(cache.decompose_resid(1)[0], start(cache["hook_embed"]))
    whole = cache.decompose_resid()
    assert torch.equal(cache.decompose_resid(pos_slice=-1), whole[:, :, -1])
    kinds = sum(
        len(cache.decompose_resid(mode=mode, incl_embeds=False)) for mode in ("attn", "mlp") if count != 5
    )
    assert kinds == (len(whole) - 1 if count != 5 else 0)
    for wrong in (
        {"layer": 99},
        {"mode": "heads"},
        {"layer": count, "mlp_input": True},
    ):
        with refused("decompose_resid"):
            cache.decompose_resid(**wrong)


@torch.no_grad()
def test_what_the_activation_cache_has_not(model):
    _, cache = model.run_with_cache(model.to_tokens(TEXT))
    with refused("stack_head_results"):
        cache.compute_head_results()
    if not any("mlp" in name for name, _ in model.blocks[0].named_children()):
        with refused("decompose_resid"):
            cache.accumulated_resid(incl_mid=True)
    for key in ("nothing", ("q", 0), "blocks.0.attn.hook_z"):
        with refused("not cached") as error:
            cache[key]
        assert isinstance(error.value, KeyError)
    assert "nothing" not in cache.keys()  # noqa: SIM118  (the cache has no `in`)


def test_weights_that_a_model_has_not(model):
    for name in ("b_O", "b_in") if model.has_attention else ("W_Q", "QK", "b_O", "b_in"):
        with refused(name, "model.original_model") if name != "QK" else refused("W_Q"):
            getattr(model, name)
    for mode in ("x",) if model.has_attention else ("Q", "K", "x"):
        with refused("all_composition_scores"):
            model.all_composition_scores(mode)
    assert model.W_U.shape == model.W_E.T.shape
    assert not hasattr(model, "W_nothing")
    for other in ("from_pretrained_no_processing", "boot_native"):
        with refused("boot_transformers"):
            getattr(HookedRecurrent, other)("tiny-gdn")


def test_from_pretrained_is_another_name_of_boot_transformers():
    model = HookedRecurrent.from_pretrained("tiny-gdn", device="cpu", dtype="float64")
    assert isinstance(model, HookedRecurrent)
    assert (model.cfg.model_name, model.cfg.dtype) == ("tiny-gdn", torch.float64)
    with refused("fold_ln", "enable_compatibility_mode"):
        HookedRecurrent.from_pretrained("tiny-gdn", fold_ln=True)


def test_query_weights_are_parted_from_those_of_a_gate_or_refused(gdn):
    """Qwen3.5's projection makes queries and gates, head by head. TransformerLens 3.9 cannot part them."""
    projection = gdn.original_model.model.layers[2].self_attn.q_proj
    queries = projection.weight.unflatten(0, (gdn.cfg.n_heads, 2, gdn.cfg.d_head))[:, 0]
    with suppress(HookedModelError):
        assert torch.equal(gdn.W_Q, queries.mT[None])
