"""Untrained stand-ins: baselines that a dictionary must beat, made from writes of the training text.

- ``lookup``: the most similar of as many training writes as the dictionary has features, at its projection;
- ``pursuit``, beside dictionaries of codes: as many keys and values of training writes as the dictionary has
  codes a side, as many active, by matching pursuit (`writesae_lens.experiments.pursuit`): the strongest;
- ``mean_key``: the native value at the training writes' mean key, ``mean_value``: the native key at their
  mean value; each is the native write projected onto that side's mean direction, so its size fits best.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_models import HookedRecurrent, zoo
from hooked_models.hooked_recurrent import Cell
from writesae_lens.errors import WriteSAEError
from writesae_lens.experiments.origin import fingerprint
from writesae_lens.experiments.passages import as_passages
from writesae_lens.experiments.passes import check_finite, run_to_cell
from writesae_lens.experiments.pursuit import Pursuit
from writesae_lens.experiments.run import generator
from writesae_lens.saelens.texts import local_text
from writesae_lens.saes.config import WriteSAEConfig
from writesae_lens.saes.rank1 import Factors
from writesae_lens.saes.sae import WriteSAE

UNTRAINED = ("lookup", "pursuit", "mean_key", "mean_value")
"""Names of the stand-ins that `Untrained.of` makes; "pursuit" only where it has codes."""
TITLES = {
    "lookup": "untrained lookup",
    "pursuit": "untrained codes, matching pursuit",
    "mean_key": "mean key × native value",
    "mean_value": "native key × mean value",
    "random": "random control",
}
"""The baselines' names in figures, tables and headlines."""
# The least number of training writes to read, and the characters of text for each: tokens are shorter.
_LEAST_WRITES, _CHARACTERS = 2048, 8
OWN_CHARACTERS = 400_000
"""Characters that are read of a training text that the user gives: some 100,000 writes, to choose from."""


@dataclasses.dataclass(frozen=True)
class Untrained:
    """Stand-ins from training writes of one cell.

    Args:
        train: the writes, of rank 1.
        lookup: an SAE whose atoms are some of them (`lookup_of`).
        text: name of the text that they are from.
        text_hash: a hash of the tokens that were read.
        pursuit: codes that are sides of some of them; None: the dictionary beside it has no codes.
        foreign: why the text may be of another kind than what the dictionary was trained on, or "".
    """

    train: Factors
    lookup: WriteSAE
    text: str
    text_hash: str
    pursuit: Pursuit | None = None
    foreign: str = ""

    @property
    def made_from(self) -> dict[str, str]:
        """What a result's settings say of the text."""
        return {"train_text": self.text, "train_text_hash": self.text_hash}

    def cautions(self, n_features: int) -> list[str]:
        """What speaks against these baselines beside a dictionary of so many features, a line each."""
        n, found = self.lookup.cfg.d_sae, [self.foreign] if self.foreign else []
        if n < n_features:
            found.append(
                f"the lookup has only {n} training writes for {n_features} features: give more train_tokens"
            )
        return found

    @torch.no_grad()
    def of(self, native: Factors) -> dict[str, Factors]:
        """What each of `UNTRAINED` puts in the place of native writes of rank 1."""
        acts = self.lookup.encode_factors(native.key[:, 0], native.value[:, 0])
        key_side, value_side = (_mean_direction(side[:, 0]) for side in self.train)
        coded = {} if self.pursuit is None else {"pursuit": self.pursuit.of(native)}
        return {
            "lookup": Factors(*(f.float() for f in self.lookup.stand_in_of(acts))),
            **coded,
            "mean_key": Factors(_projected(native.key, key_side), native.value),
            "mean_value": Factors(native.key, _projected(native.value, value_side)),
        }


def _mean_direction(side: Float[Tensor, "write d"]) -> Float[Tensor, " d"]:
    """Direction of the mean of unit vectors."""
    mean = torch.nn.functional.normalize(side, dim=-1).mean(dim=0)
    return torch.nn.functional.normalize(mean, dim=-1)


def _projected(x: Float[Tensor, "firing one d"], direction: Float[Tensor, " d"]) -> Tensor:
    return (x @ direction)[..., None] * direction


@torch.no_grad()
def untrained(
    model: HookedRecurrent,
    cell: Cell,
    n_features: int,
    train_tokens: Int[Tensor, "passage pos"] | str | None = None,
    seed: int = 0,
    codes: WriteSAEConfig | None = None,
    trained_on: str | None = None,
) -> Untrained:
    """The stand-ins for a cell, from a random choice of training writes.

    Args:
        model: the model.
        cell: the cell.
        n_features: size of the lookup: as many features as the dictionary beside it has.
        train_tokens: passages ``[passage, pos]`` or a text (None: the text at ``trained_on``, if it is a file
            or folder of this machine, else the training part of the shipped text).
        seed: of the choice.
        codes: settings of the dictionary of codes beside it, whose numbers of codes the pursuit has (None:
            no pursuit).
        trained_on: what the dictionary beside it was trained on, as in its ``metadata.dataset_path``.

    Raises:
        WriteSAEError: the model has no tokenizer to read the shipped text with, or the text is too short.
    """
    rng, count = generator(seed, n_features), max(_LEAST_WRITES, 2 * n_features)
    name, foreign = None, ""
    if train_tokens is None:
        if model.tokenizer is None:
            raise WriteSAEError(
                "untrained stand-ins are made from training writes, and the model has no tokenizer to read "
                "the shipped text with: give train_tokens, or baselines=False"
            )
        train_tokens, name = _own_text(trained_on), Path(str(trained_on)).name
    if train_tokens is None:
        train_tokens, name = _some_documents(count * _CHARACTERS, rng), zoo.part_name("train")
        foreign = _foreign(model, trained_on)
    passages = as_passages(model, train_tokens, name=name)
    order = torch.randperm(len(passages), generator=rng)[: -(-count // passages.shape[1])]
    some = torch.stack([passages[n] for n in order.tolist()])
    parts = [_writes(model, cell, part) for part in some.split(max(1, _LEAST_WRITES // some.shape[1]))]
    train = Factors(*(torch.cat(side) for side in zip(*parts, strict=True)))
    lookup = lookup_of(model, cell, train, n_features, rng)
    pursuit = None
    if codes is not None:
        sizes = codes.n_key, codes.n_value, codes.k_key, codes.k_value
        pursuit = Pursuit.of_writes(train, *sizes, rng)
    return Untrained(train, lookup, passages.text, fingerprint(some), pursuit, foreign)


def _own_text(trained_on: str | None) -> str | None:
    """The beginning of the text that a dictionary was trained on, if it is a file or folder here."""
    if not trained_on or trained_on == zoo.TEXT_NAME:
        return None
    chosen: list[str] = []
    length = 0
    try:
        for document in local_text(trained_on, streaming=True) or ():
            text = document.get("text")
            if not isinstance(text, str) or length >= OWN_CHARACTERS:
                break
            chosen.append(text[: OWN_CHARACTERS - length])
            length += len(chosen[-1])
    except Exception:  # whatever the readers of `datasets` raise: the text has moved or is no text
        return None
    return "\n\n".join(chosen) or None


def _foreign(model: HookedRecurrent, trained_on: str | None) -> str:
    """A warning where the shipped text is likely no text of the dictionary's or the model's kind."""
    if trained_on == zoo.TEXT_NAME or (not trained_on and model.cfg.model_name in zoo.SHIPPED):
        return ""
    other = f"and not from {trained_on[:80]}" if trained_on else "which may be another than the SAE's"
    return (
        f"the untrained baselines are made from the shipped English text, {other}: give train_tokens "
        "(--train-text) of the kind that the SAE was trained on, or they are weaker than they should be"
    )


def _writes(model: HookedRecurrent, cell: Cell, passages: Int[Tensor, "passage pos"]) -> Factors:
    """The native writes of a few passages, of rank 1."""
    names = model.write_factor_hook_names(cell.layer)[:2]
    cache = run_to_cell(model, cell, passages, list(names))
    key, value = (cache[name][:, :, cell.head].flatten(0, 1)[:, None].float() for name in names)
    check_finite(f"writes of layer {cell.layer} head {cell.head}", key, value)
    return Factors(key, value)


def _some_documents(n_characters: int, rng: torch.Generator) -> str:
    """Documents of the shipped text's training part in random order, until there are enough characters."""
    documents, chosen, length = zoo.documents("train"), [], 0
    for number in torch.randperm(len(documents), generator=rng).tolist():
        if length >= n_characters:
            break
        chosen.append(documents[number])
        length += len(documents[number])
    return "\n\n".join(chosen)


@torch.no_grad()
def lookup_of(
    model: HookedRecurrent, cell: Cell, writes: Factors, d_sae: int, rng: torch.Generator
) -> WriteSAE:
    """An untrained SAE whose atoms are ``d_sae`` of some writes (all, where there are fewer), at norm 1.

    It is tied and has k=1: the write's most similar atom is active, at the write's projection onto it.

    Raises:
        WriteSAEError: the writes are all zero or not finite.
    """
    writes = writes[(writes.norm() > 0).nonzero().squeeze(-1)]
    if not len(writes.key):
        raise WriteSAEError(
            f"the writes of layer {cell.layer} head {cell.head} are all zero: choose another cell"
        )
    chosen = torch.randperm(len(writes.key), generator=rng)[:d_sae].to(writes.key.device)
    atoms = writes[chosen].normalized()
    kind = {"encoder": "tied", "decoder": "factored", "activation": "topk", "k": 1}
    cfg = WriteSAEConfig(d_k=cell.d_k, d_v=cell.d_v, d_sae=len(chosen), **kind)
    sae = WriteSAE(cfg).to(writes.key.device)
    sae.load_state_dict(
        sae.state_dict() | {"dec_key": atoms.key.contiguous(), "dec_value": atoms.value.contiguous()}
    )
    sae.cfg.metadata.model_name = model.cfg.model_name
    sae.cfg.metadata.hook_name = model.write_hook_name(cell.layer, cell.head)
    return sae
