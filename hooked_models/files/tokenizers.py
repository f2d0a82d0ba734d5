"""The tokenizer of a source, for sources that do not name one in a way that transformers understands."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hooked_models.errors import HookedModelError, one_line
from hooked_models.files.layouts import Checkpoint
from hooked_models.files.sources import find_file, has_weights, no_weights
from hooked_models.modeling.rwkv7 import RWKV7Config

# Every source whose tokenizer needs no code of its own has one of these files.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_VOCABULARIES += ("vocab.json", "vocab.txt", "tekken.json")
_MAMBA_SSM_TOKENIZER = "EleutherAI/gpt-neox-20b"  # the one in mamba_ssm's own scripts
# Vocabulary sizes of models with RWKV's World tokenizer: its tokens, and what models pad them to.
_WORLD_SIZES = range(65530, 65537)


def check_tokenizer(source: str, options: dict[str, Any]) -> None:
    """Refuse a source in Hugging Face's form without a tokenizer; transformers would make up an empty one.

    Args:
        source: a folder or hub id.
        options: the keyword arguments of ``boot_transformers``.

    Raises:
        HookedModelError: the source has no tokenizer or no weights, or its ``tokenizer.json`` cannot be read.
    """
    if Path(source).is_file():
        raise _no_tokenizer(source, "which is one file")
    revision = options.get("revision")
    names = _VOCABULARIES + (("tokenizer_config.json",) if options.get("trust_remote_code") else ())
    vocabulary = next((path for name in names if (path := find_file(source, name, revision))), None)
    if vocabulary is None:
        if options.get("load_weights", True) and not has_weights(source, revision):
            raise no_weights(source)
        raise _no_tokenizer(source, f"none of {', '.join(_VOCABULARIES)}")
    if vocabulary.name == "tokenizer.json":
        try:
            Tokenizer.from_file(str(vocabulary))
        except Exception as error:  # the tokenizers package raises no narrower class
            raise HookedModelError(
                f"{vocabulary} cannot be read as a tokenizer: {one_line(error)}"
            ) from error


def keep_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer that a user gives, such that TransformerLens takes it as it is.

    TransformerLens loads a tokenizer again, from where it came, to make it put the BOS token before texts.
    One that was made in memory came from nowhere: it stays as it is, and ``to_tokens`` puts the token there.

    Args:
        tokenizer: any; it is not changed.

    Returns:
        the tokenizer, or a copy of one that no file or repository holds.
    """
    origin = tokenizer.init_kwargs.get("name_or_path") or ""
    if origin and not (Path(origin).is_absolute() and not Path(origin).exists()):
        return tokenizer
    kept = copy.deepcopy(tokenizer)
    kept.init_kwargs = {**kept.init_kwargs, "name_or_path": origin, "add_bos_token": True}
    return kept


def find_tokenizer(source: str, checkpoint: Checkpoint, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint in another form than Hugging Face's.

    That is the source's own ``tokenizer.json`` or, without one, the tokenizer that models of this form were
    trained with.

    Raises:
        HookedModelError: there is neither; the message says to pass ``tokenizer=``.
    """
    revision, vocabulary = options.get("revision"), checkpoint.config.vocab_size
    if not Path(source).is_file() and find_file(source, "tokenizer.json", revision) is not None:
        return _fast_tokenizer(source, revision or "main")
    if not isinstance(checkpoint.config, RWKV7Config):
        if find_file(source, "tokenizer_config.json", revision) is not None:
            raise _no_tokenizer(source, "only one in another form than tokenizer.json")
        try:
            return _fast_tokenizer(_MAMBA_SSM_TOKENIZER)
        except HookedModelError as error:
            why = f"and {_MAMBA_SSM_TOKENIZER}, which mamba_ssm uses, is out of reach"
            raise _no_tokenizer(source, why) from error
    if vocabulary not in _WORLD_SIZES:
        raise _no_tokenizer(source, f"and its vocabulary of {vocabulary} is not RWKV's World vocabulary")
    try:
        # Imported here, because only these models need the package rwkv.
        from hooked_models.files.world_tokenizer import WorldTokenizer
    except ImportError as error:
        raise _no_tokenizer(source, "and the package rwkv, which has RWKV's, is not installed") from error
    return WorldTokenizer()


def _fast_tokenizer(source: str, revision: str = "main") -> PreTrainedTokenizerBase:
    load = PreTrainedTokenizerFast.from_pretrained
    try:
        try:
            # TransformerLens wants a BOS token, and would load the tokenizer again to get one.
            return load(source, revision=revision, add_bos_token=True)
        except ValueError:  # the tokenizer has no BOS token
            return load(source, revision=revision)
    except Exception as error:  # the tokenizers package raises no narrower class
        raise HookedModelError(f"could not load the tokenizer of {source}: {one_line(error)}") from error


def _no_tokenizer(source: str, why: str) -> HookedModelError:
    return HookedModelError(f"no tokenizer in {source}, {why}: pass tokenizer=...")
