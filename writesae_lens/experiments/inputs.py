"""What the experiments share on their way in: the SAE's cell, passages of text, firings and atoms."""

from __future__ import annotations

import hashlib
import json
import operator
import os
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from hooked_models import HookedRecurrent
from hooked_models.hooked_recurrent import Cell, Site, sides_of
from writesae_lens.errors import WriteSAEError
from writesae_lens.saes.rank1 import Factors, inner
from writesae_lens.saes.sae import MatrixSAE

DEFAULT_CONTEXT = 256
_OF_TOKENS = (torch.int64, torch.int32)
# Logits that one pass may hold: bounds memory on models with large vocabularies.
LOGITS_PER_PASS = 2**27


class Firings(NamedTuple):
    """The dominant atom at every position of one passage where any atom is active."""

    position: Int[Tensor, " firing"]
    atom: Int[Tensor, " firing"]
    coefficient: Float[Tensor, " firing"]
    write_key: Float[Tensor, "firing d_k"]
    write_value: Float[Tensor, "firing d_v"]


def find_site(model: HookedRecurrent, sae: SAE[Any]) -> Site:
    """The cell that the SAE was trained on, from ``sae.cfg.metadata.hook_name``.

    Raises:
        WriteSAEError: there is no model or no SAE, the SAE names no hook or has NaN in its weights, its
            sizes are not the cell's, or it expects inputs that are scaled at run time.
    """
    check_model(model)
    check_sae(sae)
    name = sae.cfg.metadata.hook_name
    if name is None:
        raise WriteSAEError(
            "the SAE does not say which hook it belongs to: set sae.cfg.metadata.hook_name, for "
            "example to model.write_hook_name(layer, head)"
        )
    site = model.site(name)
    cell = site.cell
    shape = sides_of(sae) or (cell.d_k, cell.d_v)
    if shape != (cell.d_k, cell.d_v) or sae.cfg.d_in != cell.d_k * cell.d_v:
        raise WriteSAEError(
            f"the SAE is made for {shape[0]} x {shape[1]} matrices (d_in {sae.cfg.d_in}), but layer "
            f"{cell.layer} head {cell.head} of the model writes {cell.d_k} x {cell.d_v}: give the model that "
            "it was trained on, as HookedRecurrent.for_sae(sae) loads it"
        )
    there, here = next(sae.parameters()).device, next(model.original_model.parameters()).device
    if there != here:
        raise WriteSAEError(
            f"the SAE is on {there}, the model on {here}: move the SAE, sae.to({str(here)!r})"
        )
    if sae.cfg.normalize_activations != "none":
        raise WriteSAEError(
            f"the SAE scales its inputs (normalize_activations={sae.cfg.normalize_activations!r}), so its "
            "coefficients are not in units of writes: fold the scale in first"
        )
    return site


def as_passages(
    model: HookedRecurrent,
    tokens: Int[Tensor, "passage pos"] | str,
    context_size: int | None = None,
    prepend_bos: bool = False,
) -> Int[Tensor, "passage pos"]:
    """Passages of equal length, from a token tensor or from text.

    Args:
        model: for its tokenizer and vocabulary.
        tokens: ``[passage, pos]``, or one text to cut into passages; a last, shorter piece is left out.
        context_size: tokens of a passage of text (None: 256).
        prepend_bos: start every passage of text with the BOS token, which counts as one of its tokens.

    Raises:
        WriteSAEError: the text is shorter than one passage, the model has no tokenizer, or tokens are not
            ids of the model's vocabulary in the shape of passages.
    """
    check_model(model)
    check_at_least(1, optional=True, context_size=context_size)
    if isinstance(tokens, str):
        size = DEFAULT_CONTEXT if context_size is None else context_size
        if size < 1 + prepend_bos:
            raise WriteSAEError(f"a passage of {size} tokens is too short: give a larger context_size")
        ids = model.to_tokens(tokens, prepend_bos=False, truncate=False)[0]
        if tokens and not len(ids):
            raise WriteSAEError("the model has no tokenizer to read text with: give token ids instead")
        step = size - prepend_bos
        if len(ids) < step:
            hint = "give more text or a smaller context_size"
            if os.path.isfile(tokens):
                hint = f"{tokens} is the name of a file: give what open(...).read() gives"
            raise WriteSAEError(
                f"the text is too short: {len(ids)} tokens, while one passage has {size}; {hint}"
            )
        tokens = ids[: len(ids) // step * step].view(-1, step)
        if prepend_bos:
            bos = torch.full_like(tokens[:, :1], model.tokenizer.bos_token_id)
            tokens = torch.cat([bos, tokens], dim=1)
    elif context_size is not None:
        raise WriteSAEError("context_size cuts text; these tokens are cut into passages already")
    is_tensor = isinstance(tokens, Tensor)
    if not is_tensor or tokens.ndim != 2 or not tokens.numel() or tokens.dtype not in _OF_TOKENS:
        raise WriteSAEError(
            f"tokens must be a LongTensor [passage, pos] or a text, got {_shown(tokens)}: model.to_tokens "
            "makes them from text, torch.tensor from lists"
        )
    if int(tokens.min()) < 0 or int(tokens.max()) >= model.cfg.d_vocab:
        raise WriteSAEError(
            f"token ids run from {int(tokens.min())} to {int(tokens.max())}, but the model has "
            f"{model.cfg.d_vocab} tokens: were they made with another tokenizer?"
        )
    return tokens.to(next(model.original_model.parameters()).device)


@torch.no_grad()
def cache_of(model: HookedRecurrent, tokens: Int[Tensor, " pos"]) -> Any:
    """The cache after some tokens, which rows that differ later share; None after none."""
    if not len(tokens):
        return None
    cache = model.new_cache()
    for part in tokens.split(max(1, LOGITS_PER_PASS // model.cfg.d_vocab)):
        model(part[None], past_key_values=cache, use_cache=True)
    return cache


class Activity(NamedTuple):
    """What the atoms of an SAE do at every position of one passage, and what is written there."""

    acts: Float[Tensor, "pos d_sae"]
    write_key: Float[Tensor, "pos d_k"]
    write_value: Float[Tensor, "pos d_v"]


@torch.no_grad()
def native_writes(
    model: HookedRecurrent, cell: Cell, tokens: Int[Tensor, " pos"]
) -> tuple[Float[Tensor, "pos d_k"], Float[Tensor, "pos d_v"]]:
    """Keys and values of a cell's writes in one passage, run up to its layer.

    Raises:
        WriteSAEError: they are not finite.
    """
    return _writes(model, cell, _run_to(model, cell, tokens, []))


@torch.no_grad()
def native_factors(
    model: HookedRecurrent, cell: Cell, tokens: Int[Tensor, " pos"]
) -> tuple[Float[Tensor, "pos d_k"], Float[Tensor, "pos d_v"], Float[Tensor, "pos d_k"]]:
    """`native_writes`, and the vectors that the cell reads with, from one pass."""
    name = model.write_factor_hook_names(cell.layer)[2]
    cache = _run_to(model, cell, tokens, [name])
    return *_writes(model, cell, cache), cache[name][0, :, cell.head]


@torch.no_grad()
def unembedding_directions(
    model: HookedRecurrent, cell: Cell, targets: Int[Tensor, " target"]
) -> Float[Tensor, "target d_v"]:
    """W_O[head] W_U[target]: the tokens' rows of the unembedding, as the head's output sees them."""
    native: Any = model.original_model
    rows = native.get_output_embeddings().weight[targets].float()
    return rows @ model.mixers[cell.layer].head_output(cell.head).float().T


@torch.no_grad()
def activity(model: HookedRecurrent, sae: SAE[Any], site: Site, tokens: Int[Tensor, " pos"]) -> Activity:
    """Run one passage up to the cell's layer, and encode its writes (or states, as the SAE was trained).

    Raises:
        WriteSAEError: the cell's activations are not finite.
    """
    cell = site.cell
    state_name = model.state_hook_name(cell.layer, cell.head)
    on_states = site.kind == "state"
    cache = _run_to(model, cell, tokens, [state_name] * on_states)
    key, value = _writes(model, cell, cache)
    if on_states:
        acts = sae.encode(cache[state_name][0])
    elif isinstance(sae, MatrixSAE):
        acts = sae.encode_factors(key, value)
    else:
        acts = sae.encode((key[:, :, None] * value[:, None, :]).flatten(1))
    return Activity(acts, key, value)


def median_write_norm(found: Sequence[Activity]) -> float:
    """Of a cell's native writes, over all positions."""
    return float(torch.cat([x.write_key.norm(dim=-1) * x.write_value.norm(dim=-1) for x in found]).median())


def _run_to(
    model: HookedRecurrent, cell: Cell, tokens: Int[Tensor, " pos"], also: list[str]
) -> dict[str, Tensor]:
    return model.run_with_cache(
        tokens[None],
        names_filter=[*model.write_factor_hook_names(cell.layer)[:2], *also],
        stop_at_layer=cell.layer + 1,
        return_cache_object=False,
        use_cache=False,
    )[1]


def _writes(model: HookedRecurrent, cell: Cell, cache: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    key, value = (cache[name][0, :, cell.head] for name in model.write_factor_hook_names(cell.layer)[:2])
    if not bool(torch.isfinite(key).all() and torch.isfinite(value).all()):
        raise WriteSAEError(
            f"the writes of layer {cell.layer} head {cell.head} are not finite: try another dtype"
        )
    return key, value


def find_firings(model: HookedRecurrent, sae: SAE[Any], site: Site, tokens: Int[Tensor, " pos"]) -> Firings:
    """Dominant atom, coefficient and native write at each position where any atom is active."""
    acts, key, value = activity(model, sae, site, tokens)
    coefficient, atom = acts.max(dim=-1)
    fires = (coefficient > 0).nonzero().squeeze(-1)
    return Firings(fires, atom[fires], coefficient[fires].float(), key[fires], value[fires])


def alive_atoms(found: Sequence[Activity], passages: Int[Tensor, "passage pos"]) -> Int[Tensor, " atom"]:
    """The atoms that are dominant at some position, on the CPU, in order.

    Raises:
        WriteSAEError: there is none.
    """
    alive = torch.cat([x.acts.argmax(-1)[x.acts.amax(-1) > 0] for x in found]).unique().cpu()
    check_any_fires(len(alive), len(alive), passages)
    return alive


def busiest_atom(found: Sequence[Activity], passages: Int[Tensor, "passage pos"]) -> int:
    """The atom that is dominant at the most positions.

    Raises:
        WriteSAEError: none ever is.
    """
    dominant = torch.cat([x.acts.argmax(-1)[x.acts.amax(-1) > 0] for x in found])
    check_any_fires(len(dominant), len(dominant), passages)
    return int(dominant.bincount().argmax())


def check_atom(sae: SAE[Any], atom: int | None) -> None:
    """Refuse an atom that the SAE does not have; None is fine."""
    if atom is not None and not (_is_whole(atom) and 0 <= atom < sae.cfg.d_sae):
        raise WriteSAEError(f"atom {atom!r} does not exist: the SAE has atoms 0 to {sae.cfg.d_sae - 1}")


def find_cell(model: HookedRecurrent, subject: SAE[Any] | Cell | tuple[int, int]) -> Cell:
    """The cell of an SAE, or the one that is given, as it is or as (layer, head).

    Raises:
        WriteSAEError: there is no model, the SAE does not fit, or the cell is another model's.
        HookedModelError: there is no such cell.
    """
    check_model(model)
    if isinstance(subject, SAE):
        return find_site(model, subject).cell
    if isinstance(subject, Cell):
        cell = model.cell(subject.layer, subject.head)
        if cell != subject:
            raise WriteSAEError(f"{subject} is another model's: here it is {cell}")
        return cell
    if not isinstance(subject, (tuple, list)) or len(subject) != 2:
        raise WriteSAEError(f"an SAE, a cell or (layer, head) is wanted, got {_shown(subject)}")
    return model.cell(*subject)


def find_passages(
    model: HookedRecurrent,
    subject: SAE[Any] | Cell | tuple[int, int],
    tokens: Int[Tensor, "passage pos"] | str,
    context_size: int | None,
) -> Int[Tensor, "passage pos"]:
    """The passages; text is cut as the SAE was trained, unless ``context_size`` says.

    Raises:
        WriteSAEError: the text is too short, or tokens are no passages.
    """
    metadata = subject.cfg.metadata if isinstance(subject, SAE) else None
    if isinstance(tokens, str) and context_size is None and metadata is not None:
        context_size = metadata.context_size
    return as_passages(model, tokens, context_size, bool(metadata and metadata.prepend_bos))


def token_id(model: HookedRecurrent, token: int | str) -> int:
    """The id of a token that is given as an id, or as the text of exactly one token.

    Raises:
        WriteSAEError: it is none.
    """
    if isinstance(token, str):
        if model.tokenizer is None:
            raise WriteSAEError("the model has no tokenizer to read text with: give token ids instead")
        ids = model.tokenizer.encode(token, add_special_tokens=False)
        if len(ids) != 1:
            pieces = ", ".join(repr(model.tokenizer.decode([i])) for i in ids)
            raise WriteSAEError(
                f"{token!r} is not one token but {len(ids)} ({pieces}); many tokens start with a space"
            )
        return ids[0]
    try:
        token = operator.index(token)  # of numpy and torch, too
    except TypeError as error:
        raise WriteSAEError(f"a token is an id or the text of one token, not {_shown(token)}") from error
    if not 0 <= token < model.cfg.d_vocab:
        raise WriteSAEError(f"token {token} does not exist: ids run from 0 to {model.cfg.d_vocab - 1}")
    return token


def check_any_fires(n_found: int, n_kept: int, passages: Int[Tensor, "passage pos"]) -> None:
    """Refuse to go on when no atom fires, or only at positions that are left out."""
    if not n_found:
        raise WriteSAEError(
            f"no atom fires in {len(passages)} passages of {passages.shape[1]} tokens: is this the model "
            "and the hook that the SAE was trained on?"
        )
    if not n_kept:
        raise WriteSAEError("atoms fire, but skip_positions left none of the firings to test")


def check_choice(name: str, given: str, *allowed: str) -> None:
    """Refuse a word that is not among the allowed ones."""
    if given not in allowed:
        raise WriteSAEError(f"{name}={given!r} is unknown: choose {' or '.join(allowed)}")


def check_model(model: Any) -> None:
    """Refuse what is no model of this package."""
    if not isinstance(model, HookedRecurrent):
        raise WriteSAEError(
            f"the first argument must be a HookedRecurrent, got {_shown(model)}: "
            "HookedRecurrent.boot_transformers(name) loads one"
        )


def check_sae(sae: Any) -> None:
    """Refuse what is no SAE of SAELens, and one with NaN in its weights."""
    if not isinstance(sae, SAE):
        raise WriteSAEError(
            f"an SAE is wanted, got {_shown(sae)}: SAE.load_from_disk or SAE.from_pretrained gives one"
        )
    broken = [name for name, x in sae.named_parameters() if bool(x.isnan().any())]
    if broken:
        raise WriteSAEError(
            f"the SAE has NaN in {', '.join(broken)}: its training went wrong, train it again"
        )


def as_list(name: str, given: Any) -> list[Any]:
    """What is given as a list, tuple or array, as a list; anything else is refused."""
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise WriteSAEError(f"{name} must be a list or tuple, got {_shown(given)}: put it into brackets")
    return list(given)


def check_positive(**values: float) -> None:
    """Refuse sizes that are not finite and above 0, by name."""
    for name, given in values.items():
        if not is_number(given) or not 0 < given < float("inf"):
            raise WriteSAEError(f"{name} must be positive, a number above 0, got {_shown(given)}")


def check_all_positive(**values: Sequence[float]) -> None:
    """Refuse lists of sizes that are empty or have one that is not finite and above 0, by name."""
    for name, given in values.items():
        numbers = as_list(name, given)
        if not numbers or not all(is_number(x) and 0 < x < float("inf") for x in numbers):
            raise WriteSAEError(f"{name} must be positive numbers, one at least, got {_shown(given)}")


def check_not_negative(**values: float) -> None:
    """Refuse numbers that are not finite or below 0, by name."""
    for name, given in values.items():
        if not is_number(given) or not 0 <= given < float("inf"):
            raise WriteSAEError(f"{name}={_shown(given)} makes no sense: give 0 or more")


def check_at_least(least: int, optional: bool = False, **values: Any) -> None:
    """Refuse what is no whole number, or too small, by name; where ``optional``, None is fine."""
    for name, value in values.items():
        if not (optional and value is None) and not (_is_whole(value) and value >= least):
            whole = "" if _is_whole(value) else ", a whole number"
            raise WriteSAEError(f"{name}={_shown(value)} makes no sense: give {least} or more{whole}")


def _is_whole(x: Any) -> bool:
    return isinstance(x, Integral) and not isinstance(x, bool)


def is_number(x: Any) -> bool:
    return isinstance(x, Real) and not isinstance(x, bool)


def _shown(x: Any) -> str:
    """A value in a message: numbers and texts as they are, of others the type."""
    if isinstance(x, Tensor):
        return f"{x.dtype} of shape {tuple(x.shape)}"
    parts = x if isinstance(x, (tuple, list)) else [x]
    plain = all(part is None or isinstance(part, (str, Real)) for part in parts)
    return f"{x!r:.60}" if plain else f"a {type(x).__name__}"


@torch.no_grad()
def atom_factors(sae: SAE[Any], atoms: Int[Tensor, " atom"], d_k: int, d_v: int) -> Factors:
    """Chosen decoder atoms as factors; the atoms of a flat SAE get rank d_v (column by column)."""
    if isinstance(sae, MatrixSAE) and sae.cfg.decoder == "factored":
        return Factors(*(f[atoms].float() for f in sae.decoder_factors()))
    matrices = sae.W_dec[atoms].float().view(-1, d_k, d_v)
    if not isinstance(sae, MatrixSAE) and getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        # SAELens's coefficients are those of atoms of norm 1.
        matrices = matrices / matrices.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None]
    columns = torch.eye(d_v, device=matrices.device).expand(len(matrices), -1, -1)
    return Factors(matrices.mT, columns)


def native_cosines(firings: Firings, atoms: Factors) -> Float[Tensor, " firing"]:
    """Signed cosine between each firing's native write and its own atom, as matrices (0: either is zero)."""
    native = Factors(firings.write_key[:, None].float(), firings.write_value[:, None].float())
    return inner(native, atoms) / (native.norm().clamp(min=1e-30) * atoms.norm().clamp(min=1e-30))


@torch.no_grad()
def fingerprint_run(
    model: HookedRecurrent, saes: Sequence[SAE[Any]], passages: Int[Tensor, "passage pos"]
) -> str:
    """What records depend on beside the settings and the SAEs' weights: tokens, model, the SAEs' options."""
    logits = model(passages[:1], return_type="logits")[0, -1]
    settings = [
        {k: v for k, v in sae.cfg.to_dict().items() if k not in ("device", "dtype", "metadata")}
        for sae in saes
    ]
    said = torch.frombuffer(bytearray(json.dumps(settings, default=str).encode()), dtype=torch.uint8)
    return fingerprint(passages, logits, said)


def fingerprint(*tensors: Tensor) -> str:
    """A short hash of tensors' contents, to tell runs on other inputs apart."""
    digest = hashlib.sha256()
    for x in tensors:
        x = x.detach().cpu().contiguous()
        digest.update(str((x.dtype, tuple(x.shape))).encode())
        digest.update(x.view(torch.uint8).numpy().tobytes() if x.numel() else b"")
    return digest.hexdigest()[:16]
