"""The World tokenizer of RWKV models as a transformers tokenizer."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from rwkv import rwkv_tokenizer
from transformers import AddedToken, PreTrainedTokenizer

END_OF_TEXT = "<|endoftext|>"
"""The string of token 0, which the vocabulary file leaves out: begin, end and padding of a text."""

_FILE = "rwkv_vocab_v20230424.txt"


@cache
def _vocabulary() -> rwkv_tokenizer.TRIE_TOKENIZER:
    """The vocabulary in the rwkv package: no other file is safe, because its reader evaluates the lines."""
    return rwkv_tokenizer.TRIE_TOKENIZER(str(Path(rwkv_tokenizer.__file__).with_name(_FILE)))


class WorldTokenizer(PreTrainedTokenizer):
    """The tokenizer of RWKV's World models: 65,529 byte strings, of which the longest match is taken.

    A token is a byte string, which may end within a character; as a string it has one character a byte
    (Latin-1). Decoding joins the bytes before it reads them as UTF-8. Encoding puts token 0 before the text,
    except with ``add_special_tokens=False``. Half a surrogate pair has no UTF-8 bytes and is encoded as the
    replacement character.

    A folder that ``save_pretrained`` writes is read by ``WorldTokenizer.from_pretrained``; ``AutoTokenizer``
    has no entry for this class.
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012  (the base class declares it so)
    add_bos_token = True  # TransformerLens looks for this attribute

    def __init__(self, **kwargs: Any) -> None:
        end = AddedToken(END_OF_TEXT, lstrip=False, rstrip=False, normalized=False, special=True)
        kwargs.setdefault("added_tokens_decoder", {0: end})
        for name in ("bos_token", "eos_token", "pad_token"):
            kwargs.setdefault(name, END_OF_TEXT)
        kwargs.setdefault("name_or_path", _FILE)  # TransformerLens needs one
        kwargs |= {"special_tokens_pattern": "bos", "clean_up_tokenization_spaces": False}
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        return max(_vocabulary().idx2token) + 1

    def get_vocab(self) -> dict[str, int]:
        words = {word.decode("latin-1"): index for word, index in _vocabulary().token2idx.items()}
        return words | self._added_tokens_encoder

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        words = _vocabulary()
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return [words.idx2token[index].decode("latin-1") for index in words.encode(text)]

    def _convert_token_to_id(self, token: str) -> int | None:
        try:
            return _vocabulary().token2idx.get(token.encode("latin-1"))
        except UnicodeEncodeError:
            return None

    def _convert_id_to_token(self, index: int) -> str:
        word = _vocabulary().idx2token.get(index)
        return f"<|unused {index}|>" if word is None else word.decode("latin-1")

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        added = self._added_tokens_encoder
        raw = b"".join(token.encode("utf-8" if token in added else "latin-1") for token in tokens)
        return raw.decode("utf-8", errors="replace")

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Nothing to save: the vocabulary comes with the rwkv package."""
        return ()
